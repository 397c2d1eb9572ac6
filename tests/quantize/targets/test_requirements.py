"""What targets require: formats, ties, and plans that are raised to both."""

import re

import numpy as np
import pytest

from bitknap.allocation import BitPlan, CostTable, Format, Units, formats, profile
from bitknap.errors import InputError, MismatchError
from bitknap.quantization.targets.catalog import TARGETS, target_of, targets
from bitknap.quantization.targets.requirements import allowed, coarsened, restricted

MLX = target_of("mlx")
GRIDS = formats((1, 2, 3, 4), (64, "row"), (False, True), ("fp16", "compact"))
MENU = (Format(3, 64), Format(4, 64), Format(4, 32), Format(8, 64))


def units(experts=3, cols=128, block=None):
    """Return the units of two layers."""
    layer, expert, projection = (
        column.ravel().tolist()
        for column in np.meshgrid(range(2), range(experts), range(3), indexing="ij")
    )
    return Units.build(
        layer=layer,
        role=["routed"] * len(layer),
        expert=expert,
        projection=[("gate", "up", "down")[name] for name in projection],
        rows=[64] * len(layer),
        cols=[cols] * len(layer),
        block=block,
    )


def plan(choice, offered=MENU, **header):
    return BitPlan.from_choice(units(), offered, choice, header=header)


def tied(**header):
    """Return a plan of one format per layer and projection."""
    of = units()
    return plan((of.layer + of.projection) % len(MENU), **header)


def test_names():
    assert [target.name for target in targets()] == list(TARGETS.names())
    assert target_of("llama.cpp").name == "gguf"
    assert target_of(MLX) is MLX
    with pytest.raises(InputError, match=r"target 'mlxx' is unknown; .*did you mean mlx?"):
        target_of("mlxx")


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_every_target_offers_what_it_holds(target):
    of = units(cols=256)
    menu = target.menu(of)
    assert menu
    assert allowed(target, of, menu).all()
    assert not allowed(target, of, [Format.made_up(0)]).any()
    assert {one.bits for one in menu} <= set(target.bits)
    assert profile(target.profile)
    uniform = BitPlan.uniform(of, menu[-1])
    if target.rounding:
        uniform = BitPlan.uniform(of, menu[-1])
        uniform = BitPlan.from_choice(
            of, uniform.formats, uniform.choice, header={"method": target.rounding}
        )
    target.check(uniform)


def test_a_group_that_does_not_divide_a_row_is_not_offered():
    assert Format(4, 128) in MLX.menu(units())
    assert Format(4, 128) not in MLX.menu(units(cols=192))


def test_a_plan_that_fits_is_accepted():
    MLX.check(tied())


def test_the_first_unit_with_a_foreign_format_is_named():
    of = units()
    wrong = np.zeros(len(of), dtype=int)
    wrong[5] = 1
    with pytest.raises(MismatchError) as error:
        MLX.check(BitPlan.from_choice(of, (Format(4, 64), Format(1, 64, symmetric=True)), wrong))
    assert str(error.value).startswith(
        "mlx cannot hold int1-g64-sym for layer=0 role=routed expert=1 proj=down; solve again with "
        "`target=mlx` (profile layer_proj), or `coarsen`: "
    )


def test_the_first_unit_that_is_not_tied_is_named_with_the_price_of_coarsening():
    loose = tied()
    choice = loose.choice.copy()
    choice[4] = 3  # layer 0, expert 1, up
    loose = plan(choice)
    with pytest.raises(MismatchError) as error:
        MLX.check(loose)
    more = coarsened(MLX, loose).total_bytes - loose.total_bytes
    assert more == 2 * (Format(8, 64).nbytes(64, 128) - Format(4, 64).nbytes(64, 128))
    assert str(error.value) == (
        "mlx stores one format for layer=0 role=routed expert=0 proj=up and layer=0 role=routed "
        "expert=1 proj=up, the plan says int4-g64-asym and int8-g64-asym; solve again with "
        f"`target=mlx` (profile layer_proj), or `coarsen`: {more:,} bytes more "
        f"({more / loose.total_bytes:+.1%})"
    )


def test_row_blocks_are_refused():
    of = units(block=[0] * 17 + [1])
    cut = BitPlan.uniform(of, Format(4, 64))
    why = "mlx stores one format a matrix, layer=1 role=routed expert=2 proj=down block=1 is a part"
    with pytest.raises(MismatchError, match=re.escape(why)):
        MLX.check(cut)
    with pytest.raises(MismatchError, match="without `row_blocks`"):
        coarsened(MLX, cut)
    target_of("vllm").check(cut)


@pytest.mark.parametrize("name", [one.name for one in targets() if not one.cuts_rows])
def test_a_coarsened_plan_fits_and_gives_no_unit_less(name):
    target = target_of(name)
    of = units(cols=256)
    rng = np.random.default_rng(0)
    loose = BitPlan.from_choice(of, GRIDS, rng.integers(len(GRIDS), size=len(of)), model="m")
    raised = coarsened(target, loose)
    target.check(raised)
    assert raised.model == "m"
    assert (raised.nbytes >= loose.nbytes).all()
    width = [one.bits for one in GRIDS]
    assert all(raised.format_of(i).bits >= width[loose.choice[i]] for i in range(len(of)))


def test_what_fits_is_not_changed_by_coarsening():
    of = tied()
    again = coarsened(MLX, of)
    assert [again.format_of(i) for i in range(18)] == [of.format_of(i) for i in range(18)]


def test_nothing_is_wide_enough():
    kept = BitPlan.uniform(units(), Format.keep("bf16"))
    with pytest.raises(MismatchError, match="mlx has no format of as many bits as keep-bf16 for"):
        coarsened(MLX, kept)
    with pytest.raises(MismatchError, match=r"cannot hold keep-bf16 .*profile layer_proj\)$"):
        MLX.check(kept)


def table(offered):
    cost = np.ones((18, len(offered)))
    return CostTable.from_arrays(cost, units=units(), formats=offered)


def test_a_table_is_restricted_to_formats_of_a_target():
    less = restricted(table((*MENU, Format(1, 64, symmetric=True))), MLX)
    assert less.formats == MENU
    assert less.provenance["target"] == "mlx"
    assert restricted(table(GRIDS), target_of("vllm")).formats == GRIDS


def test_a_table_without_any_of_them_is_refused():
    with pytest.raises(InputError, match="mlx: it has none of the table's formats for layer=0"):
        restricted(table(formats(1, 64, symmetric=True)), MLX)
