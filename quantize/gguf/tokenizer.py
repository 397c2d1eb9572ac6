"""The tokenizer as llama.cpp stores it: tokens, their kinds, merges or scores, special tokens.

llama.cpp knows two kinds of byte-pair tokenizers: GPT-2's, whose text is first cut by a regular
expression that goes by a name, and SentencePiece's, which replaces spaces and falls back to bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitknap.disk.atomic import read_json
from bitknap.errors import ModelError
from bitknap.quantization.ggml.container import Value
from bitknap.quantization.ggml.tokenizer_json import CONTROL, CUTS, GPT2, USER
from bitknap.quantization.gguf.architectures import Unwritable
from bitknap.quantization.source.transformers_calls import calling_transformers

_NORMAL, _UNUSED, _BYTE = 1, 5, 6
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "padding"}
# Parts of the expressions by which families are known that write them in several ways.
_MARKS = {
    r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}": "gpt-4o",
    r"[一-龥ࠀ-一가-퟿]+": "deepseek-llm",
    "[一-龥\u3040-ゟ": "deepseek-v3",
}


def values_of(folder: Path, vocabulary: int) -> tuple[dict[str, Value], list[str]]:
    """Return what the head of a file says about a tokenizer, and warnings.

    Args:
        folder: the model's folder.
        vocabulary: rows of its embedding; tokens that the tokenizer lacks are marked unused.

    Raises:
        ModelError: there is no tokenizer, or llama.cpp has none of its kind.
    """
    from transformers import AutoTokenizer

    with calling_transformers(
        f"{folder}: no tokenizer that transformers can read",
        "put the model's own tokenizer in its folder",
        ModelError,
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        file = folder / "tokenizer.json"
        # transformers adds tokens that a class of tokenizers usually has; the file has the model's.
        known = read_json(file) if file.is_file() else _written(tokenizer)
    model = known["model"]
    if model.get("type") != "BPE":
        raise Unwritable(
            f"{folder}: GGUF files are written with byte-pair tokenizers, this one is "
            f"{model.get('type')}; name an output without .gguf: a folder for llama-quantize, "
            "which needs none"
        )
    values, warnings = _pieces(known, vocabulary)
    for name, key in _SPECIAL.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number < vocabulary:
            values[f"tokenizer.ggml.{key}_token_id"] = int(number)
    values |= _added(tokenizer)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        values["tokenizer.chat_template"] = template
    return values, warnings


def _written(tokenizer: Any) -> Any:
    """Return the content that `tokenizer.json` would have."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _pieces(known: Mapping[str, Any], vocabulary: int) -> tuple[dict[str, Value], list[str]]:
    """Return tokens, kinds, and merges or scores."""
    model = known["model"]
    words = {int(number): word for word, number in model["vocab"].items()}
    added = {int(one["id"]): one for one in known.get("added_tokens", ())}
    words |= {number: one["content"] for number, one in added.items()}
    if (most := max(words, default=0)) >= vocabulary:
        raise ModelError(
            f"the tokenizer has token {most}, the model's embedding has {vocabulary:,} rows; put "
            "the model's own tokenizer in its folder"
        )
    falls_back = bool(model.get("byte_fallback"))
    tokens, kinds = [], []
    for number in range(vocabulary):
        tokens.append(words.get(number, f"[PAD{number}]"))
        kinds.append(_kind(words.get(number), added.get(number), falls_back))
    values: dict[str, Value] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
    }
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    if falls_back:
        values |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": _scores(tokens, model["merges"]),
            "tokenizer.ggml.add_space_prefix": _adds_space(known),
        }
        return values, [] if _merges_all(words, model["merges"]) else [
            "llama.cpp merges any two pieces that are a token together, this tokenizer only some: "
            "compare its tokens with transformers' before you serve it"
        ]
    cut, warnings = _cut(known.get("pre_tokenizer"))
    values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut}
    # llama.cpp asks for merges, even of a tokenizer that has none.
    values["tokenizer.ggml.merges"] = merges or [f"{tokens[0]} {tokens[0]}"]
    return values, warnings


def _kind(word: str | None, added: Mapping[str, Any] | None, falls_back: bool) -> int:
    if word is None:
        return _UNUSED
    if added is not None:
        return CONTROL if added.get("special") else USER
    is_byte = falls_back and len(word) == 6 and word.startswith("<0x") and word.endswith(">")
    return _BYTE if is_byte else _NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[Any]) -> list[float]:
    """Return scores by which the highest pair is the one that is merged first."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault(left + right, number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _merges_all(words: Mapping[int, str], merges: Sequence[Any]) -> bool:
    """Return whether any two tokens that make up a third are merged, as SentencePiece does."""
    pairs = {tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges}
    known = {left + right for left, right in pairs}
    tokens = set(words.values())
    return all(
        (word[:at], word[at:]) in pairs
        for word in known
        for at in range(1, len(word))
        if word[:at] in tokens and word[at:] in tokens
    )


def _adds_space(known: Mapping[str, Any]) -> bool:
    """Return whether a space is put before the text."""
    return '"Prepend"' in json.dumps(known.get("normalizer")) or any(
        word in json.dumps(known.get("pre_tokenizer")) for word in ('"always"', '"first"')
    )


def _cut(pre: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    """Return llama.cpp's name for how text is cut, and a warning if it has none."""
    steps = [] if pre is None else pre.get("pretokenizers", [pre])
    written = [
        str(step["pattern"].get("Regex") or step["pattern"].get("String"))
        for step in steps
        if step.get("type") == "Split"
    ]
    for regex in written:
        for name, whole in CUTS.items():
            if regex == whole:
                return name, []
        for mark, name in _MARKS.items():
            if mark in regex:
                return name, []
    bytewise = [step for step in steps if step.get("type") == "ByteLevel"]
    if not written and any(step.get("use_regex", True) for step in bytewise):
        return GPT2, []
    return GPT2, [
        "llama.cpp has no name for how this tokenizer cuts text; the file says gpt-2: compare its "
        "tokens with transformers' before you serve it"
    ]


def _added(tokenizer: Any) -> dict[str, Value]:
    """Return which special tokens the tokenizer puts around a text."""
    ids = tokenizer("a").input_ids
    return {
        "tokenizer.ggml.add_bos_token": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": bool(ids) and ids[-1] == tokenizer.eos_token_id,
    }
