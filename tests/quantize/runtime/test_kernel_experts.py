"""Packed experts run by the kernels' operator, here by its plain torch reference."""

import copy
import logging
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig

from bitknap.allocation import Format
from bitknap.errors import InputError
from bitknap.kernels.reference import activate
from bitknap.quantization.models.matrix_views import View
from bitknap.quantization.packed.convert_layout import convert
from bitknap.quantization.runtime import loading
from bitknap.quantization.runtime.dequantized_cache import Cache
from bitknap.quantization.runtime.kernel_experts import activation_of, kernel_experts
from bitknap.quantization.runtime.layers import PackedExperts, packed_modules, packed_weights
from bitknap.quantization.runtime.packed_weight import PackedWeight, Piece
from bitknap.testing import packed_checkpoint
from bitknap.testing.comparing import IDS, logits

pytestmark = pytest.mark.slow

GROUPS: tuple[int | Literal["row"], ...] = (32, "row")
# Concatenated, interleaved with biases, transposed, without gate, beside shared experts.
FAMILIES = ("mixtral", "gpt_oss", "aria_text", "nemotron_h", "deepseek_v2")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed Mixtral that kernels can run; read only."""
    return packed_checkpoint(tmp_path_factory.mktemp("mixtral"), group_sizes=GROUPS)


def by_kernels(model):
    """Have the operator run every experts module that it can; return those modules."""
    found = [module for module in packed_modules(model) if isinstance(module, PackedExperts)]
    for experts in found:
        experts.anywhere = True
        experts.prepare()
    return found


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("family", "blocks"), [*((family, 1) for family in FAMILIES), ("mixtral", 2), ("gpt_oss", 4)]
)
def test_every_storage_of_experts(family, blocks, tmp_path):
    folder = packed_checkpoint(tmp_path, family, group_sizes=GROUPS, row_blocks=blocks)
    found, expected = loading.load(folder, packed=True), loading.load(folder)
    experts = by_kernels(found)
    assert experts
    assert all(module.kernels is not None for module in experts)
    assert found.hf_quantizer.is_compileable
    close(logits(found), logits(expected))
    # Streams were laid in tiles, and what is saved is what was loaded.
    assert {weight.layout for weight in packed_weights(found)} == {"tiles"}
    found.save_pretrained(tmp_path / "again")
    one, again = (load_file(f / "bitknap.safetensors") for f in (folder, tmp_path / "again"))
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    # So is what is read from them.
    assert torch.equal(logits(found.dequantize()), logits(expected))


def test_tiles_are_used_as_they_lie(packed, exact, tmp_path):
    convert(packed, "tiles", tmp_path / "tiles")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "tiles")
    before = {name: b.data_ptr() for name, b in found.named_buffers()}
    (first, _) = by_kernels(found)
    assert before == {name: b.data_ptr() for name, b in found.named_buffers()}
    assert first.kernels.up.buffer.data_ptr() in before.values()
    close(logits(found), logits(exact))


def test_tables_are_made_once(packed, exact):
    found = loading.load(packed, packed=True)
    (first, _) = by_kernels(found)
    kernels = first.kernels
    for _ in range(2):
        close(logits(found), logits(exact))
    assert first.kernels is kernels
    assert found.hf_quantizer.cache.used == 0
    # ... and again when the streams are elsewhere, or what is added to them is of another dtype.
    low = found.to(torch.bfloat16)
    assert first.kernels is not kernels
    close(logits(low), logits(copy.deepcopy(exact).to(torch.bfloat16)), 0.05)
    other = copy.deepcopy(found)
    assert torch.equal(logits(other), logits(found))


def test_on_a_cpu_nothing_is_done_unasked(packed):
    found = loading.load(packed, packed=True)
    assert all(getattr(module, "kernels", None) is None for module in packed_modules(found))
    assert not found.hf_quantizer.is_compileable
    assert {weight.layout for weight in packed_weights(found)} == {"plain"}
    assert not list(packed_modules(loading.load(packed, device="cpu")))


def test_gradients_go_the_other_way(packed, exact):
    (first, _) = by_kernels(loading.load(packed, packed=True))
    x = torch.randn(3, 16, requires_grad=True)
    index, weights = torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    first(x, index, weights).sum().backward()
    other = x.detach().clone().requires_grad_()
    exact.model.layers[0].mlp.experts(other, index, weights).sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    assert torch.equal(x.grad, other.grad)


@pytest.mark.parametrize("way", ["compile", "static cache", "dequantizing"])
def test_compiled(way, packed, exact):
    torch._dynamo.reset()
    found = loading.load(packed, packed=True)
    if way == "dequantizing":
        assert torch.equal(logits(torch.compile(found, backend="eager")), logits(exact))
        return
    by_kernels(found)
    if way == "compile":
        compiled = torch.compile(found, backend="aot_eager", fullgraph=True)
        close(logits(compiled), logits(exact))
        return
    compiling = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    static = {"cache_implementation": "static", "compile_config": compiling}
    assert torch.equal(found.generate(IDS, **how, **static), exact.generate(IDS, **how))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def refused(folder, caplog):
    """Return why kernels do not run a checkpoint's experts, as it is logged: once."""
    found = loading.load(folder, packed=True)
    with caplog.at_level(logging.WARNING, "bitknap.quantization.runtime.layers"):
        experts = by_kernels(found)
        assert all(module.kernels is None for module in experts)
        assert torch.equal(logits(found), logits(loading.load(folder)))
        by_kernels(found)
    (said,) = {record.getMessage() for record in caplog.records}
    assert len(caplog.records) == 1
    assert said.endswith("; these experts are dequantized when they are used")
    assert {weight.layout for weight in packed_weights(found)} == {"plain"}
    return said


def test_an_activation_that_kernels_do_not_have(tmp_path, caplog):
    folder = packed_checkpoint(tmp_path, "deepseek_v4", group_sizes=GROUPS)
    assert "DeepseekV4Experts: kernels do not have its activation" in refused(folder, caplog)


def test_groups_that_kernels_do_not_have(tmp_path, caplog):
    folder = packed_checkpoint(tmp_path, group_sizes=(8,))
    assert "group size 8: kernels take multiples of 32" in refused(folder, caplog)


def test_blocks_of_several_lengths(tmp_path, caplog):
    folder = packed_checkpoint(tmp_path, group_sizes=GROUPS, row_blocks=3)
    assert "its row blocks differ in length" in refused(folder, caplog)


@pytest.mark.parametrize("sources", [("fp8-block",), ("mxfp4",), ("bf16", "fp16")])
def test_kept_precisions_that_kernels_do_not_read(sources):
    module = nn.Module()
    module.__dict__["is_concatenated"], module.act_fn = True, nn.SiLU()
    weights = {}
    for name, rows, cols in (("up", 64, 128), ("down", 128, 64)):
        pieces = [
            Piece(f"x_{name}", 0, 1, Format.keep(kind), rows, cols, View(tensor=name, index=e))
            for e, kind in enumerate(sources)
        ]
        module.register_buffer(f"x_{name}", torch.zeros(1, dtype=torch.uint8))
        like = torch.empty(len(sources), rows, cols)
        weights[name] = PackedWeight(
            {f"x_{name}": module}, like, torch.float32, pieces, "plain", Cache()
        )
    with pytest.raises(InputError, match=f"kept in .*{sources[-1]}"):
        kernel_experts(module, weights)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4_text", "Llama4TextExperts does not go through transformers' interface"),
        ("mixtral", "activations in torch.float32: kernels take bfloat16 and float16"),
    ],
)
def test_what_is_said_on_a_gpu(family, reason, tmp_path, monkeypatch, caplog):
    found = loading.load(packed_checkpoint(tmp_path, family, group_sizes=GROUPS), packed=True)
    monkeypatch.setattr(PackedWeight, "device", torch.device("cuda"))
    with caplog.at_level(logging.WARNING, "bitknap.quantization.runtime.layers"):
        for _ in range(2):
            for module in packed_modules(found):
                module.prepare()
    (said,) = caplog.records
    assert said.getMessage() == f"{reason}; these experts are dequantized when they are used"


class Gated(nn.Module):
    """An experts module with an activation of its own."""

    def __init__(self, name, interleaved):
        super().__init__()
        self.name, self.is_concatenated = name, not interleaved

    def _apply_gate(self, both):
        gate, up = both.chunk(2, -1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return activate(gate, up, self.name)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_activations_are_recognized_by_what_they_compute(name, interleaved):
    assert activation_of(Gated(name, interleaved), True, torch.device("cpu")) == name


def test_an_ungated_activation():
    module = nn.Module()
    module.act_fn = nn.GELU(approximate="tanh")
    assert activation_of(module, False, torch.device("cpu")) == "gelu_tanh"
    module.act_fn = nn.Tanh()
    with pytest.raises(InputError, match="kernels do not have its activation"):
        activation_of(module, False, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# torch.compile, which a static cache brings in on a GPU, recommends TF32.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_kernels_run_them_unasked(dtype, packed):
    found = loading.load(packed, dtype, device="cuda")
    assert all(module.kernels is not None for module in packed_modules(found))
    with torch.no_grad():
        there = found(input_ids=IDS.cuda()).logits.cpu()
    close(there.float(), logits(loading.load(packed, torch.float32)), 0.05)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    eager = found.generate(IDS.cuda(), **how)
    assert torch.equal(found.generate(IDS.cuda(), **how, cache_implementation="static"), eager)
    back = found.cpu()
    assert all(module.kernels is None for module in packed_modules(back))
    assert logits(back).isfinite().all()
