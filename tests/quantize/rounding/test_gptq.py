"""GPTQ against a plain loop in double precision, against rounding to nearest, and at the edges."""

import pytest
import torch

from bitknap.allocation import Format, formats
from bitknap.errors import InputError
from bitknap.quantization.rounding import gptq, rtn

EVERY = formats((1, 2, 3, 4, 8), (8, "row"), (False, True), ("fp16", "compact"))
NAMES = [f.name for f in EVERY]
FEW = [
    Format.parse(name)
    for name in (
        "int1-g32-sym",
        "int1-row-asym",
        "int2-g32-asym",
        "int2-g64-asym-compact",
        "int3-row-sym",
        "int4-g32-sym-compact",
        "int8-g64-asym",
    )
]


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n, cols, tokens=400):
    """Return second moments of inputs whose spectrum falls by a factor of 10,000."""
    mix = gauss(n, cols, cols, seed=1) * torch.logspace(0, -2, cols)[:, None]
    x = gauss(n, tokens, cols, seed=2) @ mix
    return x.mT @ x / tokens


def quantize(weights, format, moments, damping=0.01, act_order=True):
    level = torch.full((len(weights),), damping)
    return gptq.quantize(weights, format, moments, damping=level, act_order=act_order)


def errors(weights, got, moments):
    """Return tr(ΔW H ΔWᵀ) of each row, [n, rows]."""
    delta = (weights - got.dequantize().view_as(weights)).double()
    return ((delta @ moments.double()) * delta).sum(2)


def textbook(weights, format, moments, damping, act_order):
    """Return the codes of one matrix by the inverse of H, column by column, as published."""
    grid = rtn.quantize(weights, format).grid
    cols, size, top = weights.shape[1], grid.size, 2**format.bits - 1
    floor = grid.values(torch.zeros(weights.shape, dtype=torch.uint8)).double()
    above = grid.values(torch.ones(weights.shape, dtype=torch.uint8)).double()
    step = grid.steps().double().repeat_interleave(size, dim=1)[:, :cols].expand_as(floor)
    torch.testing.assert_close(above - floor, step, rtol=1e-3, atol=1e-6)
    h = moments.double()
    order = torch.arange(cols)
    if act_order:
        order = moments.diagonal().argsort(descending=True, stable=True)
    h = h[order][:, order] + damping * h.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, codes = weights.double()[:, order], torch.empty(weights.shape, dtype=torch.uint8)
    for j in range(cols):
        column = order[j]
        q = ((w[:, j] - floor[:, column]) / step[:, column]).round().clamp(0, top)
        codes[:, column] = q.to(torch.uint8)
        error = (w[:, j] - q * step[:, column] - floor[:, column]) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
    return codes, grid


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("format", FEW, ids=str)
def test_codes_and_error_are_those_of_the_published_loop(format, act_order):
    weights, moments = gauss(2, 24, 200), correlated(2, 200)  # two blocks, and short groups
    got = quantize(weights, format, moments, act_order=act_order)
    for i in range(2):
        codes, grid = textbook(weights[i], format, moments[i], 0.01, act_order)
        mine = got.rows(24 * i, 24 * i + 24)
        # A tie that rounds the other way changes what follows it in that row.
        assert (mine.codes == codes).float().mean() > 0.95
        theirs = (weights[i] - grid.values(codes)).double()
        expected = float(torch.trace(theirs @ moments[i].double() @ theirs.T))
        found = float(errors(weights[i : i + 1], mine, moments[i : i + 1]).sum())
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("format", FEW, ids=str)
def test_errors_of_correlated_inputs_are_far_below_those_of_rounding_to_nearest(format):
    weights, moments = gauss(3, 32, 160), correlated(3, 160)
    mine = errors(weights, quantize(weights, format, moments), moments).sum(1)
    nearest = errors(weights, rtn.quantize(weights.flatten(0, 1), format), moments).sum(1)
    limit = {1: 0.7, 2: 0.5}.get(format.bits, 0.35)
    assert (mine < limit * nearest).all(), mine / nearest


@pytest.mark.parametrize("format", EVERY, ids=NAMES)
def test_no_row_is_worse_than_rounded_to_nearest(format):
    weights = gauss(3, 8, 75)
    moments = correlated(3, 75)
    moments[1] = moments[1].diagonal().diag()  # nothing to make up for
    moments[2] = 1.0  # all inputs alike: one direction, of rank 1
    weights[0, 0] *= 50
    nearest = rtn.quantize(weights.flatten(0, 1), format)
    mine, theirs = (
        errors(weights, got, moments) for got in (quantize(weights, format, moments), nearest)
    )
    scale = moments.diagonal(dim1=1, dim2=2).mean(1).double()[:, None]
    slack = 1e-4 * theirs + 1e-5 * scale * weights.double().square().sum(2)
    assert (mine <= theirs + slack).all()


def test_uncorrelated_inputs_leave_rounding_to_nearest():
    weights = gauss(2, 8, 75)
    moments = torch.diag_embed(gauss(2, 75, seed=3).square())
    for format in FEW:
        got = quantize(weights, format, moments)
        assert torch.equal(got.codes, rtn.quantize(weights.flatten(0, 1), format).codes)


def test_the_order_of_columns_is_that_of_the_diagonal():
    # Columns that come sorted are taken from left to right either way.
    weights, moments = gauss(1, 16, 96), correlated(1, 96)
    order = moments[0].diagonal().argsort(descending=True)
    by_hand = moments[:, order][:, :, order]
    format = Format(3, 0, symmetric=True)
    sorted_first = quantize(weights[:, :, order], format, by_hand, act_order=False)
    got = quantize(weights, format, moments)
    assert torch.equal(got.codes[:, order], sorted_first.codes)
    assert torch.equal(got.dequantize()[:, order], sorted_first.dequantize())


def test_groups_keep_their_places():
    weights, moments = gauss(1, 16, 80), correlated(1, 80)
    for format in (Format(2, 32), Format(3, 8, metadata="compact")):
        got = quantize(weights, format, moments)
        nearest = rtn.quantize(weights[0], format)
        assert torch.equal(got.grid.scale, nearest.grid.scale)
        off = (got.codes.int() - nearest.codes.int()).abs()
        assert 0 < float((off > 0).float().mean()) < 0.9
        assert float(off.float().mean()) < 1


def test_inputs_that_were_always_zero_neither_help_nor_hurt():
    weights, moments = gauss(1, 16, 64), correlated(1, 64)
    dead = torch.arange(0, 64, 5)
    live = torch.tensor([c for c in range(64) if c % 5])
    moments[:, dead], moments[:, :, dead] = 0, 0
    got = quantize(weights, Format(3, 0), moments)
    nearest = rtn.quantize(weights[0], Format(3, 0))
    assert torch.equal(got.codes[:, dead], nearest.codes[:, dead])
    assert not torch.equal(got.codes[:, live], nearest.codes[:, live])


def test_without_any_input_weights_are_rounded_to_nearest():
    weights = gauss(2, 8, 40)
    for format in FEW:
        got = quantize(weights, format, torch.zeros(2, 40, 40))
        assert torch.equal(got.codes, rtn.quantize(weights.flatten(0, 1), format).codes)


def test_the_unit_of_the_moments_does_not_matter():
    weights, moments = gauss(1, 8, 40), correlated(1, 40)
    codes = quantize(weights, Format(2, 8), moments).codes
    for scale in (2.0**-100, 2.0**60):
        assert torch.equal(quantize(weights, Format(2, 8), moments * scale).codes, codes)


def test_damping_rises_until_a_factor_exists():
    # Moments that are off by rounding: one eigenvalue is -0.05 of the mean diagonal.
    x = gauss(40, 40, seed=4)
    values, vectors = torch.linalg.eigh(x @ x.T)
    values[0] = -0.05 * values.mean()
    moments = ((vectors * values) @ vectors.T)[None]
    weights = gauss(1, 16, 40)
    raised = quantize(weights, Format(3, 0), moments)
    enough = quantize(weights, Format(3, 0), moments, damping=0.1)
    assert torch.equal(raised.codes, enough.codes)
    both = torch.cat([moments, correlated(1, 40)])  # the second keeps its damping
    pair = quantize(weights.expand(2, -1, -1), Format(3, 0), both)
    assert torch.equal(pair.rows(0, 16).codes, raised.codes)
    assert torch.equal(pair.rows(16, 32).codes, quantize(weights, Format(3, 0), both[1:]).codes)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_moments_that_are_not_finite(bad):
    moments = correlated(3, 40)
    moments[1, 3, 5] = bad
    with pytest.raises(InputError) as error:
        quantize(gauss(3, 4, 40), Format(3, 8), moments)
    assert str(error.value) == (
        "gptq: second moments of matrix 1 are NaN or infinite; calibrate again in float32, or use "
        "`rounding=Hqq()`"
    )


def test_moments_that_are_those_of_no_inputs():
    moments = correlated(2, 16)
    moments[1] = 1e6 * (torch.ones(16, 16) - 1.001 * torch.eye(16)).neg()
    with pytest.raises(InputError, match=r"matrix 1 have a negative"):
        quantize(gauss(2, 4, 16), Format(3, 8), moments, damping=1e-9)


def test_moments_of_another_shape():
    with pytest.raises(InputError) as error:
        quantize(gauss(3, 4, 40), Format(3, 8), torch.zeros(3, 4, 4))
    assert str(error.value) == (
        "gptq: second moments [3, 4, 4] do not fit weights [3, 4, 40]; give [3, 40, 40]"
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4_000, 20_000])
def test_chunks_leave_no_trace(monkeypatch, size):
    weights, moments = gauss(4, 20, 40), correlated(4, 40)
    whole = quantize(weights, Format(2, 8), moments)
    monkeypatch.setitem(gptq._CHUNK, "cpu", size)
    parts = quantize(weights, Format(2, 8), moments)
    assert (whole.codes == parts.codes).float().mean() > 0.99
    assert torch.equal(whole.grid.scale, parts.grid.scale)


@pytest.mark.parametrize("format", FEW, ids=str)
def test_any_magnitude_is_finite(format):
    moments = correlated(1, 40)
    for size in (1e-38, 1e-6, 1e4, 3e38):
        got = quantize(gauss(1, 4, 40).clamp(-1, 1) * size, format, moments)
        assert got.dequantize().isfinite().all(), size
        assert int(got.codes.max()) < 2**format.bits
