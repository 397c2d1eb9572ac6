"""A text in a checkpoint one decoder layer at a time: the losses of the model in memory."""

import errno

import numpy as np
import pytest
import torch

from bitknap.allocation import formats
from bitknap.errors import BitknapError, ModelError
from bitknap.estimators.evidence.variant_kl import Replayed
from bitknap.estimators.evidence.variants import Changing, Variant
from bitknap.estimators.judging import by_layer
from bitknap.estimators.judging.by_layer import through
from bitknap.estimators.measuring import kl_replay
from bitknap.estimators.measuring.kl_replay import Replay, compare
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.sweep import disk_tensors
from bitknap.estimators.sweep.text_stream import Streamed, losses_between
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.packed.opened import open_weights
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import packed_checkpoint, tiny_model

OPTIONS = formats((2, 4), (16,), (False,), ("fp16",))
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "qwen3_next", "longcat_flash")


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    for module in (by_layer, kl_replay):
        monkeypatch.setattr(module, "BATCH_TOKENS", 70)


def windows():
    return Windows.of(torch.randint(3, 60, (5, 33), generator=torch.Generator().manual_seed(1)))


def same(one, other):
    """Whether losses are equal but for the rounding of float32."""
    np.testing.assert_allclose(other.nll, one.nll, rtol=1e-5)
    np.testing.assert_allclose(other.kl, one.kl, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(other.top1, one.top1)
    return True


def both(model, reference):
    """Return a model's losses against a reference, in memory and layer by layer."""
    known = compare(load(model, torch.float32), load(reference, torch.float32), windows())
    passed = [through(open_weights(one), windows()).reference for one in (model, reference)]
    return known, losses_between(passed[1], passed[:1])[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_against_plain(family, tmp_path):
    out = packed_checkpoint(tmp_path, family)
    known, found = both(out, tmp_path / "source")
    assert known.kl.min() > 0
    assert same(known, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"include": ("attention", "shared"), "family": "deepseek_v2"},
        {"row_blocks": 3},
        {"dtype": torch.bfloat16},
        {"tie_word_embeddings": True},
        {"family": "llama", "include": ("attention", "dense")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_checkpoint(changes, tmp_path):
    out = packed_checkpoint(tmp_path, **changes)
    assert same(*both(out, tmp_path / "source"))
    assert same(*both(tmp_path / "source", out))


def test_one_layer_of_a_packed_checkpoint_is_decoded_at_a_time(tmp_path):
    source = open_weights(packed_checkpoint(tmp_path))
    found = through(source, windows()).run.skeleton
    assert {p.device.type for p in found.layers.parameters()} == {"meta"}
    with found.loaded(1):
        held = {n for n, p in found.layers.named_parameters() if not p.is_meta}
    assert held == {n for n, _ in found.layers.named_parameters() if n.startswith("1.")}


def test_uniform_recipes_are_variants_of_one_sweep(tmp_path):
    tiny_model("mixtral", num_hidden_layers=3).save_pretrained(tmp_path)
    model = load(tmp_path, torch.float32)
    layout = walk(model)
    late = np.flatnonzero(layout.units.layer == 1)
    variants = [
        *(Variant.group(np.arange(len(layout.units)), one) for one in OPTIONS),
        Variant.group(late, OPTIONS[0]),
        Variant.group(late[:0], OPTIONS[0]),
    ]
    changing = Changing(layout=layout)
    replay = Replay(model, layout, windows())
    known = dict(Replayed(replay).losses(variants[:-1], changing))
    sweep = through(Checkpoint.open(tmp_path), windows(), (), varied=True)
    found = dict(sweep.losses(variants, changing))
    assert found.keys() == set(range(len(variants)))
    for number, losses in known.items():
        assert losses.kl.min() > 0
        assert same(losses, found[number])
    assert not found[len(variants) - 1].kl.any()


def test_variants_that_are_alike_up_to_a_layer_are_one_stream(tmp_path, monkeypatch):
    tiny_model("mixtral", num_hidden_layers=3).save_pretrained(tmp_path)
    sweep = through(Checkpoint.open(tmp_path), windows(), (), varied=True)
    units = sweep.run.skeleton.layout.units
    every, last = np.arange(len(units)), units.layer == 2
    wide = Variant(units=every, choice=np.zeros(len(units), int), formats=OPTIONS, key="wide")
    other = Variant(units=every, choice=last.astype(int), formats=OPTIONS, key="other")
    ran, real = [], Streamed.advance

    def counted(self, place, *args):
        ran.append(place)
        return real(self, place, *args)

    monkeypatch.setattr(Streamed, "advance", counted)
    changing = Changing(layout=sweep.run.skeleton.layout)
    both_ways = dict(sweep.losses([wide, other, wide], changing))
    assert ran == [0, 1, 2, 2]
    assert both_ways[0].kl.tolist() == both_ways[2].kl.tolist() != both_ways[1].kl.tolist()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(descriptor, nbytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    tiny_model("mixtral").save_pretrained(tmp_path)
    monkeypatch.setattr(disk_tensors, "_take_room", full)
    with pytest.raises(BitknapError, match=r"no room for [\d,]+ bytes of activations on the disk"):
        through(Checkpoint.open(tmp_path), windows())


def test_a_layer_that_cannot_run_alone_is_named(tmp_path, monkeypatch):
    tiny_model("mixtral").save_pretrained(tmp_path)
    kind = type(load(tmp_path).model.layers[0])
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **more: (plain(*args, **more),) * 2)
    with pytest.raises(ModelError) as caught:
        through(Checkpoint.open(tmp_path), windows())
    assert str(caught.value) == (
        "decoder layer 0 (MixtralDecoderLayer) gives more than one tensor, so the model cannot be "
        "run layer by layer; raise `max_memory`"
    )
