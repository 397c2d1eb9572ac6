"""Gradients caught one decoder layer at a time: those of the whole model, also after kills."""

import functools

import numpy as np
import pytest
import torch

from bitknap.allocation import formats
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.measuring import kl_replay
from bitknap.estimators.measuring.drawn_loss import drawn_labels
from bitknap.estimators.measuring.readings import Readings, folder_of
from bitknap.estimators.sparse.on_demand import Sampled
from bitknap.estimators.sweep import backward_sweep, in_memory, layer_by_layer, text_stream
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.runtime import loading
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import tiny_model
from bitknap.testing.evidence import origin_of

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "qwen3_next", "longcat_flash")
OPTIONS = formats((2, 4), (16,), (False,), ("fp16",))
GRADIENTS = Recorded(curvature=True, gradients=True, trace_tokens=100)


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    for module in (in_memory, layer_by_layer, kl_replay):
        monkeypatch.setattr(module, "BATCH_TOKENS", 70)


def stored(folder, family="mixtral", **changes):
    tiny_model(family, **changes).save_pretrained(folder)
    return Checkpoint.open(folder)


def windows():
    return torch.randint(3, 60, (5, 33), generator=torch.Generator().manual_seed(1))


def in_one_piece(source, recorded=GRADIENTS):
    model = loading.load(source.folder, torch.float32)
    return calibrate(model, walk(model), windows(), recorded)


def close(one, other):
    """Assert that two tensors differ by 1e-5 of their size at most."""
    assert float((one - other).norm()) <= 1e-5 * float(one.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_gradients_as_in_memory(family, tmp_path):
    source = stored(tmp_path, family)
    one, other = in_one_piece(source), calibrate_by_layer(Skeleton(source), windows(), GRADIENTS)
    assert list(other.layers) == list(one.layers)
    for number, layer in one.layers.items():
        mine = other.layers[number]
        assert mine.gain == pytest.approx(layer.gain, rel=1e-3)
        assert mine.curvature.keys() == layer.curvature.keys()
        for name, squares in layer.curvature.items():
            assert squares.sum() > 0
            close(squares, mine.curvature[name])
        trace, same = one.traces[number], other.traces[number]
        assert trace.gradient is not None
        assert same.gradient is not None
        assert len(same.gradient) == len(same.hidden) == 100
        close(trace.gradient, same.gradient)


ESTIMATORS = (
    *(Fisher(), Fisher("output"), Sampled(measurements=20, base=None)),
    *(Measured(), Measured(kind="layer"), Measured(kind="layer", squared=True)),
    *(Measured(kind="block"), Measured(kind="block", squared=True)),
)


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory):
    """Return evidence in memory and layer by layer of a family, with all that estimators need."""
    needs = frozenset().union(*(estimator.needs for estimator in ESTIMATORS))

    @functools.cache
    def of(family):
        source = stored(tmp_path_factory.mktemp(family), family)
        recorded = Recorded.of(needs)
        return in_one_piece(source, recorded), calibrate_by_layer(
            Skeleton(source), windows(), recorded
        )

    return of


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "estimator", ESTIMATORS, ids=lambda e: f"{e.name}{' squared' * getattr(e, 'squared', False)}"
)
def test_the_same_table_in_both_ways(estimator, family, both_ways):
    one, other = (estimator.estimate(evidence, OPTIONS) for evidence in both_ways(family))
    tight = not isinstance(estimator, Sampled) and "kl" not in estimator.name
    np.testing.assert_allclose(other.cost, one.cost, rtol=1e-5 if tight else 1e-3)
    assert origin_of(other.provenance) == origin_of(one.provenance)


def test_a_batchs_labels_are_those_that_torch_draws():
    logits = torch.randn(12, 40, generator=torch.Generator().manual_seed(3))
    one, other = (torch.Generator().manual_seed(7) for _ in range(2))
    expected = torch.multinomial(logits.softmax(-1), 1, generator=one)[:, 0]
    race = torch.empty_like(logits).exponential_(generator=other)
    assert torch.equal(drawn_labels(logits, race), expected)
    assert torch.equal(one.get_state(), other.get_state())


def test_the_noise_of_gains_is_drawn_after_the_labels(tmp_path):
    source = stored(tmp_path)
    plain = calibrate_by_layer(Skeleton(source), windows())
    for number, layer in calibrate_by_layer(Skeleton(source), windows(), GRADIENTS).layers.items():
        assert layer.gain != plain.layers[number].gain


def test_progress_goes_from_the_last_layer_to_the_first_with_experts(tmp_path):
    said = []
    source = stored(tmp_path, "deepseek_v2", num_hidden_layers=3)
    calibrate_by_layer(
        Skeleton(source),
        windows(),
        Recorded(curvature=True),
        progress=lambda *told: said.append(told),
    )
    assert [told for told in said if told[0] == "gradients"] == [
        ("gradients", done, 2)
        for done in range(2)  # the first layer of three is dense
    ]


def test_gradients_in_half_the_disk(tmp_path):
    source = stored(tmp_path)
    one = calibrate_by_layer(Skeleton(source), windows(), Recorded(curvature=True))
    half = calibrate_by_layer(
        Skeleton(source), windows(), Recorded(curvature=True, spilled=torch.bfloat16)
    )
    for number, layer in one.layers.items():
        for name, squares in layer.curvature.items():
            rough = half.layers[number].curvature[name]
            assert 0 < float((rough - squares).norm()) < 0.1 * float(squares.norm())


def test_no_parameter_is_left_with_a_graph(tmp_path):
    model = tiny_model("mixtral")
    frozen = next(model.parameters()).requires_grad_(False)
    calibrate(model, walk(model), windows(), GRADIENTS)
    for parameter in model.parameters():
        assert parameter.requires_grad is (parameter is not frozen)
        assert parameter.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "longcat_flash"])
def test_a_backward_sweep_stopped_anywhere_goes_on(family, tmp_path, stopped_often):
    source, path = stored(tmp_path / "model", family), tmp_path / "work" / "journal"

    def found(readings=None):
        return calibrate_by_layer(Skeleton(source), windows(), GRADIENTS, readings=readings)

    whole, places = (
        found(),
        [
            (text_stream.Streamed, "_run"),
            (backward_sweep.BackwardSweep, "_of_batch"),
            (layer_by_layer, "batch_divergences"),
        ],
    )
    # A step is three batches: each time one is done, and the next is begun.
    again, stops = stopped_often(places, lambda: found(Readings.open(path, {})))
    assert stops > 3
    kept, _ = stopped_often(places, lambda: found(Readings.open(path, {})), calls=0)
    for other in (again, kept):
        for number, layer in whole.layers.items():
            mine = other.layers[number]
            assert mine.gain == layer.gain
            for name, squares in layer.curvature.items():
                assert torch.equal(mine.curvature[name], squares)
            trace, same = whole.traces[number], other.traces[number]
            assert torch.equal(trace.hidden, same.hidden)
            assert torch.equal(trace.gradient, same.gradient)
    assert not list(folder_of(path).glob("*.bin"))  # streams go when nobody will go on from them
