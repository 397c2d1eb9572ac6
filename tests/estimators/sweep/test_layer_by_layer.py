"""A model calibrated one decoder layer at a time: the same evidence as in one piece."""

import errno
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from bitknap.allocation import formats
from bitknap.api.estimation import estimate
from bitknap.api.requests import Calibration
from bitknap.errors import FileError, InputError, ModelError
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.measuring import kl_replay
from bitknap.estimators.measuring.readings import Readings, folder_of, forget
from bitknap.estimators.sweep import (
    finished_layers,
    layer_by_layer,
    text_stream,
)
from bitknap.estimators.sweep import in_memory as whole_pass
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.peak_memory import layer_bytes
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.runtime import loading
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.testing import tiny_model
from bitknap.testing.evidence import origin_of

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "qwen3_next", "longcat_flash")
INCLUDE = ("attention", "shared", "dense")


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    for module in (whole_pass, layer_by_layer, kl_replay):
        monkeypatch.setattr(module, "BATCH_TOKENS", 70)


def stored(folder, family="mixtral", **changes):
    tiny_model(family, **changes).save_pretrained(folder)
    return Checkpoint.open(folder)


def windows(count=5):
    return torch.randint(3, 60, (count, 33), generator=torch.Generator().manual_seed(1))


def both(source, include=(), **recorded):
    model = loading.load(source.folder, torch.float32)
    one = calibrate(model, walk(model, include), windows(), Recorded(**recorded))
    return one, calibrate_by_layer(Skeleton(source, include), windows(), Recorded(**recorded))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_evidence(family, tmp_path):
    one, other = both(stored(tmp_path, family), INCLUDE, full=True, traces=True)
    assert other.replay is None
    assert origin_of(other.provenance) == origin_of(one.provenance)
    assert (other.layout.views, other.layout.layers) == (one.layout.views, one.layout.layers)
    assert list(other.layers) == list(one.layers)
    names = ("input_square", "middle_square", "gate_sum", "input_full", "middle_full", "output_max")
    for number, layer in one.layers.items():
        mine = other.layers[number]
        assert torch.equal(mine.count, layer.count)
        assert mine.tokens == layer.tokens
        for name in names:
            torch.testing.assert_close(getattr(mine, name), getattr(layer, name))
        torch.testing.assert_close(dict(mine.slopes), dict(layer.slopes))
        assert mine.output_square == pytest.approx(layer.output_square, rel=1e-5)
        assert mine.gain == pytest.approx(layer.gain, rel=1e-3)
        for kept, theirs in zip(
            (other.traces[number].hidden, other.traces[number].index),
            (one.traces[number].hidden, one.traces[number].index),
            strict=True,
        ):
            torch.testing.assert_close(kept, theirs)
    assert other.linears.keys() == one.linears.keys()
    for unit, linear in one.linears.items():
        torch.testing.assert_close(other.linears[unit].input_full, linear.input_full)


def test_the_same_costs(tmp_path):
    one, other = both(stored(tmp_path))
    options = formats((2, 4), (32,), (False,), ("fp16",))
    tables = [SecondMoments().estimate(evidence, options) for evidence in (one, other)]
    assert tables[1].cost == pytest.approx(tables[0].cost, rel=1e-3)
    assert other.floor == pytest.approx(one.floor, rel=0.5)
    assert origin_of(tables[1].provenance) == origin_of(tables[0].provenance)


@pytest.mark.slow
def test_estimate_within_a_limit():
    found = Checkpoint.open(resolve("reference:qwen3moe"))
    limit = layer_bytes(found, walk_headers(found.config, found.shapes, ()), 64, {"moments"})
    options = formats((2, 4), (32,), (False,), ("fp16",))
    one, other = (
        estimate(
            found.folder,
            SecondMoments(),
            options,
            calibration=Calibration(tokens=64, max_memory=most),
        )
        for most in (None, limit)
    )
    assert other.cost == pytest.approx(one.cost, rel=1e-3)
    assert origin_of(other.provenance) == origin_of(one.provenance)


def test_a_dense_model(tmp_path):
    one, other = both(stored(tmp_path, "llama"), ("attention", "dense"))
    assert len(other.linears) == len(other.units) > 0
    for unit, linear in one.linears.items():
        torch.testing.assert_close(other.linears[unit].input_square, linear.input_square)


def test_a_tied_head(tmp_path):
    source = stored(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in source.headers
    one, other = both(source)
    for number, layer in one.layers.items():
        assert other.layers[number].gain == pytest.approx(layer.gain, rel=1e-3)


def test_half_the_disk(tmp_path):
    source = stored(tmp_path)
    one = calibrate_by_layer(Skeleton(source), windows())
    half = calibrate_by_layer(Skeleton(source), windows(), Recorded(spilled=torch.bfloat16))
    first, last = one.layers
    assert torch.equal(half.layers[first].input_square, one.layers[first].input_square)
    assert not torch.equal(half.layers[last].input_square, one.layers[last].input_square)
    assert half.layers[last].output_square == pytest.approx(one.layers[last].output_square, rel=0.1)


def test_one_layer_is_held_at_a_time(tmp_path):
    found = Skeleton(stored(tmp_path))

    def real():
        return {name for name, p in found.model.named_parameters() if not p.is_meta}

    assert real() == set()
    with found.loaded(1):
        assert real() == {n for n in found.model.state_dict() if n.startswith("model.layers.1.")}
    assert real() == set()


def test_the_evidence_holds_no_weights(tmp_path):
    weights: Any = calibrate_by_layer(Skeleton(stored(tmp_path)), windows()).weights
    assert all(p.is_meta for p in weights.__self__.model.parameters())


def test_fewer_traces(tmp_path):
    source = stored(tmp_path)
    found = calibrate_by_layer(Skeleton(source), windows(), Recorded(traces=True, trace_tokens=40))
    assert {len(trace.hidden) for trace in found.traces.values()} == {40}
    with pytest.raises(InputError, match=r"^trace_tokens: 0 is below 1; leave it out to keep all$"):
        calibrate_by_layer(Skeleton(source), windows(), Recorded(traces=True, trace_tokens=0))


def test_progress(tmp_path):
    said = []
    calibrate_by_layer(
        Skeleton(stored(tmp_path)), windows(1), progress=lambda *told: said.append(told)
    )
    assert said == [(what, i, 2) for what in ("calibrate", "gains") for i in range(2)]


def same(one, other):
    """Whether two pieces of evidence are the same to the bit."""
    assert one.floor == other.floor
    for number, layer in one.layers.items():
        mine = other.layers[number]
        assert (mine.tokens, mine.gain, mine.output_square) == (
            layer.tokens,
            layer.gain,
            layer.output_square,
        )
        for name in ("count", "gate_square", "input_square", "middle_full", "output_max"):
            assert torch.equal(getattr(mine, name), getattr(layer, name))
        assert all(torch.equal(mine.slopes[x], slope) for x, slope in layer.slopes.items())
        for name in ("hidden", "index", "weights"):
            kept = getattr(one.traces[number], name)
            assert torch.equal(kept, getattr(other.traces[number], name))
    assert other.linears.keys() == one.linears.keys()
    for unit, linear in one.linears.items():
        assert other.linears[unit].tokens == linear.tokens
        assert torch.equal(other.linears[unit].input_full, linear.input_full)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "longcat_flash"])
def test_a_pass_stopped_anywhere_goes_on(family, tmp_path, stopped_often):
    source, path = stored(tmp_path / "model", family), tmp_path / "work" / "journal"

    def found(readings=None):
        return calibrate_by_layer(
            Skeleton(source, INCLUDE),
            windows(),
            Recorded(full=True, traces=True),
            readings=readings,
        )

    whole, places = found(), [(text_stream.Streamed, "_run"), (layer_by_layer, "batch_divergences")]
    # A step is three batches: each time one is done, and the next is begun.
    again, stops = stopped_often(places, lambda: found(Readings.open(path, {})))
    assert stops > 2
    assert same(whole, again)
    kept, _ = stopped_often(places, lambda: found(Readings.open(path, {})), calls=0)
    assert same(whole, kept)
    assert not list(folder_of(path).glob("*.bin"))  # streams go when nobody will go on from them
    forget(path)
    assert list(path.parent.iterdir()) == []


def test_files_beside_a_journal_are_needed(tmp_path):
    source, path = stored(tmp_path / "model"), tmp_path / "journal"
    calibrate_by_layer(Skeleton(source), windows(), readings=Readings.open(path, {}))
    for file in folder_of(path).iterdir():
        file.write_bytes(b"no tensors")
    with pytest.raises(FileError, match=r"cannot be read .*; delete .*journal to start anew$"):
        calibrate_by_layer(Skeleton(source), windows(), readings=Readings.open(path, {}))


def test_a_file_that_was_damaged_since_is_no_finished_step(tmp_path):
    """Also where only numbers differ: a wrong sum would be a wrong cost, without a word."""
    shelf = finished_layers.Shelf.of(Readings.open(tmp_path / "journal", {}), "pass")
    stream = shelf.room("first")
    assert stream is not None
    stream.parent.mkdir()
    stream.write_bytes(b"1234")
    shelf.put("first", {"x": torch.ones(2)})
    again = finished_layers.Shelf.of(Readings.open(tmp_path / "journal", {}), "pass")
    assert again.get("first")["x"].tolist() == [1, 1]
    for file in (stream, stream.with_suffix(".safetensors")):
        content = file.read_bytes()
        for damaged in (content[:-1] + b"9", content + b"9", b""):
            file.write_bytes(damaged)
            with pytest.raises(FileError, match=r"damaged since .*; delete .*journal to start"):
                again.get("first")
        file.write_bytes(content)
    again.clear("first")
    assert again.get("first")["x"].tolist() == [1, 1]


def test_a_full_disk_under_a_shelf_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(tensors, file):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(finished_layers, "save_file", full)
    kept = finished_layers.Shelf.of(Readings.open(tmp_path / "journal", {}), "pass")
    with pytest.raises(OSError, match="No space left") as error:
        kept.put("first", {"x": torch.ones(2)})
    assert error.value.errno == errno.ENOSPC
    assert not kept.done("first")


def test_an_encoder_decoder_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r": an encoder-decoder cannot be run layer by"):
        calibrate_by_layer(Skeleton(stored(tmp_path, "switch_transformers")), windows())


def test_a_layer_that_gives_two_tensors_is_refused(tmp_path, monkeypatch):
    def twice(forward):
        return lambda *args, **kwargs: (forward(*args, **kwargs),) * 2

    source = stored(tmp_path)
    kind = type(Skeleton(source).layers[0])
    monkeypatch.setattr(kind, "forward", twice(kind.forward))
    with pytest.raises(ModelError) as caught:
        calibrate_by_layer(Skeleton(source), windows())
    assert str(caught.value) == (
        "decoder layer 0 (MixtralDecoderLayer) gives more than one tensor, so the model cannot be "
        "run layer by layer; raise `max_memory`, or use `estimator=DataFree()`"
    )


def test_a_model_that_reads_layers_far_before_is_refused(tmp_path, monkeypatch):
    source = stored(tmp_path, num_hidden_layers=3)
    kind = type(Skeleton(source).model.model)
    plain = kind.forward

    # The third layer also reads what the first one gave, which is not there any more.
    def skipping(self, *args, **kwargs):
        given = []
        hook = self.layers[0].register_forward_hook(lambda m, a, output: given.append(output))
        added = self.layers[2].register_forward_pre_hook(lambda m, a: (a[0] + given[0], *a[1:]))
        try:
            return plain(self, *args, **kwargs)
        finally:
            hook.remove()
            added.remove()

    monkeypatch.setattr(kind, "forward", skipping)
    with pytest.raises(
        ModelError, match=r"^decoder layer 2 .* it needs more than the output of the layer befor"
    ):
        calibrate_by_layer(Skeleton(source), windows())


def test_a_missing_tensor(tmp_path):
    source = stored(tmp_path)
    headers = dict(source.headers)
    del headers["model.layers.1.input_layernorm.weight"]
    broken = Checkpoint(folder=source.folder, config=source.config, headers=headers)
    with pytest.raises(FileError, match=r"model\.layers\.1\.input_layernorm\.weight of the model"):
        calibrate_by_layer(Skeleton(broken), windows())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_gains_of_a_part_of_the_text_are_alike_in_both_ways(family, tmp_path, monkeypatch):
    for module in (whole_pass, layer_by_layer):
        monkeypatch.setattr(module, "GAIN_TOKENS", 66)
    source = stored(tmp_path, family)
    one, other = both(source)
    for number, layer in one.layers.items():
        assert other.layers[number].gain == pytest.approx(layer.gain, rel=1e-3)
    (row,) = {layer.gain for n, layer in both(source, streams=True)[1].layers.items() if n == 1}
    assert row == pytest.approx(other.layers[1].gain, rel=1e-3)
