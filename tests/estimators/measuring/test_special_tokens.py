"""Windows begin as each kind of tokenizer begins a text, and hold the document's own tokens."""

import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PerceiverTokenizer, PreTrainedTokenizerFast

from bitknap.api import evaluation, quantizing
from bitknap.api.calibration import gather
from bitknap.api.requests import Calibration
from bitknap.errors import InputError
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.measuring.text import encode
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import tiny_model

# Blank lines, indentation, trailing blanks, no newline at the end.
TEXT = (
    "def f(x):\n    if x:\n\n\n        return 1\n\t\n  \nIt was a bright cold day.\n\n" * 40 + "end"
)
SPECIAL = ["<unk>", "<bos>", "<eos>", "[gMASK]"]


def trained(model, trainer, split, *, begin=(), end=(), normalizer=None, **named):
    """A tokenizer of TEXT that puts special tokens before and after a text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.normalizer = split, normalizer
    tokenizer.train_from_iterator(
        TEXT.splitlines(keepends=True),
        trainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False, **named),
    )
    if begin or end:
        numbers = [(name, tokenizer.token_to_id(name)) for name in SPECIAL]
        single = " ".join((*begin, "$A", *end))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=numbers
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=64,
    )


def bpe(**options):
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(models.BPE(), trainers.BpeTrainer, split, initial_alphabet=alphabet, **options)


def sentences(**options):
    split, normalizer = pre_tokenizers.Metaspace(), normalizers.NFKC()
    trainer = trainers.UnigramTrainer
    options |= {"normalizer": normalizer, "unk_token": "<unk>"}
    return trained(models.Unigram(), trainer, split, **options)


def pieces(**options):
    model = models.WordPiece(unk_token="<unk>")
    return trained(model, trainers.WordPieceTrainer, pre_tokenizers.Whitespace(), **options)


KINDS = {
    "BPE": (bpe, 0),
    "BPE with BOS": (lambda: bpe(begin=["<bos>"]), 1),
    "BPE with two": (lambda: bpe(begin=["[gMASK]", "<bos>"]), 2),
    "BPE with EOS": (lambda: bpe(end=["<eos>"]), 0),
    "Unigram with both": (lambda: sentences(begin=["<bos>"], end=["<eos>"]), 1),
    "WordPiece with both": (lambda: pieces(begin=["<bos>"], end=["<eos>"]), 1),
    "slow with EOS": (ByT5Tokenizer, 0),
    "slow with both": (PerceiverTokenizer, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_the_documents_tokens_and_begin_as_texts_do(kind, caplog):
    make, special = KINDS[kind]
    tokenizer = make()
    windows = encode(tokenizer, TEXT).every(16)
    assert not caplog.records  # such as that the text is longer than the model's context
    whole = tokenizer(TEXT, verbose=False)["input_ids"]
    assert windows.prefix == special
    assert (windows.ids[:, :special] == torch.tensor(whole[:special])).all()
    body = windows.ids[:, special:].reshape(-1).tolist()
    assert body == whole[special : special + len(body)]
    assert len(whole) - special - len(body) <= 16  # less than a window, and EOS


def test_a_tokenizer_that_is_asked_to_add_bos(tmp_path):
    from transformers import AutoTokenizer, LlamaTokenizer

    known = {**{name: at for at, name in enumerate(SPECIAL)}, "▁": 4, "a": 5, "b": 6}
    for asked in (True, False):
        made = LlamaTokenizer(
            vocab=known,
            merges=[],
            unk_token="<unk>",
            bos_token="<bos>",
            eos_token="<eos>",
            add_bos_token=asked,
        )
        made.save_pretrained(tmp_path)
        found = encode(AutoTokenizer.from_pretrained(tmp_path), "abba")
        assert found.prefix.tolist() == ([1] if asked else [])
        assert found.ids.tolist()[-4:] == [5, 6, 6, 5]


def test_a_tokenizer_that_does_not_fit_the_text_or_the_model():
    known = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, unk_token="<unk>")
    with pytest.raises(InputError, match="knows no part of the text"):
        encode(tokenizer, "nothing here")
    silent = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(InputError, match="knows no part of the text"):
        encode(silent, "nothing here")
    tokenizer = bpe(begin=["<bos>"])
    most = int(encode(tokenizer, TEXT).ids.max())
    assert len(encode(tokenizer, TEXT, most + 1).ids)
    with pytest.raises(InputError) as error:
        encode(tokenizer, TEXT, most)
    assert str(error.value) == (
        f"the tokenizer has {len(tokenizer)} tokens and gives token {most}, but the model's "
        f"embedding has {most} rows; put the model's own tokenizer in its folder"
    )


CYCLE = "abcdefghijklmnop"
LENGTH = 16


def _loss(model, given, labels):
    logits = model(input_ids=given).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)


@pytest.fixture(scope="module")
def needs_bos(tmp_path_factory):
    """A model that goes on with the alphabet after BOS and is wrong without it, and a text."""
    folder = tmp_path_factory.mktemp("model")
    letters = {"<unk>": 0, "<bos>": 1, **{c: at for at, c in enumerate(CYCLE, 2)}}
    spelled = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    spelled.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spelled, unk_token="<unk>", bos_token="<bos>"
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": 18, "hidden_size": 32, "max_position_embeddings": LENGTH}
    model = tiny_model("mixtral", num_hidden_layers=1, **sizes).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    starts = torch.arange(len(CYCLE))
    text = (starts[:, None] + torch.arange(LENGTH - 1)) % len(CYCLE) + 2
    batch = torch.cat((torch.ones(len(text), 1, dtype=torch.long), text), dim=1)
    unknown = torch.zeros_like(text[:, 1:])
    for _ in range(80):
        loss = _loss(model, batch[:, :-1], batch[:, 1:]) + _loss(model, text[:, :-1], unknown)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(CYCLE * 40)
    return folder


@pytest.mark.slow
def test_a_model_that_needs_bos_gets_it(needs_bos, tmp_path):
    file = str(needs_bos / "text.txt")
    losses = evaluation.evaluate(needs_bos, text=file, tokens=42 * LENGTH)
    model = quantizing.load(needs_bos, torch.float32)
    ids = torch.tensor([2 + CYCLE.index(c) for c in CYCLE * 40]).split(LENGTH - 1)[:-1]
    batch = torch.stack([torch.cat((torch.tensor([1]), part)) for part in ids])
    with torch.no_grad():
        as_trained = _loss(model, batch[:, :-1], batch[:, 1:]).exp()
    assert losses.perplexity == pytest.approx(float(as_trained), rel=1e-5)
    # One letter in 16 follows BOS, and any may.
    assert losses.perplexity < 1.3
    without = shutil.copytree(needs_bos, tmp_path / "without")
    tokenizer = Tokenizer.from_file(str(without / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tokenizer.save(str(without / "tokenizer.json"))
    assert evaluation.evaluate(without, text=file, tokens=320).perplexity > 20


def test_calibration_reads_bos_too(needs_bos):
    asked = Calibration(text=str(needs_bos / "text.txt"), tokens=64)
    evidence = gather(Checkpoint.open(needs_bos), frozenset({"moments"}), asked)
    assert evidence.replay is not None
    windows = evidence.replay.windows
    assert (windows[:, 0] == 1).all() and (windows[:, 1:] > 1).all()
    assert evidence.provenance["tokens"] == 64
    assert evidence.replay.tokens == 4 * (LENGTH - 1)


def test_special_tokens_are_read_but_not_scored():
    model = tiny_model("mixtral")
    ids = torch.randint(4, 64, (4, 10), generator=torch.Generator().manual_seed(0))
    ids[:, :2] = torch.tensor([3, 1])
    windows = Windows(ids=ids, prefix=2)
    replay = Replay(model, walk(model), windows)
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, 2:], reduction="none"
    )
    np.testing.assert_allclose(replay.measure().nll, expected.mean(1), rtol=1e-5)
    assert (replay.span, replay.tokens) == (9, 4 * 8)


def test_layer_by_layer_is_the_same_with_special_tokens(saved, tmp_path):
    source = Checkpoint.open(saved(tmp_path / "model"))
    ids = torch.randint(4, 4096, (3, 12), generator=torch.Generator().manual_seed(1))
    windows = Windows(ids=ids, prefix=3)
    model = quantizing.load(source.folder, torch.float32)
    whole = calibrate(model, walk(model), windows)
    alone = calibrate_by_layer(Skeleton(source), windows)
    for number, layer in whole.layers.items():
        assert alone.layers[number].gain == pytest.approx(layer.gain, rel=1e-3)
        assert alone.layers[number].tokens == layer.tokens == 3 * 11
