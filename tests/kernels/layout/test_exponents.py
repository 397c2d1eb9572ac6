"""Exponents in the signs of scales: there and back, at no byte, and only where there is one."""

from dataclasses import replace

import pytest
import torch

from bitknap.errors import InputError
from bitknap.kernels.experts_table import with_scaled
from bitknap.kernels.layout.exponents import MOST, ROWS, STEP, power, split_exponent, with_exponent
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.kernels.random_experts import made_up_table


@pytest.mark.parametrize("columns", [1, 3])
def test_every_exponent_comes_back(columns):
    scale = torch.rand(9, columns).half() + 0.1
    for exponent in range(-MOST, MOST + 1, STEP):
        marked = with_exponent(scale, exponent)
        assert (marked.shape, marked.dtype) == (scale.shape, torch.float16)
        found, back = split_exponent(marked)
        assert back == exponent
        assert torch.equal(found, scale)
        assert marked[ROWS:].gt(0).all() and marked[:, 1:].gt(0).all()


def test_without_an_exponent_nothing_changes():
    scale = torch.rand(2, 4).half() + 0.1  # too few rows to hold one
    assert with_exponent(scale, 0) is scale
    assert split_exponent(scale) == (scale, 0)
    with pytest.raises(InputError, match=r"a factor of 2\^-8, which a matrix of 2 rows cannot"):
        with_exponent(scale, -8)


def test_powers_are_exact():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert power(exponents).tolist() == [2.0**e for e in exponents.tolist()]


GRIDS = [
    Recipe(bits=3, group=32),
    Recipe(bits=4, group=64, symmetric=True),
    Recipe(bits=5, group=32, share=8),
    Recipe(bits=2, group=32, share=6, symmetric=True),
    Recipe(bits=16, group=1, kept=2 * 70 * 96),
]


def test_a_table_knows_which_of_its_matrices_have_one():
    random = torch.Generator().manual_seed(0)
    wanted = [replace(recipe, scaled=True) for recipe in GRIDS[:4]] + GRIDS
    table = made_up_table(wanted, 70, 96, random)
    stack = table.buffer.view(torch.uint8)
    plain = [replace(recipe, scaled=False) for recipe in wanted]
    assert with_scaled(stack, plain, 70, 96) == wanted
    assert [kind.scaled for kind in table.kind_list()] == [True] * 4 + [False] * 5
