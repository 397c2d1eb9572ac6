"""The operator on the CPU: right sums, correct empty results, and refusals in one line."""

import pytest
import torch

from bitknap.errors import InputError
from bitknap.kernels.experts import Experts
from bitknap.kernels.experts_table import dequantize_tiles
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.kernels.moe import moe
from bitknap.kernels.random_experts import Structure, made_up_experts
from bitknap.kernels.reference import activate

H, INNER, E, K, T = 96, 160, 5, 2, 7
MIXED = [
    Recipe(bits=2, group=64),
    Recipe(bits=3, group=32, share=6),
    Recipe(bits=4, group=32, symmetric=True),
    Recipe(bits=8, group=1 << 20),
    Recipe(bits=16, group=1, kept=1),
]


def routed(experts=E, tokens=T, k=K, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=random).to(dtype)
    index = torch.stack([torch.randperm(experts, generator=random)[:k] for _ in range(tokens)])
    return x, index, torch.rand(tokens, k, generator=random)


def straight(x, index, weights, experts):
    """Sum over pairs, one at a time, over whole dequantized stacks."""
    gate = dequantize_tiles(experts.gate) if experts.gate else None
    up, down = dequantize_tiles(experts.up), dequantize_tiles(experts.down)
    biases = (experts.gate_bias, experts.up_bias, experts.down_bias)
    out = torch.zeros(x.shape)
    for t, (ids, shares) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for e, share in zip(ids, shares, strict=True):
            if e == len(up):
                continue
            of_gate, of_up, of_down = (0 if b is None else b[e].float() for b in biases)
            a = None if gate is None else gate[e] @ x[t].float() + of_gate
            inner = activate(a, up[e] @ x[t].float() + of_up, experts.activation)
            out[t] += share * (down[e] @ inner.to(x.dtype).float() + of_down)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, True)])
def test_a_mixed_layer_is_the_sum_of_its_experts(dtype, gated, biased):
    experts = made_up_experts(MIXED, H, INNER, Structure(gated=gated, biased=biased))
    x, index, weights = routed(dtype=dtype)
    out = moe(x, index, weights, experts)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(
        out.float(), straight(x, index, weights, experts), rtol=rounding, atol=rounding
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"])
def test_activations(activation):
    gate, up = torch.linspace(-9, 9, 50), torch.linspace(9, -9, 50).roll(7)
    found = activate(gate, up, activation)
    phi = 0.5 * (1 + torch.erf(gate / 2**0.5))
    tanh = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    capped = gate.clamp(max=7)
    expected = {
        "silu": gate / (1 + torch.exp(-gate)) * up,
        "gelu": gate * phi * up,
        "gelu_tanh": gate * tanh * up,
        "relu": gate.clamp(min=0) * up,
        "relu2": gate.clamp(min=0) ** 2 * up,
        "swiglu_oai": (up.clamp(-7, 7) + 1) * capped / (1 + torch.exp(-1.702 * capped)),
    }[activation]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if activation != "swiglu_oai":
        alone = activate(None, gate, activation)
        torch.testing.assert_close(alone * up, expected, rtol=1e-5, atol=1e-5)


def test_gate_and_up_may_differ():
    gate = [*MIXED[1:], MIXED[0]]
    experts = made_up_experts(MIXED, H, INNER, Structure(gate=gate, down=gate[::-1]))
    x, index, weights = routed()
    out = moe(x, index, weights, experts)
    torch.testing.assert_close(out, straight(x, index, weights, experts), rtol=1e-5, atol=1e-5)


def test_the_sentinel_is_skipped():
    experts = made_up_experts(MIXED, H, INNER)
    x, index, weights = routed()
    index[2, 0], index[3] = E, E
    out = moe(x, index.int(), weights, experts)
    torch.testing.assert_close(out, straight(x, index, weights, experts), rtol=1e-5, atol=1e-5)
    assert not out[3].any()


def test_nothing_to_do_is_a_result():
    experts = made_up_experts(MIXED, H, INNER)
    x, index, weights = routed()
    assert moe(x[:0], index[:0], weights[:0], experts).shape == (0, H)
    assert torch.equal(moe(x, index[:, :0], weights[:, :0], experts), torch.zeros(T, H))


def test_activations_may_lie_anywhere():
    experts = made_up_experts(MIXED, H, INNER)
    x, index, weights = routed()
    wide = torch.zeros(H, T, 2)
    wide[:, :, 1] = x.T
    assert torch.equal(
        moe(wide[:, :, 1].T, index.T.clone().T, weights, experts), moe(x, index, weights, experts)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, i, w: (x[:, :50], i, w), r"activations \(7, 50\): must be \[tokens, 96\]; "),
        (lambda x, i, w: (x[None], i, w), r"activations \(1, 7, 96\): must be "),
        (lambda x, i, w: (x.double(), i, w), "activations in torch.float64: must be bfloat16"),
        (lambda x, i, w: (x, i.float(), w), "expert ids in torch.float32: must be int32 or int64"),
        (lambda x, i, w: (x, i, w.int()), "weights of experts in torch.int32: must be floats"),
        (lambda x, i, w: (x, i[:3], w[:3]), r"expert ids \(3, 2\) and weights \(3, 2\): must "),
        (lambda x, i, w: (x, i, w[:, :1]), r"expert ids \(7, 2\) and weights \(7, 1\): must both"),
        (lambda x, i, w: (x, i + 2, w), "expert ids 2 to 6: must be 0 to 4, or 5 for an expert "),
        (lambda x, i, w: (x, i - 1, w), "expert ids -1 to 3: must be 0 to 4"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    experts = made_up_experts(MIXED, H, INNER)
    with pytest.raises(InputError, match=message) as error:
        x, index, weights = change(*routed())
        moe(x, index, weights, experts)
    assert "\n" not in str(error.value)


def test_parts_must_belong_together():
    mixed, other = made_up_experts(MIXED, H, INNER), made_up_experts(MIXED[:3], H, INNER)
    with pytest.raises(
        InputError, match=r"down projections \(3, 96, 160\): with up's \(5, 160, 96\)"
    ):
        Experts(up=mixed.up, down=other.down, activation="silu")
    with pytest.raises(InputError, match=r"gate projections \(5, 96, 160\): with up's"):
        Experts(gate=mixed.down, up=mixed.up, down=mixed.down, activation="silu")
    with pytest.raises(InputError, match=r"up_bias \(5, 96\): must be \(5, 160\)"):
        Experts(up=mixed.up, down=mixed.down, activation="silu", up_bias=torch.zeros(E, H))
    with pytest.raises(InputError, match="activation 'swish' is unknown; one of silu, gelu"):
        Experts(up=mixed.up, down=mixed.down, activation="swish")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="activation swiglu_oai: needs a gate"):
        Experts(up=mixed.up, down=mixed.down, activation="swiglu_oai")


@pytest.mark.slow
def test_torch_compile_sees_one_call():
    experts = made_up_experts(MIXED, H, INNER)
    x, index, weights = routed()
    compiled = torch.compile(
        lambda x, i, w: moe(x, i, w, experts) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x, index, weights), moe(x, index, weights, experts) + 1)


@pytest.mark.slow
def test_the_operator_is_sound():
    experts = made_up_experts(MIXED, H, INNER)
    x, index, weights = routed()
    tests = ("test_schema", "test_faketensor")
    arguments = (x, index, weights, list(experts.tensors), experts.how, "")
    torch.library.opcheck(torch.ops.bitknap.moe.default, arguments, test_utils=tests)
