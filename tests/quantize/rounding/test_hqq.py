"""Half-quadratic quantization: a lower p-norm than the start, and never a higher one."""

import pytest
import torch

from bitknap.allocation import Format, formats
from bitknap.quantization.rounding import hqq, rtn

EVERY = formats((1, 2, 3, 4, 8), (8, "row"), (False, True), ("fp16", "compact"))
NAMES = [f.name for f in EVERY]


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape):
    """Return Student-t weights with 3 degrees of freedom."""
    return gauss(*shape, seed=2) / (gauss(3, *shape, seed=1).square().sum(0) / 3).sqrt()


def quantize(x, format):
    return hqq.quantize(x, format, power=0.7)


def norms(x, format, way):
    """Return ‖x - x̂‖_p^p of each row, p = 0.7."""
    return (x - way(x, format).dequantize()).double().abs().pow(0.7).sum(1)


@pytest.mark.parametrize("format", EVERY, ids=NAMES)
def test_no_row_is_worse_than_its_start(format):
    for x in (gauss(12, 75), heavy(12, 75), torch.zeros(2, 75), gauss(4, 75) * 1e-5):
        started, found = norms(x, format, rtn.quantize), norms(x, format, quantize)
        assert (found <= started * (1 + 1e-5)).all()


# What the splitting takes off the p-norm of the start, measured with these weights: the heavier
# the tails, the more.
GAINS = {
    "int1-row-sym": (1.0, 0.98),
    "int2-g64-asym": (0.995, 0.99),
    "int2-g64-asym-compact": (1.0, 0.985),
    "int3-row-sym": (0.995, 0.90),
    "int4-row-sym-compact": (0.995, 0.90),
}


@pytest.mark.parametrize("name", GAINS)
def test_the_norm_falls_and_with_heavy_tails_the_more(name):
    format = Format.parse(name)
    found = []
    for x in (gauss(64, 512), heavy(64, 512)):
        found.append(float(norms(x, format, quantize).sum() / norms(x, format, rtn.quantize).sum()))
    assert found[1] < found[0]
    assert found[0] <= GAINS[name][0]
    assert found[1] <= GAINS[name][1]


def test_most_weights_come_nearer_when_few_are_far():
    x = gauss(32, 512)
    x[:, ::37] *= 6
    format = Format(3, 0, symmetric=True)
    mine, started = ((x - way(x, format).dequantize()).abs() for way in (quantize, rtn.quantize))
    assert float(mine.median()) < 0.9 * float(started.median())


def test_a_group_of_equal_weights_and_one_outlier_is_met_exactly():
    # p < 1 prefers one large error to many small ones; the squared error would share it out.
    x = torch.full((1, 64), 0.25)
    x[0, :32] = -0.25
    x[0, 5] = 0.9
    error = (x - quantize(x, Format(1, 0, symmetric=True)).dequantize()).abs()
    assert float(error.median()) < 1e-2
    started = (x - rtn.quantize(x, Format(1, 0, symmetric=True)).dequantize()).abs()
    assert float(started.median()) > float(error.median())


@pytest.mark.parametrize("format", EVERY, ids=NAMES)
def test_rows_do_not_know_each_other(format):
    x = heavy(7, 43) * torch.logspace(-3, 2, 7)[:, None]
    stacked = quantize(x, format)
    alone = [quantize(row, format) for row in x.split(1)]
    assert torch.equal(torch.cat([q.codes for q in alone]), stacked.codes)
    assert torch.equal(torch.cat([q.dequantize() for q in alone]), stacked.dequantize())


def test_chunks_leave_no_trace():
    x = heavy(70, 1000)
    format = Format(2, 64)
    whole = quantize(x, format)
    assert torch.equal(whole.codes[30:41], quantize(x[30:41], format).codes)


@pytest.mark.parametrize("format", EVERY, ids=NAMES)
def test_any_magnitude_is_finite(format):
    for size in (1e-38, 1e-6, 1e4, 3e38):
        got = quantize(gauss(3, 40).clamp(-1, 1) * size, format)
        assert got.dequantize().isfinite().all(), size
        assert int(got.codes.max()) < 2**format.bits


def test_a_larger_power_spares_the_largest_error():
    x = heavy(8, 256)
    few, many = (
        float((x - hqq.quantize(x, Format(3, 0), power=p).dequantize()).abs().max())
        for p in (1.0, 0.5)
    )
    assert few < many
