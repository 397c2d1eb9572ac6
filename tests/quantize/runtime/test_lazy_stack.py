"""A stack of matrices that is never stacked, to transformers' ways of running experts."""

import pytest
import torch
from torch.nn import functional

from bitknap.quantization.runtime.lazy_stack import Matrices

STACK = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))


def matrices():
    """Return the stack unstacked, and the list of experts that were looked at."""
    asked: list[int] = []

    def matrix(expert):
        asked.append(expert)
        return STACK[expert]

    return Matrices(matrix, STACK.shape, STACK.dtype, STACK.device), asked


def test_one_expert_at_a_time():
    found, asked = matrices()
    x = torch.randn(3, 4)
    assert torch.equal(functional.linear(x, found[torch.tensor(3)]), x @ STACK[3].T)
    assert torch.equal(found[2], STACK[2])
    assert asked == [3, 2]


def test_the_matrices_of_pairs():
    found, asked = matrices()
    ids = torch.tensor([4, 1, 1])
    assert torch.equal(found[ids], STACK[ids])
    assert asked == [4, 1, 1]


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_touch_only_what_is_hit(transposed):
    found, asked = matrices()
    rows = torch.randn(7, 4 if transposed else 6)
    ends = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
    stack = STACK.transpose(-2, -1) if transposed else STACK
    ours = found.transpose(-2, -1) if transposed else found
    out = functional.grouped_mm(rows, ours, offs=ends)
    assert torch.equal(out[:2], rows[:2] @ stack[1])
    assert torch.equal(out[2:5], rows[2:5] @ stack[3])
    assert asked == [1, 3]
    # What belongs to experts that are elsewhere is 0, and so is all of nothing.
    assert torch.equal(out[5:], torch.zeros(2, stack.shape[2]))
    assert functional.grouped_mm(rows[:0], ours, offs=ends * 0).shape == (0, stack.shape[2])


def test_grouped_products_have_gradients():
    found, _ = matrices()
    rows = torch.randn(3, 6, requires_grad=True)
    ends = torch.tensor([1, 1, 3, 3, 3], dtype=torch.int32)
    functional.grouped_mm(rows, found, offs=ends).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad[0], STACK[0].sum(1))


def test_any_other_operation_gets_the_stack():
    found, asked = matrices()
    x = torch.randn(5, 2, 6)
    assert torch.equal(torch.bmm(x, found), torch.bmm(x, STACK))
    assert asked == [0, 1, 2, 3, 4]
