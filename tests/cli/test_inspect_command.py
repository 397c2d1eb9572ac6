"""`bitknap inspect`: what a plan could be and what it would take, from headers alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

from bitknap.allocation import Format, Units
from bitknap.allocation.codecs.ggml import TYPES
from bitknap.api.forecasts.forecasting import STEPS, active_weights
from bitknap.api.forecasts.machine import TYPICAL
from bitknap.api.inspection import inspect, report
from bitknap.benchmarks.models.shapes import config, headers, shape_of
from bitknap.cli import main
from bitknap.errors import InputError
from bitknap.estimators.sweep.peak_memory import layer_bytes, peak_bytes
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.low_bit_codes import logical
from bitknap.quantization.source.safetensors_header import DTYPES, TensorInfo
from bitknap.quantization.targets.catalog import TARGETS, fits
from bitknap.testing import SIZES


def seen(name, folder, *, published=False, layers=None):
    """Return the checkpoint of a real model's headers, without weights."""
    shape = shape_of(name)
    stored = {
        tensor: TensorInfo(dtype, size, folder, 0, math.prod(size) * DTYPES[dtype].itemsize)
        for tensor, (dtype, size) in headers(shape, layers, published=published).items()
    }
    text = config(shape, layers)
    known, low = logical(text, stored)
    return Checkpoint(folder=folder, config=text, headers=known, low_bit=low)


@pytest.mark.slow
def test_figures_of_a_real_model(tmp_path):
    found = report(seen("OLMoE-1B-7B", tmp_path))
    assert found["architecture"] == "OlmoeForCausalLM"
    assert (found["moe_layers"], found["experts_per_layer"]) == (16, 64)
    assert found["units"] == 3072
    assert found["weights_in_units"] == 6_442_450_944
    assert found["source_precision"] == "bf16"
    assert found["source_bytes"] == pytest.approx(2 * 6.92e9, rel=0.001)
    # 1 bit and an fp16 scale a row; 8 bits and an fp16 scale and zero every 32.
    assert found["least_bpw"] == round(1 + (2 * 16 / 2048 + 16 / 1024) / 3, 4)
    assert found["most_bpw"] == 9
    rows = 16 * 64 * (2 * 1024 + 2048)
    assert found["uniform_bytes"]["int4-row-sym"] == 6_442_450_944 // 2 + 2 * rows
    fixed = found["kept_bytes_at_most"]
    assert found["smallest_checkpoint_bytes"] - fixed == 6_442_450_944 // 8 + 2 * rows
    assert found["largest_checkpoint_bytes"] - fixed == 6_442_450_944 * 9 // 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "total"),
    [("gpt-oss-20b", "mxfp4", 13.76e9), ("DeepSeek-V3", "fp8-block", None)],
)
def test_a_model_in_few_bits(name, precision, total, tmp_path):
    layers = None if total else 5
    low = report(seen(name, tmp_path, published=True, layers=layers))
    plain = report(seen(name, tmp_path, layers=layers))
    assert low["source_precision"] == precision
    assert low["weights_in_units"] == plain["weights_in_units"]
    assert low["uniform_bytes"] == plain["uniform_bytes"]
    assert low["source_bytes"] < plain["source_bytes"]
    if total:  # bytes of the published checkpoint
        assert low["source_bytes"] == pytest.approx(total, rel=0.002)


@pytest.mark.slow
def test_steps_take_more_the_more_they_do(tmp_path):
    steps = {step["name"]: step for step in report(seen("OLMoE-1B-7B", tmp_path))["steps"]}
    assert list(steps) == [
        "estimate --estimator data-free",
        "estimate, with a text",
        "quantize --method rtn",
        "quantize --method hqq",
        "quantize --method gptq",
    ]
    largest = 2 * 50304 * 2048  # the embedding
    assert steps["quantize --method rtn"]["memory_bytes"] == 3 * largest // 2 + (1 << 29)
    # 4 bytes a weight, of one layer in 16.
    whole = 4 * 6.9e9
    assert whole / 16 < steps["estimate, with a text"]["memory_bytes"] < whole / 4
    assert whole / 16 < steps["quantize --method gptq"]["memory_bytes"] < whole / 2
    seconds = [step["seconds"] for step in steps.values()]
    assert seconds[0] < seconds[2] < seconds[4] < seconds[3]
    read = 2 * 6_442_450_944 / TYPICAL.reads
    assert seconds[2] == round(6_442_450_944 / TYPICAL.rtn + read) + 5


@pytest.mark.slow
def test_writing_takes_longest_where_ggml_rounds(tmp_path):
    exports = report(seen("OLMoE-1B-7B", tmp_path))["exports"]
    for part in ("estimate_seconds", "write_seconds"):
        seconds = {name: one[part] for name, one in exports.items()}
        assert seconds["mlx"] < seconds["compressed-tensors"] < seconds["gguf"]
        tools = ("gptqmodel", "autoround", "llm-compressor", "modelopt", "torchao")
        assert all(seconds[name] is None for name in tools)


def test_rates_of_rounding_are_those_of_the_method_and_of_the_type():
    one = 1 / TYPICAL.rtn
    assert TYPICAL.rounding("rtn", Format(3, 64)) == pytest.approx(one)
    assert TYPICAL.rounding("hqq", Format(3, 64)) == pytest.approx(1 / TYPICAL.hqq)
    assert 5 * one < TYPICAL.rounding("midtread", Format(3, 64, symmetric=True)) < 8 * one
    fast, slow = (TYPICAL.rounding("ggml", Format.ggml(name)) for name in ("q8_0", "iq2_xs"))
    assert fast < one < 20 * one < slow
    assert all(TYPICAL.rounding("ggml", Format.ggml(name)) for name in TYPES if name != "f16")


def units(rows, cols):
    return Units.build(
        layer=[0, 0],
        role=["routed", "routed"],
        expert=[0, 0],
        projection=["gate", "down"],
        rows=[rows, cols],
        cols=[cols, rows],
    )


def test_runtimes_that_could_hold_a_model():
    found = {fit.target.name: fit for fit in fits(units(768, 2048))}
    assert list(found) == list(TARGETS.names())
    assert all(fit.possible and not fit.reason for fit in found.values())
    assert found["gptqmodel"].groups == (32, 64, 128)
    assert found["torchao"].groups == found["vllm"].groups == (32, 64, 128, 256)
    assert found["mlx"].bits == (2, 3, 4, 5, 6, 8)


def test_rows_that_blocks_do_not_divide():
    found = {fit.target.name: fit for fit in fits(units(2880, 2880))}  # gpt-oss
    assert all(fit.possible for fit in found.values())
    assert found["gptqmodel"].groups == found["mlx"].groups == (32, 64)
    assert found["gguf"].bits == (4, 5, 8)
    assert found["gguf"].reason == (
        "routed gate has 2880 inputs, not a multiple of 256: K-quants and IQ types, which are "
        "all below 4 bits, fall back to blocks of 32"
    )
    assert found["modelopt"].reason == (
        "routed gate has 2880 inputs, not a multiple of 128: no W4A16, whose groups are 128; "
        "NVFP4 and 8 bits remain"
    )


def test_runtimes_that_cannot_hold_a_model():
    found = {fit.target.name: fit for fit in fits(units(24, 64))}
    possible = [name for name, fit in found.items() if fit.possible]
    assert possible == ["vllm", "llm-compressor", "torchao"]
    assert found["gptqmodel"].reason == "routed gate has 24 outputs, not a multiple of 32"
    assert found["gguf"].reason == "routed down has 24 inputs, not a multiple of 32"
    assert found["modelopt"].reason == "routed down has 24 inputs, not a multiple of 16"
    alone = "no group size divides all rows; one scale a row only"
    assert found["torchao"].reason == found["llm-compressor"].reason == alone
    assert all(fit.bits == () for fit in found.values() if not fit.possible)


def test_tables_for_people(made, capsys):
    main(["inspect", str(made.model)])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("quantize --method gptq", "gguf", "no", "24 outputs", "source precision"):
        assert part in text


def test_a_hub_model_is_looked_at_and_not_downloaded(made, monkeypatch):
    """Only the configuration is fetched, and the sizes of what stands beside it count."""
    whole = inspect(made.model)
    source = Checkpoint.open(made.model)
    monkeypatch.setattr("bitknap.api.inspection.Checkpoint.look", lambda _: source)
    assert inspect("some/model") == whole

    def refuse(*_, **__):
        raise OSError("offline")

    monkeypatch.undo()
    for name in ("model_info", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", refuse)
    with pytest.raises(
        InputError, match=r"some/model: no such folder, and it cannot be downloaded from the hub"
    ):
        inspect("some/model")


def test_experts_per_token_may_be_a_list_by_layer(tmp_path):
    """As HunYuan has it: the time counts each layer's own number, the memory the largest."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_experts_per_tok"}
    model = HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**sizes, moe_topk=[1, 4]))
    model.save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    layout = walk_headers(source.config, source.shapes)
    idle = 3 * (3 * SIZES["hidden_size"] * SIZES["intermediate_size"])  # of layer 0
    every = sum(math.prod(info.shape) for info in source.headers.values())
    assert active_weights(source, layout) == every - idle
    assert len(inspect(tmp_path)["steps"]) == len(report(source)["steps"])
    same = replace(source, config={**source.config, "moe_topk": 4})
    for bytes_of in (peak_bytes, layer_bytes):
        peaks = [bytes_of(x, layout, 64, {"moments"}) for x in (source, same)]
        assert peaks[0] == peaks[1]


def test_everything_is_plain_json(made, document):
    found = document("inspect", made.model, "--include", "attention")
    assert found["units"] > 24
    assert {type(step["seconds"]) for step in found["steps"]} == {int}
    assert np.isfinite(found["least_bpw"])


@pytest.mark.slow
def test_the_forecast_has_every_part_in_both_residencies(tmp_path):
    source = seen("OLMoE-1B-7B", tmp_path)
    found = report(source)
    rows = {(row["residency"], row["step"]): row for row in found["forecast"]}
    assert list(rows) == [(way, step) for way in ("whole", "by layer") for step in STEPS]
    assert rows["by layer", "gains"]["memory_bytes"] < rows["whole", "gains"]["memory_bytes"]
    assert (
        rows["by layer", "group readings"]["seconds"] > rows["whole", "group readings"]["seconds"]
    )
    assert {row["fits"] for row in rows.values()} == {None}
    main_job = next(x for x in found["steps"] if x["name"] == "estimate, with a text")
    parts = [rows["by layer", step] for step in STEPS[:5]]
    assert main_job["seconds"] == pytest.approx(sum(x["seconds"] for x in parts) + 5, abs=5)
    assert main_job["memory_bytes"] == max(x["memory_bytes"] for x in parts)


@pytest.mark.slow
def test_a_named_machine_is_faster_with_more_cores_and_may_be_too_small(tmp_path):
    source = seen("OLMoE-1B-7B", tmp_path)
    large = report(source, machine=TYPICAL.named(16, 8 << 30))
    few = report(source, machine=TYPICAL.named(1, None))
    for one, other in zip(large["forecast"], few["forecast"], strict=True):
        assert one["seconds"] <= other["seconds"]
        assert one["fits"] == (one["memory_bytes"] <= 8 << 30)
    assert {row["residency"] for row in large["forecast"] if not row["fits"]} == {"whole"}


def test_a_probe_measures_this_machine(made, monkeypatch, document):
    for name in ("_PRODUCTS", "_ROUNDING", "_HQQ"):
        monkeypatch.setattr(f"bitknap.api.forecasts.machine.{name}", 0.01)
    monkeypatch.setattr("bitknap.api.forecasts.machine._FILE", 1 << 20)
    found = document("inspect", made.model, "--probe", "--cores", "3", "--device-memory", "2GiB")
    machine = found["machine"]
    assert machine["probed"]
    assert (machine["cores"], machine["memory"]) == (3, 2 << 30)
    assert min(machine[name] for name in ("flops", "rtn", "hqq", "gptq", "reads", "streams")) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cores", "0"), "--cores 0: must be a whole number of at least 1"),
        (("--device-memory", "much"), "'much' is not a size"),
    ],
)
def test_machines_that_cannot_be_are_refused(made, refused, words, said):
    assert said in refused("inspect", made.model, *words)
