"""A byte-pair tokenizer as a GGUF file has it, as the files that transformers reads.

Before pairs are merged, text is cut by a regular expression that llama.cpp knows by a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Names of expressions that are written in one way alone, and the expressions.
CUTS: Mapping[str, str] = {
    "qwen2": _WORDS + r"\p{N}" + _REST,
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
}
GPT2 = "gpt-2"  # the expression that byte-level tokenizers have built in
CONTROL, USER = 3, 4


def files_of(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the content of `tokenizer.json` and `tokenizer_config.json`, by their names.

    None if the file has no tokenizer of this kind.
    """
    words = values.get("tokenizer.ggml.tokens")
    cut = values.get("tokenizer.ggml.pre", GPT2)
    known = values.get("tokenizer.ggml.model") == "gpt2" and (cut == GPT2 or cut in CUTS)
    if not words or not known:
        return None
    kinds = values.get("tokenizer.ggml.token_type", [1] * len(words))
    added = [number for number, kind in enumerate(kinds) if kind in (CONTROL, USER)]
    merges = [one.split(" ") for one in values.get("tokenizer.ggml.merges", ())]
    special = {
        name: words[number]
        for name in ("bos", "eos")
        if (number := values.get(f"tokenizer.ggml.{name}_token_id")) is not None
    }
    bos = special.get("bos") if values.get("tokenizer.ggml.add_bos_token") else None
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(n, words[n], special=kinds[n] == CONTROL) for n in added],
        "normalizer": None,
        "pre_tokenizer": _cutting(cut),
        "post_processor": None if bos is None else _begins_with(bos, words.index(bos)),
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": merges,
        },
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{name}_token": word for name, word in special.items()}
    if template := values.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _cutting(name: str) -> dict[str, Any]:
    if name == GPT2:
        return _BYTES
    split = {
        "type": "Split",
        "pattern": {"Regex": CUTS[name]},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTES, "use_regex": False}]}


def _added(number: int, word: str, *, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": word, **plain, "special": special}


def _begins_with(word: str, number: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": word, "type_id": 0}}
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, other],
        "special_tokens": {word: {"id": word, "ids": [number], "tokens": [word]}},
    }
