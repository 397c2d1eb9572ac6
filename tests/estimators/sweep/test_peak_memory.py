"""What calibration needs, from headers: sums by hand, and what makes it more or less."""

import pytest

from bitknap.estimators.sweep.peak_memory import peak_bytes
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import tiny_model


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("mixtral", vocab_size=4096)
    model.save_pretrained(folder)
    source = Checkpoint.open(folder)
    return model, source, walk_headers(source.config, source.shapes, ())


def peak(stored, *needs, tokens=1024):
    _, source, layout = stored
    return peak_bytes(source, layout, tokens, needs)


def test_moments_by_hand(stored):
    model, _, layout = stored
    parameters = sum(p.numel() for p in model.parameters())
    layer = layout.units.numel.sum() // 2
    # Two layers of 16 wide: their outputs and the distributions; five copies of a batch's logits.
    expected = parameters + 1024 * (2 * 16 + 4096) + 5 * 1024 * 4096 + layer
    assert peak(stored, "moments") == 4 * expected


def test_loading_counts_where_it_is_the_larger_part(stored):
    model, source, _ = stored
    parameters = sum(p.numel() for p in model.parameters())
    assert peak(stored, "moments", tokens=2) == 4 * parameters + source.nbytes


@pytest.mark.parametrize("need", ["full", "curvature", "traces", "gradients"])
def test_whatever_is_recorded_takes_more(need, stored):
    assert peak(stored, "moments", need) > peak(stored, "moments")


def test_a_batch_bounds_what_a_graph_takes(stored):
    def added(tokens):
        return peak(stored, "curvature", tokens=tokens) - peak(stored, "moments", tokens=tokens)

    assert added(2048) == added(4096) > added(1024)
