from typing import Any

import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, Problem, formats, profile, solve
from bitknap.allocation.problem.device_memory import Device
from bitknap.allocation.problem.serving import CacheLayers, Serving
from bitknap.errors import FileError, InfeasibleError, InputError
from bitknap.testing import routed_units

MIB = 1 << 20
GROUPED = CacheLayers(kind="grouped", layers=2, per_token=256)
NEEDS = Serving(
    family="toy",
    longest=4096,
    cache=(GROUPED, CacheLayers(kind="window", layers=3, per_token=256, window=127)),
    hidden=64,
    vocabulary=1000,
    heads=64,
    expanded=128,
    middle=96,
    routed=192,
    topk=2,
    experts=4,
    expert_weights=4 * 2 * 64 * 96,
    dense_from=4 * 320,
)


def table(needs: Serving | None = NEEDS, **said: Any) -> CostTable:
    units = routed_units(2, 4, ("gate", "up", "down"), rows=1024, cols=1024)
    options = formats((2, 3, 4), 64, True)
    cost = np.tile([0.3, 0.2, 0.1], (len(units), 1))
    if needs is not None:
        said["serving"] = needs.to_dict()
    provenance = {"fixed_bytes": 5 * MIB, **said}
    return CostTable.from_arrays(cost, units=units, formats=options, provenance=provenance)


def test_caches_grow_up_to_their_window_or_not_at_all():
    state = CacheLayers(kind="state", layers=1, state=10, state32=5)
    assert GROUPED.layer_bytes(1000, 2) == 2 * 256 * 1000
    assert NEEDS.cache[1].layer_bytes(1000, 2) == 2 * 256 * 127
    assert state.layer_bytes(1, 2) == state.layer_bytes(1000, 2) == 20 + 20
    assert NEEDS.cache_bytes(1000, 3) == 3 * 2 * 256 * (2 * 1000 + 3 * 127)


def test_a_plan_leaves_room_for_everything_else():
    budget = Budget.device(1100 * MIB, context=1000)
    costs = table()
    solution = solve(Problem(costs, budget))
    ledger = budget.ledger(costs, solution.choice)
    assert ledger["weights of units"] == solution.used["memory"]
    assert ledger["cache"] == NEEDS.cache_bytes(1000)
    assert ledger["weights kept"] == 5 * MIB
    others = [size for name, size in ledger.items() if name not in ("device", "left")]
    assert sum(others) + ledger["left"] == ledger["device"] == 1100 * MIB
    assert ledger["left"] >= 0
    # A longer context or more sequences leave less for weights.
    longer = Budget.device(1100 * MIB, context=3000).limit(costs).bound
    more = Budget.device(1100 * MIB, context=1000, batch=4).limit(costs).bound
    assert max(longer, more) < budget.limit(costs).bound


def test_tiles_of_kernels_count_on_a_gpu_alone():
    needs = Serving(**{**_fields(NEEDS), "tiles": {"1024x1024": {"int2-g64-sym": 1000}}})
    costs = table(needs)
    gpu = Budget.device("2GiB", context=10).limit(costs).weight
    cpu = Budget.device("2GiB", context=10, kind="cpu").limit(costs).weight
    assert (gpu - costs.nbytes).max(0).tolist() == [1000, 0, 0]
    assert np.array_equal(cpu, costs.nbytes)


def test_what_does_not_fit_says_what_would():
    costs = table().tie(profile("expert"))
    device = Budget.device("1100MiB", context=4096, batch=8)
    with pytest.raises(InfeasibleError, match="take one of at least") as error:
        Problem(costs, device)
    said = str(error.value)
    assert "at a context of 4,096 tokens" in said
    context = int(said.rpartition("at most ")[2].split()[0].replace(",", ""))
    Problem(costs, Budget.device("1100MiB", context=context, batch=8))
    with pytest.raises(InfeasibleError):
        Problem(costs, Budget.device("1100MiB", context=context + 1, batch=8))
    with pytest.raises(InfeasibleError) as error:
        Problem(costs, Budget.device("1MiB", context=10))
    assert "context of at most" not in str(error.value)


def test_the_least_device_does_fit():
    costs = table().pin("layer=0", bits=4).tie(profile("layer"))
    with pytest.raises(InfeasibleError) as error:
        Problem(costs, Budget.device("1MiB", context=100))
    needed = int(str(error.value).partition("(")[2].partition(" bytes")[0].replace(",", ""))
    # Layer 0 is pinned to the widest format, and layer 1 may have the narrowest.
    units = int(costs.nbytes[:12, 2].sum() + costs.nbytes[12:, 0].sum())
    rest = Device(size=1, context=100).entries(NEEDS, 5 * MIB, costs.units)
    assert needed == units + sum(rest.values())
    plan = solve(Problem(costs, Budget.device(needed, context=100))).plan
    assert plan.total_bytes == units
    with pytest.raises(InfeasibleError):
        Problem(costs, Budget.device(needed - 1, context=100))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: table(None), "does not say what its model needs beside weights; estimate again"),
        (lambda: table(Serving(family="odd", unknown="why")), "cache of odd is not known (why)"),
        (lambda: table(None, serving={"family": "x", "cache": 3}), "not what Bitknap writes"),
    ],
)
def test_tables_that_cannot_say_are_refused(make, message):
    with pytest.raises(InputError) as error:
        Problem(make(), Budget.device("2GiB", context=10))
    assert message in str(error.value)


def test_a_model_can_say_what_an_old_table_does_not():
    budget = Budget.device("2GiB", context=10, needs=NEEDS)
    assert Problem(table(None), budget).bounds[0] > 0


def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(InputError, match="4,097 tokens are more than the 4,096"):
        Problem(table(), Budget.device("2GiB", context=4097))


@pytest.mark.parametrize("text", ["24GiB@32768", "24GiB@32768x8", "800MB@10 on cpu", "5B@1x2"])
def test_devices_are_read_as_they_are_written(text):
    budget = Budget.parse(text)
    assert str(budget) == text
    assert budget.kind == "device"
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["24@32", "x@3", "24GiB@", "24GiB@0", "24GiB@5x0", "3bpw@5"])
def test_devices_that_cannot_be_read_are_refused(text):
    with pytest.raises(InputError):
        Budget.parse(text)


def test_needs_survive_a_file(tmp_path):
    costs = table()
    costs.save(tmp_path / "t.safetensors")
    again = CostTable.load(tmp_path / "t.safetensors")
    assert Serving.from_dict(again.provenance["serving"]) == NEEDS
    bad = table(None, serving=[1])
    bad.save(tmp_path / "bad.safetensors")
    with pytest.raises(FileError, match=r"provenance\.serving"):
        CostTable.load(tmp_path / "bad.safetensors")


def _fields(needs):
    return {name: getattr(needs, name) for name in Serving.__dataclass_fields__}
