"""Tokenizers: llama.cpp cuts a text into the tokens that transformers does."""

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer

from bitknap.errors import ModelError
from bitknap.quantization.gguf import tokenizer

TEXTS = (
    "the Licensor shall é mean",
    "  two  spaces (patent) or contribution",
    "Ω Work's 12345\n\nNew line",
)


def sentencepiece(folder, text, *, whole=True):
    """Write a tokenizer as SentencePiece makes them: spaces replaced, and bytes to fall back to."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    made.train_from_iterator(text.split("\n"), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    known = json.loads(made.to_str())
    known["added_tokens"] = [one for one in known["added_tokens"] if one["id"] < 3]
    if whole:  # as merges are made from a model of SentencePiece, which merges whatever is a token
        vocabulary = known["model"]["vocab"]
        known["model"]["merges"] = [
            [word[:at], word[at:]]
            for word in sorted(vocabulary, key=lambda word: vocabulary[word])
            for at in range(1, len(word))
            if vocabulary[word] > 258 and {word[:at], word[at:]} <= vocabulary.keys()
        ]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer.json").write_text(json.dumps(known))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_llama_cpp_cuts_text_as_transformers_does(tmp_path, llama, kind):
    """A text as a prompt gives the distribution that its tokens give."""
    folder = tmp_path / "model"
    llama.model(folder, "mixtral")
    if kind == "sentencepiece":
        sentencepiece(folder, (llama.root / "LICENSE").read_text())
    path = llama.write(folder, tmp_path / "a.gguf").path
    known = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        as_text, as_tokens = llama.log_probabilities(path, [text, known(text).input_ids])
        assert np.isfinite(as_text).all()
        np.testing.assert_array_equal(as_text, as_tokens)


def test_what_a_head_says_about_sentencepiece(tmp_path, llama):
    sentencepiece(tmp_path, "to be or not to be, that is the question " * 9)
    said, warnings = tokenizer.values_of(tmp_path, 1200)
    values: dict[str, Any] = dict(said)
    tokens = values["tokenizer.ggml.tokens"]
    kinds = values["tokenizer.ggml.token_type"]
    assert warnings == []
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert (tokens[1], kinds[1]) == ("<s>", 3)
    assert (tokens[3], kinds[3]) == ("<0x00>", 6)
    assert (tokens[-1], kinds[-1]) == ("[PAD1199]", 5)


def test_merges_that_llama_cpp_would_add_are_said(tmp_path, llama):
    sentencepiece(tmp_path, (llama.root / "LICENSE").read_text(), whole=False)
    _, warnings = tokenizer.values_of(tmp_path, 1200)
    assert "merges any two pieces" in warnings[0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "this one is WordPiece"),
        (models.Unigram([("a", -1.0)]), "this one is Unigram"),
    ],
)
def test_other_kinds_are_refused(tmp_path, llama, model, words):
    llama.model(tmp_path / "model", "mixtral")
    Tokenizer(model).save(str(tmp_path / "model" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        llama.write(tmp_path / "model", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, llama):
    llama.model(tmp_path / "model", "mixtral")
    with pytest.raises(ModelError, match=r"token 4095, the model's embedding has 64 rows"):
        tokenizer.values_of(tmp_path / "model", 64)


def test_a_cut_without_a_name_is_said(tmp_path, llama):
    folder = tmp_path / "model"
    llama.model(folder, "mixtral")
    known = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
    bytewise = {**known["pre_tokenizer"], "use_regex": False}
    known["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytewise]}
    (folder / "tokenizer.json").write_text(json.dumps(known))
    values, warnings = tokenizer.values_of(folder, 4096)
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert "no name for how this tokenizer cuts text" in warnings[0]


def test_no_tokenizer_at_all(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer that transformers can read"):
        tokenizer.values_of(tmp_path, 64)
