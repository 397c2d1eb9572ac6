"""Rounding by ggml: weighted by the inputs, row by row, and for its own types alone."""

import numpy as np
import pytest
import torch

from bitknap.allocation import Format
from bitknap.errors import InputError, ModelError
from bitknap.quantization.ggml import library
from bitknap.quantization.rounding.ggml import Blocks, Ggml, importance
from bitknap.quantization.rounding.memo import Remembered
from bitknap.quantization.rounding.methods import RTN, method, round_trip
from bitknap.quantization.rounding.rounding import Inputs, recorded_for

Q4 = Format.ggml("q4_k")


@pytest.fixture
def weights():
    return torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0)) / 50


@pytest.fixture
def inputs():
    squares = torch.rand(2, 256, generator=torch.Generator().manual_seed(1)) ** 8
    return Inputs(moments=squares, tokens=torch.tensor([64, 64]))


def test_blocks_are_what_ggml_makes_of_each_matrix(weights, inputs):
    made = Ggml().quantize(weights, Q4, inputs)
    assert made.nbytes == int(Q4.nbytes(16, 256))
    known = importance(inputs.squares)
    for at, matrix in enumerate(weights.numpy()):
        theirs = library.quantize(matrix, "q4_k", known[at])
        np.testing.assert_array_equal(made.rows(8 * at, 8 * at + 8).blocks.numpy(), theirs)


def test_important_columns_lose_less(weights, inputs):
    def loss(known):
        error = round_trip(weights, Q4, Ggml(), known) - weights
        return float((error.square() * inputs.squares[:, None]).sum())

    assert loss(inputs) < 0.8 * loss(None)


def test_whole_moments_serve_by_their_diagonal(weights, inputs):
    whole = Inputs(moments=torch.diag_embed(inputs.moments), tokens=inputs.tokens)
    ours, theirs = (Ggml().quantize(weights, Q4, known) for known in (inputs, whole))
    assert torch.equal(ours.blocks, theirs.blocks)


def test_a_column_that_no_text_used_is_not_given_up(weights):
    squares = torch.ones(2, 256)
    squares[:, :128] = 0
    known = Inputs(moments=squares, tokens=torch.tensor([9, 9]))
    error = round_trip(weights, Format.ggml("iq4_nl"), Ggml(), known) - weights
    assert error.norm() < 0.1 * weights.norm()


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30])
def test_importance_of_any_magnitude_is_about_one(inputs, scale):
    known = importance(inputs.squares.double() * scale)
    assert np.isfinite(known).all()
    assert (known > 0).all()
    assert (abs(known.mean(axis=1)) <= 1).all()


def test_rows_that_do_not_divide_are_stored_in_the_fallback(weights):
    made = Ggml().quantize(weights[:, :, :192], Q4)
    np.testing.assert_array_equal(
        made.blocks[:8].numpy(), library.quantize(weights[0, :, :192].numpy(), "q5_0")
    )
    assert made.dequantize().shape == (16, 192)


def test_a_memo_keeps_blocks(weights, inputs):
    memo = Remembered(rounding=Ggml())
    assert memo.diagonal
    memo.quantize(weights[1:], Q4, Inputs(moments=inputs.moments[1:], tokens=inputs.tokens[1:]))
    again = memo.quantize(weights, Q4, inputs)
    assert isinstance(again, Blocks)
    assert torch.equal(again.blocks, Ggml().quantize(weights, Q4, inputs).blocks)


def test_it_needs_mean_squares_alone():
    assert method("ggml") == Ggml()
    assert recorded_for(Ggml()) == {"moments"}
    assert recorded_for(method("gptq")) == {"full"}
    assert recorded_for(RTN) == frozenset()


def test_grids_and_other_methods_are_refused(weights):
    with pytest.raises(InputError, match="int4-g64-asym: ggml rounds to its own types"):
        Ggml().quantize(weights, Format(4))
    with pytest.raises(InputError, match="ggml-q4_k: only ggml rounds"):
        round_trip(weights, Q4, RTN)


def test_weights_beyond_16_bit_scales_are_refused(weights):
    with pytest.raises(ModelError, match=r"ggml-q8_0: weights of up to .* overflow"):
        Ggml().quantize(weights * 1e10, Format.ggml("q8_0"))
