"""What a model needs beside its weights, against what a real process takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bitknap
from bitknap.allocation.problem.device_memory import Device
from bitknap.benchmarks.models.random_checkpoint import generate
from bitknap.benchmarks.models.shapes import shape_of
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed.convert_layout import unit_bytes
from bitknap.quantization.packed.writer import fixed_bytes
from bitknap.quantization.runtime.serving_needs import serving_of
from bitknap.quantization.source.checkpoint import Checkpoint

CONTEXT, BATCH, CHUNK = 768, 2, 128
# Loads and generates in a process of its own; prints its peak over what imports take.
_RUN = f"""
import json, sys
import torch, bitknap
import transformers.models.olmoe.modeling_olmoe
from bitknap.quantization.runtime import loading

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])

before = peak()
model = bitknap.load(sys.argv[1], packed=True)
ids = torch.randint(3, 1000, ({BATCH}, {CONTEXT - 4}))
more = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, prefill_chunk_size={CHUNK})
out = model.generate(ids, return_dict_in_generate=True, pad_token_id=0, **more)
cache = sum(x.nbytes for layer in out.past_key_values.layers for x in (layer.keys, layer.values))
seen = out.past_key_values.get_seq_length()
print(json.dumps(dict(imports=before, taken=peak() - before, cache=cache, seen=seen)))
"""


def test_units_in_tiles_take_what_the_table_says(saved, tmp_path):
    source = Checkpoint.open(saved(tmp_path / "model"))
    layout = walk_headers(source.config, source.shapes)
    options = bitknap.formats((1, 3, 4), (8, "row"), (False, True), ("fp16", "compact"))
    needs = serving_of(source, layout, options)
    for item in options:
        plan = bitknap.BitPlan.uniform(layout.units, item)
        sizes = Device(size=1, context=1).unit_bytes(
            needs, layout.units, (item,), plan.nbytes[:, None]
        )
        assert sizes[:, 0].tolist() == unit_bytes(plan, "tiles").tolist()


def test_the_needs_of_a_bundled_model():
    needs = bitknap.serving("reference:mixtral")
    assert (needs.family, needs.longest, needs.itemsize) == ("mixtral", 256, 2)
    assert (needs.topk, needs.experts, needs.routed) == (2, 8, 512)
    assert needs.cache_bytes(100) == 100 * 2 * 4 * 128


@pytest.mark.campaign
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_real_process_takes_what_is_forecast(tmp_path):
    whole = shape_of("OLMoE-1B-7B")
    attention = {**(whole.attention or {}), "heads": 8, "kv_heads": 8}
    shape = replace(whole, attention=attention, experts=16, hidden=1024, size=512, vocabulary=4096)
    source = Checkpoint.open(generate(shape, tmp_path / "model", layers=2))
    layout = walk_headers(source.config, source.shapes)
    plan = bitknap.BitPlan.uniform(
        layout.units, bitknap.Format.parse("int3-g64-asym"), source.fingerprint
    )
    bitknap.quantize(source.folder, plan, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    real = json.loads(done.stdout.splitlines()[-1])
    needs = serving_of(source, layout)
    assert real["cache"] == needs.cache_bytes(real["seen"], BATCH)
    device = Device(size=1, context=CONTEXT, batch=BATCH, kind="cpu", chunk=CHUNK)
    entries = device.entries(needs, fixed_bytes(source, layout), layout.units)
    runtime, compiled = entries.pop("runtime"), entries.pop("compiled products")
    forecast = plan.total_bytes + sum(entries.values())
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        forecast += compiled
    assert 0.9 * real["taken"] <= forecast <= 1.5 * real["taken"], (real, entries)
    assert 0.8 * real["imports"] <= runtime <= 1.5 * real["imports"]
