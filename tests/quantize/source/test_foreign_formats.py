"""What is quantized in a way that is not read is refused, and nothing else is."""

import json

import pytest
import torch
from safetensors.torch import load_file

import bitknap
from bitknap.api.inspection import inspect
from bitknap.errors import ModelError
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.source_config import quantization_of, unquantized
from bitknap.testing import write_tensors

QUERY = "model.layers.0.self_attn.q_proj.weight"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

FOREIGN = {
    "bitsandbytes 4-bit": {
        f"{QUERY}": torch.zeros(800, 1, dtype=torch.uint8),
        f"{QUERY}.absmax": torch.zeros(25),
        f"{QUERY}.quant_map": torch.zeros(16),
        f"{QUERY}.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
    },
    "bitsandbytes 8-bit": {
        QUERY: torch.zeros(16, 40, dtype=torch.int8),
        QUERY.replace("weight", "SCB"): torch.zeros(16),
    },
    "GPTQ or AWQ": {
        QUERY.replace("weight", "qweight"): torch.zeros(5, 16, dtype=torch.int32),
        QUERY.replace("weight", "qzeros"): torch.zeros(1, 2, dtype=torch.int32),
        QUERY.replace("weight", "scales"): torch.zeros(1, 16, dtype=torch.float16),
    },
    "compressed-tensors": {
        f"{QUERY}_packed": torch.zeros(16, 5, dtype=torch.int32),
        f"{QUERY}_scale": torch.zeros(16, 1),
        f"{QUERY}_shape": torch.zeros(2, dtype=torch.int64),
    },
    "ModelOpt NVFP4": {
        QUERY: torch.zeros(16, 20, dtype=torch.uint8),
        f"{QUERY}_scale": torch.zeros(16, 3).to(E4M3),
        f"{QUERY}_scale_2": torch.tensor(1.0),
    },
    "HQQ": {QUERY.replace("weight", "W_q"): torch.zeros(8, 40, dtype=torch.uint8)},
    "quanto": {
        f"{QUERY}._data": torch.zeros(16, 40, dtype=torch.int8),
        f"{QUERY}._scale": torch.zeros(16, 1),
    },
    "torchao": {
        QUERY.replace("weight", "_weight_qdata"): torch.zeros(16, 40, dtype=torch.int8),
        QUERY.replace("weight", "_weight_scale"): torch.zeros(16, 1),
    },
    "EXL2": {QUERY.replace("weight", "q_weight"): torch.zeros(5, 16, dtype=torch.int32)},
    "EXL3": {QUERY.replace("weight", "trellis"): torch.zeros(1, 3, 64, dtype=torch.int16)},
    "F8_E4M3 without scales": {QUERY: torch.zeros(16, 40).to(E4M3)},
    "F8_E5M2 without scales": {QUERY: torch.zeros(16, 40).to(E5M2)},
    "F8_E4M3 without scales in a vector": {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(16).to(E4M3)
    },
    "I8": {QUERY: torch.zeros(16, 40, dtype=torch.int8)},
    "U8": {QUERY: torch.zeros(16, 45, dtype=torch.uint8)},
    "I32": {QUERY: torch.zeros(16, 5, dtype=torch.int32)},
    "scales without float8 weights": {f"{QUERY}_scale_inv": torch.ones(1, 1)},
    "scales without float8 weights of a channel": {f"{QUERY}_scale": torch.ones(16, 1)},
    "MXFP4 in shapes that are not known": {
        f"{QUERY}_blocks": torch.zeros(16, 20, dtype=torch.uint8),
        f"{QUERY}_scales": torch.zeros(16, 2, dtype=torch.uint8),
    },
}


@pytest.mark.parametrize("format", FOREIGN)
def test_what_is_not_decoded_is_refused(format, plain, tmp_path):
    tensors = load_file(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    folder = write_tensors(tmp_path / "m", tensors | FOREIGN[format], config)
    for refuse in (bitknap.load, inspect, lambda f: bitknap.evaluate(f, tokens=32)):
        with pytest.raises(ModelError) as caught:
            refuse(folder)
        said = str(caught.value)
        assert "\n" not in said
        assert "self_attn.q_proj" in said
        assert format.split(" in a ")[0].split(" of a channel")[0] in said
        assert "dequantize the checkpoint to 16 bits first" in said


def test_every_tensor_of_every_format_is_counted(plain, tmp_path):
    tensors = load_file(plain / "model.safetensors")
    tensors |= FOREIGN["HQQ"] | FOREIGN["GPTQ or AWQ"]
    with pytest.raises(
        ModelError, match=r"q_proj\.qweight and 1 more stored as GPTQ.*W_q stored as HQQ"
    ):
        Checkpoint.open(write_tensors(tmp_path / "m", tensors, {}))


@pytest.mark.parametrize("method", ["awq", "fp8", "mxfp4", "bitsandbytes"])
def test_a_config_that_says_quantized_of_plain_weights(method, plain, tmp_path):
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    folder = write_tensors(tmp_path / "m", load_file(plain / "model.safetensors"), config)
    with pytest.raises(ModelError, match=rf"\(method {method}\), but no tensor is; save"):
        bitknap.load(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_that_are_no_weights_are_left_alone(dtype, plain, tmp_path):
    tensors = load_file(plain / "model.safetensors")
    tensors |= {
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=dtype),
        "model.layers.0.mlp.tid2eid": torch.ones(4, 2, dtype=dtype),
        "model.layers.0.self_attn.k_scale": torch.tensor(1.0),
        "model.layers.0.router.per_expert_scale": torch.ones(4),
    }
    source = Checkpoint.open(write_tensors(tmp_path / "m", tensors, {}))
    assert source.headers.keys() == tensors.keys()


def test_settings_of_a_part_of_the_config_count():
    settings = {"quant_method": "fp8"}
    nested = {"text_config": {"quantization_config": settings, "a": 1}, "b": 2}
    assert quantization_of(nested) == settings
    assert unquantized(nested) == {"text_config": {"a": 1}, "b": 2}
    assert quantization_of({"compression_config": settings}) == settings
    assert unquantized({"compression_config": settings, "b": 2}) == {"b": 2}


def test_a_dtype_that_nothing_is_computed_in_becomes_that_of_decoded_weights(plain, tmp_path):
    config = json.loads((plain / "config.json").read_text()) | {"dtype": "float8_e4m3fn"}
    folder = write_tensors(tmp_path / "m", load_file(plain / "model.safetensors"), config)
    assert bitknap.load(folder).dtype == torch.bfloat16
    assert unquantized({"torch_dtype": "int8", "b": 2}) == {"torch_dtype": "bfloat16", "b": 2}
    for dtype in ("float16", "float32", "auto", None, "nonsense"):
        assert unquantized({"dtype": dtype}) == {"dtype": dtype}
