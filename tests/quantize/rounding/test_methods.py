"""The ways of rounding behind one signature: names, what they ask for, and what they share."""

import pytest
import torch

from bitknap.allocation import Format, formats
from bitknap.errors import InputError
from bitknap.quantization.rounding import rtn
from bitknap.quantization.rounding.methods import RTN, Gptq, Hqq, Rtn, method, round_trip
from bitknap.quantization.rounding.rounding import Inputs

WAYS = (Rtn(), Hqq(), Gptq())
EVERY = formats(range(1, 9), (8, "row"), (False, True), ("fp16", "compact"))


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n, cols, tokens=200):
    x = gauss(n, tokens, cols, seed=1) @ gauss(cols, cols, seed=2)
    return Inputs(moments=x.mT @ x / tokens, tokens=torch.full((n,), tokens))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_method_is_known_by_its_name(way):
    assert method(way.name) == way


def test_another_name_lists_the_methods():
    with pytest.raises(InputError) as error:
        method("awq")
    assert str(error.value) == "method 'awq' is unknown; one of rtn, hqq, gptq, midtread, ggml"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_format_gives_codes_that_it_can_store(way):
    weights = gauss(2, 3, 43)  # a short last group
    known = inputs(2, 43)
    for format in EVERY:
        got = way.quantize(weights, format, known)
        assert got.codes.shape == (6, 43)
        assert got.codes.dtype == torch.uint8
        assert int(got.codes.max()) < 2**format.bits
        assert got.format == format
        assert got.dequantize().isfinite().all()
        same = way.quantize(weights, format, known)
        assert torch.equal(got.codes, same.codes)
        assert torch.equal(got.dequantize(), same.dequantize())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_matrices_do_not_know_each_other(way):
    weights, known = gauss(5, 6, 72), inputs(5, 72)
    for format in (Format(2, 32), Format(3, 0, symmetric=True), Format(2, 8, metadata="compact")):
        whole = way.quantize(weights, format, known)
        for i in range(5):
            own = Inputs(moments=known.moments[i : i + 1], tokens=known.tokens[i : i + 1])
            alone = way.quantize(weights[i : i + 1], format, own)
            assert torch.equal(alone.codes, whole.rows(6 * i, 6 * i + 6).codes)
            assert torch.equal(alone.dequantize(), whole.rows(6 * i, 6 * i + 6).dequantize())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_weights_and_inputs_are_left_alone(way):
    weights, known = gauss(2, 4, 40), inputs(2, 40)
    before, moments = weights.clone(), known.moments.clone()
    way.quantize(weights, Format(2, 8), known)
    assert torch.equal(weights, before)
    assert torch.equal(known.moments, moments)


def test_gptq_alone_needs_inputs():
    assert [way.needs_inputs for way in WAYS] == [False, False, True]
    with pytest.raises(InputError) as error:
        Gptq().quantize(gauss(1, 4, 8), Format(2, 8))
    assert str(error.value) == (
        "gptq: needs second moments of the units' inputs; calibrate with full moments, or use "
        "`rounding=Hqq()`"
    )


@pytest.mark.parametrize("make", [lambda: Hqq(power=0), lambda: Hqq(power=1.5)])
def test_a_norm_that_is_none(make):
    with pytest.raises(InputError, match=r"power: .* is not above 0 and at most 1; 0\.7 is usual"):
        make()


def test_damping_that_is_none():
    with pytest.raises(InputError, match=r"damping: 0 is not above 0; 0\.01 is usual"):
        Gptq(damping=0)
    with pytest.raises(InputError, match=r"ridge: -1 is below 0; 1 is usual, 0 switches it off"):
        Gptq(ridge=-1)


def test_the_fewer_the_tokens_the_nearer_to_rounding_to_nearest():
    weights, known = gauss(1, 24, 64), inputs(1, 64)
    format = Format(3, 0, symmetric=True)
    nearest = Rtn().quantize(weights, format).codes
    off = []
    for tokens in (0, 16, 256, 100_000):
        few = Inputs(moments=known.moments, tokens=torch.tensor([tokens]))
        off.append(
            float(
                (Gptq(widen=False).quantize(weights, format, few).codes != nearest).float().mean()
            )
        )
    assert off == sorted(off)
    assert off[0] < 0.03 < off[3]
    plain = Gptq(ridge=0).quantize(weights, format, few).codes
    assert float((plain == Gptq().quantize(weights, format, few).codes).float().mean()) > 0.95


def test_matrices_with_few_tokens_are_listed():
    tokens = torch.tensor([0, 63, 64, 1000])
    known = Inputs(moments=inputs(4, 64).moments, tokens=tokens)
    assert Gptq().fallbacks(known).tolist() == [True, True, False, False]
    assert Gptq(ridge=10).fallbacks(known).tolist() == [True, True, True, False]
    assert not Gptq(ridge=0).fallbacks(known).any()


def test_few_tokens_do_better_with_the_ridge_on_other_tokens():
    # Half as many tokens as columns: what they say of most directions is noise.
    mix = gauss(128, 128, seed=3)
    seen, other = gauss(64, 128, seed=4) @ mix, gauss(4000, 128, seed=5) @ mix
    weights, format = gauss(1, 32, 128), Format(2, 0)
    known = Inputs(moments=(seen.T @ seen / 64)[None], tokens=torch.tensor([64]))

    def loss(way):
        delta = weights[0] - way.quantize(weights, format, known).dequantize()
        return float((other @ delta.T).square().mean())

    assert loss(Gptq()) < loss(Rtn()) < loss(Gptq(ridge=0))


def test_round_trip_keeps_what_is_kept():
    weights = gauss(2, 4, 40)
    assert round_trip(weights, Format.keep("bf16")) is weights
    expected = rtn.quantize(weights.flatten(0, 1), Format(3, 8)).dequantize().view_as(weights)
    assert torch.equal(round_trip(weights, Format(3, 8)), expected)
    assert torch.equal(round_trip(weights, Format(3, 8), RTN), expected)


def test_wider_grids_lose_less_at_few_bits():
    weights, known = gauss_case()
    for bits in (1, 2):
        format = Format(bits, 0, symmetric=True)
        lost = []
        for widen in (True, False):
            got = Gptq(widen=widen).quantize(weights, format, known).dequantize()
            delta = (weights - got.view_as(weights)).double()
            lost.append(float(torch.einsum("nri,nij,nrj->", delta, known.moments.double(), delta)))
        assert lost[0] < 0.98 * lost[1]


def gauss_case():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 48, 64, generator=generator)
    mixing = torch.randn(2, 64, 24, generator=generator)
    x = torch.randn(2, 4096, 24, generator=generator) @ mixing.mT
    x = x + 0.3 * torch.randn(x.shape, generator=generator)
    moments = x.mT @ x / 4096
    return weights, Inputs(moments=moments, tokens=torch.tensor([4096, 4096]))


def test_a_kept_precision_is_no_round_trip():
    w = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(w, Format.keep("fp32")), w)
