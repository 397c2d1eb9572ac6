"""Stacks hold every unit once, and their pieces are bounded."""

import numpy as np

from bitknap.quantization.models.live_model import walk
from bitknap.quantization.stacks.grouping import stack_pieces, stacks
from bitknap.testing import tiny_model


def test_stacks_hold_every_unit_once_and_equal_shapes(case):
    units = case.layout.units
    runs = stacks(units)
    assert sorted(np.concatenate(runs).tolist()) == list(range(len(units)))
    for run in runs:
        for column in (units.layer, units.role, units.projection, units.rows, units.cols):
            assert len(set(column[run].tolist())) == 1
        assert (np.diff(run) > 0).all()


def test_stacks_are_cut_to_bounded_pieces():
    units = walk(tiny_model("mixtral", hidden_size=64, intermediate_size=48)).units
    cut = stack_pieces(units, 2 * 4 * 48 * 64)
    assert {len(which) for which in cut} == {2}  # of 4 experts
    assert np.array_equal(np.concatenate(cut), np.concatenate(stacks(units)))
    assert {len(which) for which in stack_pieces(units, 1)} == {1}
