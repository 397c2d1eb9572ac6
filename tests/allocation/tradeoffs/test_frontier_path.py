"""The whole Lagrangian path: proven at its breakpoints, a lower bound between them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import Budget, CostTable, Limit, Problem, formats, profile, solve
from bitknap.allocation.solvers.greedy import Greedy
from bitknap.allocation.tradeoffs.frontier_path import Frontier, frontier
from bitknap.errors import FileError, InfeasibleError, InputError
from bitknap.testing import routed_units

COST = [[9.0, 4.0, 1.0], [5.0, 3.0, 0.0]]
NBYTES = [[1, 2, 4], [1, 2, 3]]


@st.composite
def tables(draw):
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    size = rows * width
    costs = st.integers(0, 50).map(float) | st.just(float("inf"))
    cost = np.array(draw(st.lists(costs, min_size=size, max_size=size))).reshape(rows, width)
    cost[np.isinf(cost).all(axis=1), 0] = 1.0
    nbytes = draw(st.lists(st.integers(1, 20), min_size=size, max_size=size))
    return CostTable.from_arrays(cost, np.reshape(nbytes, (rows, width)))


def model(layers=2, experts=3):
    """Units with shapes and real formats, the costs of errors that fall with bits."""
    units = routed_units(layers, experts, ("gate", "up", "down"), rows=64, cols=128)
    chosen = formats((1, 2, 3, 4, 8), 64, True)
    scale = np.random.default_rng(0).lognormal(0, 1, (len(units), 1))
    cost = scale * 4.0 ** -np.array([item.bits for item in chosen])
    given = {"model": "m", "estimator": "made up", "fixed_bytes": 100, "source_bytes": 500_000}
    return CostTable.from_arrays(cost, units=units, formats=chosen, provenance=given)


def test_the_steps_of_a_small_table():
    # Gains a byte: 5 and 1.5 for the first unit; 2 and 3 for the second, joined to 2.5.
    found = frontier(CostTable.from_arrays(COST, NBYTES))
    assert found.start.tolist() == [0, 0]
    assert found.row.tolist() == [0, 1, 0]
    assert found.format.tolist() == [1, 2, 2]
    assert found.nbytes.tolist() == [2, 3, 5, 7]
    assert found.cost.tolist() == [14, 9, 4, 1]


@settings(max_examples=60, deadline=None)
@given(tables())
def test_every_breakpoint_is_optimal_at_its_own_bytes(table):
    found = frontier(table)
    for size, cost in zip(found.nbytes.tolist(), found.cost.tolist(), strict=True):
        best = solve(Problem(table, Budget.bytes(size)))
        assert best.cost == pytest.approx(cost)
        plan = found.plan(size)
        assert plan.total_bytes == size
        chosen = table.cost[np.arange(len(plan.choice)), plan.choice].sum()
        assert chosen == pytest.approx(cost)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(1, 130))
def test_the_line_between_breakpoints_is_a_lower_bound(table, size):
    found = frontier(table)
    if size < found.nbytes[0]:
        assert found.bound_at(size) == np.inf
        with pytest.raises(InfeasibleError):
            found.plan(size)
        return
    best = solve(Problem(table, Budget.bytes(size)))
    assert found.bound_at(size) <= best.cost + 1e-9
    assert best.cost <= found.plan(size).header["objective"] + 1e-9


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(1, 130))
def test_greedy_is_the_frontier_cut_at_the_budget(table, size):
    try:
        plan = frontier(table).plan(size)
    except InfeasibleError:
        return
    other = solve(Problem(table, Budget.bytes(size)), Greedy())
    assert plan.choice.tolist() == other.choice.tolist()
    assert plan.header["objective"] == pytest.approx(other.cost)
    assert plan.header["bound"] == pytest.approx(other.bound)


def test_ties_and_pins_hold_in_every_plan():
    table = model().tie(profile("expert")).pin("layer=1,expert=2", bits=8)
    found = frontier(table)
    assert len(found.start) == 6
    for size in np.linspace(found.nbytes[0], found.nbytes[-1], 7).astype(int).tolist():
        bits = np.array([table.formats[i].bits for i in found.plan(size).choice]).reshape(6, 3)
        assert (bits == bits[:, :1]).all()
        assert (bits[5] == 8).all()


def test_a_plan_knows_where_it_comes_from():
    found = frontier(model())
    plan = found.plan(Budget.bits(2.5))
    assert plan.bpw <= 2.5
    assert plan.model == "m"
    limit = int(2.5 * found.weights / 8)
    assert dict(plan.header) == {
        "estimator": "made up",
        "solver": "frontier",
        "objective": plan.header["objective"],
        "bound": found.bound_at(limit),
        "limits": {"memory": limit},
    }
    assert found.plan(Budget.share(0.1)).total_bytes <= 50_000 - 100


def test_a_budget_below_the_smallest_plan():
    with pytest.raises(InfeasibleError, match="memory: smallest plan needs 2 B, limit is 1 B;"):
        frontier(CostTable.from_arrays(COST, NBYTES)).plan(1)


def test_points_are_spread_in_bytes():
    found = frontier(model(4, 16))
    points = found.points(10)
    assert 2 <= len(points) <= 10
    assert points[0].nbytes == found.nbytes[0]
    assert points[-1].nbytes == found.nbytes[-1]
    assert points[-1].bits_per_weight == pytest.approx(8.25)
    steps = np.diff([point.nbytes for point in points])
    assert steps.max() < 2 * steps.min()
    assert len(found.points(10_000)) == len(found.nbytes)
    assert frontier(CostTable.from_arrays(COST, NBYTES)).points()[0] == (None, 2, 14.0)
    with pytest.raises(InputError, match="points: 1 is below 2"):
        found.points(1)


def test_a_problem_of_bytes_alone():
    table = CostTable.from_arrays(COST, NBYTES)
    assert frontier(Problem(table, Budget.bytes(3))).nbytes.tolist() == [2, 3, 5, 7]
    reads = Limit("reads", np.ones((2, 3)), 5)
    with pytest.raises(InputError, match="the limit reads is not on the table's bytes"):
        frontier(Problem(table, [Budget.bytes(3), reads]))


def test_a_table_with_one_format_is_one_plan():
    found = frontier(CostTable.from_arrays([[3.0], [4.0]], [[1], [2]]))
    assert found.points() == ((None, 3, 7.0),)
    assert found.plan(5).choice.tolist() == [0, 0]
    assert found.bound_at(10) == 7


# The file


@pytest.mark.parametrize("table", [model(), CostTable.from_arrays(COST, NBYTES)])
def test_a_saved_frontier_gives_the_same_plans(table, tmp_path):
    first = frontier(table)
    first.save(tmp_path / "f.json")
    second = Frontier.load(tmp_path / "f.json")
    for name in ("unit_bytes", "row_of", "start", "row", "format", "nbytes", "cost"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert first.header == second.header
    for size in (first.nbytes[0], first.nbytes[1], first.nbytes[-1] + 5):
        one, two = first.plan(int(size)), second.plan(int(size))
        assert one.header == two.header
        assert one.choice.tolist() == two.choice.tolist()
    second.save(tmp_path / "g.json")
    assert (tmp_path / "f.json").read_bytes() == (tmp_path / "g.json").read_bytes()


def test_the_file_has_points_for_people(tmp_path):
    found = frontier(model())
    found.save(tmp_path / "f.json")
    content = json.loads((tmp_path / "f.json").read_text())
    assert content["format"] == "bitknap.frontier"
    assert content["version"] == "1.0"
    assert content["unit_bytes"] is None
    assert content["points"][0] == {
        "bits_per_weight": found.points()[0].bits_per_weight,
        "bytes": int(found.nbytes[0]),
        "cost": found.cost[0],
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "bitknap.plan"}, "format: 'bitknap.plan' is not 'bitknap.frontier'"),
        ({"version": "2.0"}, "version: 2.0 cannot be read"),
        ({"steps": []}, "steps: must be an object, not a list; make the frontier again"),
        ({"start": [0, "a"]}, "start: must be a list of whole numbers"),
        ({"start": [0, 9]}, "start: 9 is outside 0 to 2"),
        ({"start": [0, 0.5]}, "start: must be a list of whole numbers"),
        ({"row_of": [0, 1, 1]}, "row_of: shape (3,), expected (2,)"),
        ({"row_of": [[0], [1, 2]]}, "row_of: must be a list of whole numbers"),
        ({"formats": ["option-0", "option-1", "int9"]}, "format 'int9' is unknown"),
        ({"unit_bytes": [[1, 2]]}, "unit_bytes: shape (1, 2), expected (2, 3)"),
        ({"unit_bytes": None}, "unit_bytes: missing, but some formats have no size"),
        ({"projections": None}, "projections: must be a list, not null"),
    ],
)
def test_a_damaged_file_names_the_field(change, words, tmp_path):
    path = tmp_path / "f.json"
    frontier(CostTable.from_arrays(COST, NBYTES)).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileError) as error:
        Frontier.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)


def test_what_is_no_frontier(tmp_path):
    path = tmp_path / "f.json"
    with pytest.raises(FileError, match="cannot be read"):
        Frontier.load(path)
    path.write_text("[]")
    with pytest.raises(FileError, match="must be a JSON object"):
        Frontier.load(path)
    for size, words in (
        ([3, 2], r"nbytes: shape \(2,\), expected \(1,\)"),
        ([3], r"steps.bytes\[0\]: 3, but the units add up to 2"),
    ):
        steps = {"row": [], "format": [], "bytes": size, "cost": [1.0]}
        frontier(CostTable.from_arrays(COST, NBYTES)).save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": steps}))
        with pytest.raises(FileError, match=words):
            Frontier.load(path)
