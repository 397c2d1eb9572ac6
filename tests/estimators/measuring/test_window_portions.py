"""Work that does not fit into a device's memory goes on in smaller batches, to the same end."""

import numpy as np
import pytest
import torch

from bitknap.allocation import formats
from bitknap.errors import BitknapWarning, DeviceMemoryError
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.measuring import language_model
from bitknap.estimators.measuring import windows as reading
from bitknap.estimators.measuring.kl_replay import Replay, compare
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import tiny_model
from bitknap.testing.evidence import random_windows

OPTIONS = formats((2, 4), "row")
MADE = (Fisher(), Calibrated(), Measured(kind="layer"))
TEXT = random_windows(6)
EVERYTHING = Recorded(full=True, curvature=True, traces=True, gradients=True, streams=True)


@pytest.fixture
def room(monkeypatch):
    """Return a function that sets how many windows a device has memory for at a time."""
    whole = language_model.token_logits
    most = [10**9]

    def token_logits(model, given):
        try:
            return whole(model, given)
        finally:  # a layer has recorded, and a stream may have ended, when the memory is full
            if max(map(len, given.values())) > most[0]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(reading, "token_logits", token_logits)
    return lambda windows: most.__setitem__(0, windows)


def in_memory(folder):
    model = tiny_model("mixtral", hidden_size=32)
    return calibrate(model, walk(model), TEXT, EVERYTHING)


def by_layer(folder):
    tiny_model("mixtral", hidden_size=32).save_pretrained(folder)
    skeleton = Skeleton(Checkpoint.open(folder))
    journal = Readings.open(folder / "journal", {})
    return calibrate_by_layer(skeleton, TEXT, EVERYTHING, readings=journal)


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [in_memory, by_layer])
def test_smaller_batches_give_the_same(calibrated, room, tmp_path):
    one = calibrated(tmp_path / "one")
    tables = [made.estimate(one, OPTIONS) for made in MADE]
    room(1)
    with pytest.warns(BitknapWarning) as said:
        other = calibrated(tmp_path / "other")
    assert [str(told.message) for told in said] == [
        "cpu: out of memory with 6 windows of 16 tokens at a time; going on with 3",
        "cpu: out of memory with 3 windows of 16 tokens at a time; going on with 1",
    ]
    for number, layer in one.layers.items():
        mine = other.layers[number]
        assert mine.tokens == layer.tokens == 6 * 15
        assert torch.equal(mine.count, layer.count)
        for name in ("input_square", "input_full", "middle_full"):
            ours, theirs = getattr(mine, name).float(), getattr(layer, name).float()
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dict(mine.curvature), dict(layer.curvature))
        assert mine.gain == pytest.approx(layer.gain, rel=1e-3)
        for name in ("hidden", "index", "gradient"):
            ours, theirs = (getattr(x.traces[number], name) for x in (other, one))
            torch.testing.assert_close(ours, theirs)
    again = [made.estimate(other, OPTIONS) for made in MADE]
    for table, expected in zip(again, tables, strict=True):
        np.testing.assert_allclose(table.cost, expected.cost, rtol=1e-3)


def test_a_replay_that_no_longer_fits_is_cut(room):
    model = tiny_model("mixtral")
    replay = Replay(model, walk(model), TEXT)
    reference = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj *= 1.5
    expected = replay.measure(1), compare(model, reference, TEXT)
    drawn = []
    room(2)
    with pytest.warns(BitknapWarning):
        found = replay.kl_by_window(1, again=lambda: drawn.append(1))
    assert drawn == [1, 1]
    np.testing.assert_allclose(found, expected[0].kl, rtol=1e-4)
    assert replay.measure(1).kl == pytest.approx(found, rel=1e-4)
    replay.rebase("changed")
    assert replay.kl(1) == pytest.approx(found.mean(), rel=1e-4)
    assert compare(model, reference, TEXT).nll == pytest.approx(expected[1].nll, rel=1e-5)


@pytest.mark.parametrize("calibrated", [in_memory, by_layer])
def test_one_window_that_does_not_fit_is_refused(calibrated, room, tmp_path):
    room(0)
    message = (
        r"^cpu: out of memory with one window of 16 tokens at a time; compute with `device=cpu`"
    )
    with pytest.raises(DeviceMemoryError, match=message), pytest.warns(BitknapWarning):
        calibrated(tmp_path)
