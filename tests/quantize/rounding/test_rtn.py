"""Round-to-nearest with clipping: as good as the published table, exact at 1 bit, finite always."""

from itertools import pairwise

import pytest
import torch

from bitknap.allocation import Format, formats
from bitknap.quantization.rounding.rtn import quantize

EVERY = formats(range(1, 9), (8, 32, "row"), (False, True), ("fp16", "compact"))
NAMES = [f.name for f in EVERY]


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def round_trip(x, format):
    return quantize(x, format).dequantize()


# methods.md#distortion, unit-variance distortion with the best clipping, asymmetric; Gaussian
# weights.
TABLE = {
    32: {1: 0.353, 2: 0.112, 3: 0.0260, 4: 0.00610, 8: 2.3e-5},
    128: {1: 0.360, 2: 0.136, 3: 0.0348, 4: 0.0090, 8: 3.5e-5},
    0: {1: 0.363, 2: 0.149, 3: 0.0404, 4: 0.0118, 8: 6.8e-5},
}


@pytest.mark.parametrize("group", TABLE)
def test_distortion_of_gaussian_weights_is_at_most_the_published_one(group):
    x = gauss(48, 4096)
    for bits, limit in TABLE[group].items():
        found = float((round_trip(x, Format(bits, group)) - x).square().mean())
        assert found <= 1.03 * limit, bits


# The same table for heavy tails: Student-t with 5 degrees of freedom, scaled to variance 1.
HEAVY = {
    128: {1: 0.452, 2: 0.184, 3: 0.0586, 4: 0.0158, 8: 6.1e-5},
    0: {1: 0.459, 2: 0.242, 3: 0.0836, 4: 0.0333, 8: 2.7e-4},
}


@pytest.mark.parametrize("group", HEAVY)
def test_distortion_of_heavy_tails_is_at_most_the_published_one(group):
    chi = gauss(5, 48, 4096, seed=1).square().sum(0)
    x = gauss(48, 4096, seed=2) / (chi / 5).sqrt() * (3 / 5) ** 0.5
    for bits, limit in HEAVY[group].items():
        found = float((round_trip(x, Format(bits, group)) - x).square().mean())
        assert found <= 1.05 * limit * float(x.square().mean()), bits  # a tail's own noise


@pytest.mark.parametrize("size", [8, 32, 0])
def test_one_bit_symmetric_is_sign_times_mean_size(size):
    x = gauss(5, 64)
    groups = x.view(5, -1, size or 64)
    # The stored code and scale: scale is fp16 and stands for the distance of the two levels.
    scale = (2 * groups.abs().mean(2, keepdim=True)).half().float()
    expected = torch.where(groups >= 0, 0.5, -0.5) * scale
    assert torch.equal(round_trip(x, Format(1, size, symmetric=True)), expected.view_as(x))


@pytest.mark.parametrize("size", [8, 32, 0])
def test_one_bit_asymmetric_is_sign_times_mean_distance_plus_mean(size):
    x = gauss(5, 64) + 0.7
    groups = x.view(5, -1, size or 64)
    mean = groups.mean(2, keepdim=True)
    distance = (groups - mean).abs().mean(2, keepdim=True)
    got = round_trip(x, Format(1, size)).view_as(groups)
    low, step = (mean - distance).half().float(), (2 * distance).half().float()
    upper = (groups - low) / step >= 0.5  # the mean, as fp16 stores it
    torch.testing.assert_close(got, torch.where(upper, low + step, low), rtol=1e-6, atol=0)
    assert (upper == (groups >= mean)).float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("format", EVERY, ids=NAMES)
def test_rows_do_not_know_each_other(format):
    for cols in (40, 43):  # the second leaves a short last group
        x = gauss(9, cols) * torch.logspace(-3, 2, 9)[:, None]
        stacked = quantize(x, format)
        for n in (1, 2):
            alone = [quantize(part, format) for part in x.split(n)]
            assert torch.equal(torch.cat([q.dequantize() for q in alone]), stacked.dequantize())
            assert torch.equal(torch.cat([q.codes for q in alone]), stacked.codes)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_chunks_leave_no_trace(bits):
    x = gauss(70, 1000)  # more than two chunks of work
    for format in formats(bits, (64, "row"), (False, True), ("fp16", "compact")):
        whole = round_trip(x, format)
        assert torch.equal(whole[30:41], round_trip(x[30:41], format))


@pytest.mark.parametrize("format", EVERY, ids=NAMES)
def test_a_short_last_group_is_a_group_of_its_own(format):
    x = gauss(6, 67)
    x[:, 64:] *= 1000  # does not disturb the whole groups
    size = format.group_size
    got = quantize(x, format)
    assert got.codes.shape == x.shape
    if size == 0 or format.metadata == "compact":  # share a scale with the rest
        assert torch.isfinite(got.dequantize()).all()
        return
    assert got.grid.scale.shape == (6, int(format.groups(67)))
    assert torch.equal(got.dequantize()[:, :64], round_trip(x[:, :64], format))
    tail = round_trip(x[:, 64:], Format(format.bits, 0, symmetric=format.symmetric))
    assert torch.equal(got.dequantize()[:, 64:], tail)


@pytest.mark.parametrize("format", EVERY, ids=NAMES)
def test_constant_and_zero_groups(format):
    assert not round_trip(torch.zeros(3, 40), format).abs().gt(1e-6).any()
    x = torch.tensor([[0.7], [-0.7], [1e-9]]).expand(3, 40)
    got = round_trip(x, format)
    assert torch.isfinite(got).all()
    # A mid-rise grid of b bits reaches a constant with its outermost level or nearer.
    torch.testing.assert_close(got, x, rtol=6e-3, atol=2e-6)


@pytest.mark.parametrize("format", EVERY, ids=NAMES)
def test_any_magnitude_is_finite(format):
    for size in (1e-38, 1e-12, 1e-6, 1e4, 1e30, 3e38):
        got = quantize((gauss(4, 40).clamp(-1, 1)) * size, format)
        assert torch.isfinite(got.dequantize()).all(), size
        assert torch.isfinite(got.grid.scale).all()
        assert int(got.codes.max()) < 2**format.bits
    outlier = torch.full((2, 40), 1e-6)
    outlier[:, 3] = 6e4
    assert torch.isfinite(round_trip(outlier, format)).all()


@pytest.mark.parametrize("size", [32, 0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("metadata", ["fp16", "compact"])
def test_another_bit_never_hurts(size, symmetric, metadata):
    family = formats(range(1, 9), size or "row", symmetric, metadata)
    x = gauss(16, 128)
    two_peaks = x.sign() + 0.1 * x  # where a wider grid has no better place for its levels
    for weights, slack in ((x, 0), (x.exp(), 0), (x**3, 0), (x.erf(), 0), (two_peaks, 0.06)):
        errors = [float((round_trip(weights, f) - weights).square().mean()) for f in family]
        assert all(b <= a * (1 + slack) for a, b in pairwise(errors)), errors


def test_a_wider_group_never_helps_a_gaussian():
    x = gauss(32, 512)
    errors = [
        float((round_trip(x, Format(3, size)) - x).square().mean()) for size in (32, 64, 128, 0)
    ]
    assert errors == sorted(errors)


def test_rows_cuts_every_part():
    x = gauss(6, 40)
    for format in EVERY:
        whole = quantize(x, format)
        assert torch.equal(whole.rows(2, 5).dequantize(), whole.dequantize()[2:5])


def test_the_input_is_left_alone():
    x = gauss(6, 40)
    before = x.clone()
    for format in EVERY:
        quantize(x, format)
    assert torch.equal(x, before)
