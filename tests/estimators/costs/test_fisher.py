"""Fisher costs in weight space and in output space, by hand on a tiny model."""

import numpy as np
import pytest
import torch

from bitknap.allocation import Format
from bitknap.errors import InputError
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.fisher import Fisher, row_costs
from bitknap.estimators.evidence.evidence import PRIOR_TOKENS
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.methods import round_trip
from bitknap.quantization.stacks.apply import replaced
from bitknap.quantization.stacks.grouping import stacks
from bitknap.testing import tiny_model
from bitknap.testing.evidence import UNSEEN, lopsided_case, random_windows

FORMATS = (Format(2, 8), Format(3, 0), Format(4, 8), Format.keep("fp32"))


@pytest.fixture(scope="module")
def case():
    return lopsided_case(Recorded(curvature=True, gradients=True))


def constant(value):
    return lambda _: value


def test_names_and_needs():
    assert Fisher().name == "fisher"
    assert Fisher().needs == {"curvature"}
    assert Fisher("output").name == "fisher-output"
    assert Fisher("output").needs == {"traces", "gradients"}
    with pytest.raises(InputError, match="'both' is unknown; one of weight, output"):
        Fisher("both")  # type: ignore[arg-type]


def test_output_costs_are_half_the_squared_gradient_times_the_squared_change(case):
    # Δz by running the model's own experts module with one matrix rounded.
    evidence, model, layout = case.evidence, case.model, case.layout
    cost = Fisher("output").estimate(evidence, FORMATS).cost
    format, units = FORMATS[0], layout.units
    for run in stacks(units):
        number = int(units.layer[run[0]])
        layer = next(x for x in layout.layers if x.layer == number)
        experts, trace = model.get_submodule(layer.module), evidence.traces[number]
        call = (trace.hidden, trace.index, trace.weights)
        total = np.zeros(5)
        with torch.no_grad():
            before = experts(*call)
            for unit in run:
                with replaced(model, layout, [unit], lambda w: round_trip(w, format)):
                    change = (experts(*call) - before).double()
                total[units.expert[unit]] = float((trace.gradient.double() * change).square().sum())
        count = evidence.layers[number].count.numpy()
        mean = (total + PRIOR_TOKENS * total.sum() / count.sum()) / (count + PRIOR_TOKENS)
        share = (count + PRIOR_TOKENS / 5) / (len(trace.hidden) + PRIOR_TOKENS)
        np.testing.assert_allclose(cost[run, 0], (0.5 * mean * share)[units.expert[run]], rtol=1e-3)
    assert not cost[:, -1].any()


@pytest.mark.parametrize("space", ["weight", "output"])
def test_an_unseen_expert_has_its_share_of_the_layers_mean(case, space):
    table = Fisher(space).estimate(case.evidence, FORMATS)
    unseen = case.layout.units.expert == UNSEEN
    assert (table.cost[unseen, :3] > 0).all()
    assert table.cost[unseen, 0].max() < np.median(table.cost[~unseen, 0])
    assert table.provenance["unit"] == "nats/token"
    assert table.provenance["estimator"] == Fisher(space).name


def test_both_spaces_rank_as_the_measured_kl(case):
    seen = case.layout.units.expert != UNSEEN
    kl = Measured().estimate(case.evidence, FORMATS[:1]).cost[seen, 0]
    for space in ("weight", "output"):
        cost = Fisher(space).estimate(case.evidence, FORMATS[:1]).cost[seen, 0]
        ranks = np.stack([np.argsort(np.argsort(x)) for x in (cost, kl)]).astype(float)
        assert np.corrcoef(ranks)[0, 1] > 0.6, space


@pytest.mark.parametrize("space", ["weight", "output"])
def test_rows_sum_to_their_unit(case, space):
    table = Fisher(space).estimate(case.evidence, FORMATS)
    units = case.layout.units
    for run in stacks(units):
        if space == "output" and units.projections[units.projection[run[0]]] != "down":
            with pytest.raises(
                InputError, match="effects of its rows cannot be separated; use space='weight'"
            ):
                row_costs(case.evidence, FORMATS, run, space)
            continue
        rows = row_costs(case.evidence, FORMATS, run, space)
        assert rows.shape == (len(run), units.rows[run[0]], len(FORMATS))
        assert rows.dtype == np.float64
        np.testing.assert_allclose(rows.sum(1), table.cost[run], rtol=1e-4)


def test_rows_of_down_are_the_coordinates_of_the_output(case):
    # One row rounded alone moves one coordinate alone, so its unit costs what the row costs.
    units, evidence = case.layout.units, case.evidence
    down = units.projections.index("down")
    run = next(r for r in stacks(units) if units.projection[r[0]] == down)
    rows = row_costs(evidence, FORMATS[:1], run, "output")[:, :, 0]
    weights = evidence.weights(run)
    only = weights.clone()
    only[:, 3] = round_trip(weights, FORMATS[0])[:, 3]
    layer = evidence.layers[0]
    trace = evidence.traces[0]
    experts = case.model.get_submodule(case.layout.layers[0].module)
    call = (trace.hidden, trace.index, trace.weights)
    total = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        before = experts(*call)
        for i, unit in enumerate(run):
            with replaced(case.model, case.layout, [unit], constant(only[i : i + 1])):
                change = (experts(*call) - before).double()
            assert not change[:, torch.arange(16) != 3].any()
            total[units.expert[unit]] = 0.5 * (trace.gradient * change).square().sum()
    found = layer.shrunk(total)[units.expert[run]]
    np.testing.assert_allclose(rows[:, 3], found.numpy(), rtol=1e-3)


def test_what_was_not_recorded_is_asked_for(case):
    bare = calibrate(case.model, case.layout, case.windows[:1], Recorded(traces=True))
    with pytest.raises(InputError, match="calibrate with gradients=True"):
        Fisher("output").estimate(bare, FORMATS)
    with pytest.raises(InputError, match="calibrate with curvature=True"):
        row_costs(bare, FORMATS, stacks(case.layout.units)[0])


def test_other_roles_are_refused():
    model = tiny_model("mixtral")
    layout = walk(model, ("attention",))
    windows = random_windows(2)
    evidence = calibrate(model, layout, windows, Recorded(gradients=True))
    with pytest.raises(InputError, match="routed experts only"):
        Fisher("output").estimate(evidence, FORMATS)
