"""Blocks of rows: cut in every storage, planned, applied, and refused where they do not fit."""

import numpy as np
import pytest
import torch

from bitknap.allocation import BitPlan, Units, formats
from bitknap.allocation.problem.units import COLUMNS
from bitknap.errors import InputError, MismatchError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import matrix, walk
from bitknap.quantization.packed.writer import save
from bitknap.quantization.rounding.methods import RTN, round_trip
from bitknap.quantization.rounding.rounding import Inputs
from bitknap.quantization.runtime.loading import load
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.alignment import aligned
from bitknap.quantization.stacks.apply import applied, apply
from bitknap.quantization.stacks.quantize_plan import quantize_plan
from bitknap.quantization.stacks.reading import read_units
from bitknap.quantization.stacks.row_blocks import (
    block_units,
    inputs_of_blocks,
    layout_for,
    split_rows,
    whole_of,
)
from bitknap.testing import tiny_model

FORMATS = formats((1, 2, 3, 5, 8), (8, "row"), (False, True), ("fp16", "compact"), keep="fp32")


@pytest.fixture(scope="module")
def layout():
    return walk(tiny_model("mixtral"))


def test_block_units_by_hand(layout):
    units, source = block_units(layout.units, 5)
    assert np.array_equal(source, np.repeat(np.arange(len(layout.units)), 5))
    of = source == 0  # gate, 24 rows
    assert units.rows[of].tolist() == [5, 5, 5, 5, 4]
    assert units.block[of].tolist() == [0, 1, 2, 3, 4]
    assert units.label(3).endswith("proj=gate block=3")
    many, _ = block_units(layout.units, 1000)
    assert (many.rows == 1).all()
    assert len(many) == layout.units.rows.sum()
    with pytest.raises(InputError, match="blocks: 0 must be at least 1"):
        block_units(layout.units, 0)
    with pytest.raises(
        InputError, match="units: they are already cut into blocks; cut the whole matrices"
    ):
        split_rows(split_rows(layout, 2), 2)


@pytest.mark.parametrize("blocks", [1, 5])
def test_blocks_are_the_rows_of_their_matrix(model, blocks):
    whole = walk(model)
    cut = split_rows(whole, blocks)
    tensors = dict(model.named_parameters())
    source = whole_of(cut.units, whole.units)
    for unit in range(len(whole.units)):
        parts = [matrix(cut, int(i), tensors) for i in np.flatnonzero(source == unit)]
        assert len(parts) == blocks
        assert torch.equal(torch.cat(parts), matrix(whole, unit, tensors))
        assert all(
            part.untyped_storage().data_ptr() == tensors[view.tensor].untyped_storage().data_ptr()
            for part, view in zip(parts, [whole.views[unit]] * blocks, strict=True)
        )
    assert cut.layers == whole.layers


@pytest.mark.slow
def test_every_block_is_its_own_round_trip(model, mixed):
    whole = walk(model)
    cut = split_rows(whole, 5)
    plan = mixed(cut.units)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    after = dict(model.named_parameters())
    with applied(model, cut, plan):
        for i in range(len(plan.units)):
            expected = round_trip(matrix(cut, i, before)[None], plan.format_of(i))[0]
            assert torch.equal(matrix(cut, i, after), expected), plan.units.label(i)
        units = {view.tensor for view in cut.views}
        assert all(torch.equal(after[n], before[n]) for n in after if n not in units)
    assert all(torch.equal(after[n], before[n]) for n in after)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS[::5])
def test_blocks_of_one_format_make_the_matrix_it_makes_whole(format):
    one, other = tiny_model("mixtral"), tiny_model("mixtral")
    whole = walk(one)
    cut = split_rows(whole, 5)
    apply(one, whole, BitPlan.uniform(whole.units, format))
    apply(other, cut, BitPlan.uniform(cut.units, format))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_plan_says_how_its_layout_is_cut(layout, mixed, picked, tmp_path):
    cut = split_rows(layout, 5)
    mixed(cut.units).save(tmp_path / "plan.json")
    plan = BitPlan.load(tmp_path / "plan.json")
    again = layout_for(plan.units, layout)
    assert again.units.same_as(cut.units)
    assert again.views == cut.views
    assert aligned(plan, again).total_bytes == plan.total_bytes
    assert layout_for(layout.units, layout) is layout
    shuffled = np.random.default_rng(0).permutation(len(cut.units))
    assert layout_for(picked(cut.units, shuffled), layout).units.same_as(cut.units)
    with pytest.raises(MismatchError, match=f"the plan's {len(cut.units)} units differ from"):
        aligned(plan, layout)


def test_blocks_need_not_be_equal(layout):
    # The first matrix in 1, 3 and 20 rows, the others whole.
    columns = {name: layout.units.to_arrays()[name].copy() for name in COLUMNS}
    columns = {n: np.concatenate([c[:1], c[:1], c]) for n, c in columns.items()}
    columns["block"][:3], columns["rows"][:3] = [0, 1, 2], [1, 3, 20]
    cut = layout_for(Units.from_arrays(columns, layout.units.projections), layout)
    assert [(v.start, v.stop) for v in cut.views[:3]] == [(0, 1), (1, 4), (4, 24)]
    assert cut.units.rows[3:].tolist() == layout.units.rows[1:].tolist()


def test_blocks_that_do_not_make_up_their_matrix(layout, picked):
    cut = split_rows(layout, 4).units
    label = "layer=0 role=routed expert=0 proj=gate"
    for wrong in (picked(cut, np.arange(len(cut)) != 1), picked(cut, np.arange(len(cut)) != 3)):
        with pytest.raises(MismatchError, match=f"{label}: the blocks do not make up its 24 rows"):
            layout_for(wrong, layout)
    with pytest.raises(MismatchError, match=f"{label}: the plan has no block of it"):
        layout_for(picked(cut, np.arange(len(cut)) > 3), layout)
    with pytest.raises(MismatchError, match=r"layer=0 .* block=0: no such matrix in this model"):
        layout_for(cut, walk(tiny_model("nemotron_h")))
    with pytest.raises(MismatchError, match="the blocks do not make up its 28 rows"):
        layout_for(cut, walk(tiny_model("mixtral", intermediate_size=28)))


def test_a_checkpoint_is_cut_as_its_live_model(tmp_path):
    model = tiny_model("mixtral")
    live = split_rows(walk(model), 3)
    shapes = {}
    for layer in range(2):
        shapes[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = ("F32", (4, 16))
        for expert in range(4):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{name}.{w}.weight": ("F32", (24, 16)) for w in ("w1", "w3")}
            shapes[f"{name}.w2.weight"] = ("F32", (16, 24))
    stored = layout_for(live.units, walk_headers(model.config.to_dict(), shapes))
    assert stored.units.same_as(live.units)
    assert (stored.views[1].start, stored.views[1].stop) == (8, 16)


class Nosy:
    """Rounds to nearest and remembers which inputs it was told of."""

    name = "nosy"
    needs_inputs = True

    def __init__(self):
        self.told = []

    def quantize(self, weights, format, inputs=None, exponents=None):
        self.told += inputs.tokens.tolist()
        return RTN.quantize(weights, format)


def test_inputs_of_blocks_are_their_matrix_s(layout):
    cut = split_rows(layout, 5)
    tensors = dict(tiny_model("mixtral").requires_grad_(False).named_parameters())

    def inputs(which):
        return Inputs(moments=torch.zeros(len(which), 1, 1), tokens=torch.from_numpy(which))

    nosy = Nosy()
    known = inputs_of_blocks(cut.units, layout.units, inputs)
    plan = BitPlan.uniform(cut.units, FORMATS[0])
    runs = quantize_plan(plan, lambda which: read_units(cut, which, tensors), nosy, known)
    assert nosy.told == []
    assert [unit // 5 for which, _ in runs for unit in which.tolist()] == nosy.told
    assert len(nosy.told) == len(cut.units)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_packed_checkpoint_of_blocks(family, mixed, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "in")
    source = Checkpoint.open(tmp_path / "in")
    cut = split_rows(walk(model), 5)
    plan = BitPlan.from_choice(
        cut.units, FORMATS, mixed(cut.units).choice, model=source.fingerprint
    )
    sizes = save(source, plan, tmp_path / "out")
    assert sizes["written"] == plan.total_bytes
    loaded = load(tmp_path / "out")
    apply(model, cut, plan)
    for name, tensor in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), tensor), name
