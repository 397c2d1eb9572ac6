"""Whole jobs compute on the device that is asked for, and give what the CPU gives."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import bitknap
from bitknap.errors import InputError
from bitknap.quantization.source import devices
from bitknap.quantization.source.devices import device_of, dtype_of, memory_limit

SCRIPT = Path(__file__).parent / "pretended.py"


@pytest.mark.campaign
def test_no_tensor_is_left_behind(tmp_path):
    """On a stand-in that refuses tensors elsewhere, values are those of the CPU up to rounding."""
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    families = Counter(name.partition(":")[0] for name in found)
    assert families == {"mixtral": 16, "deepseek_v2": 5, "gpt_oss": 5}
    # Gains come from small differences of distributions.
    assert {name: far for name, far in found.items() if far > 1e-3} == {}


def test_auto_is_a_gpu_if_there_is_one(monkeypatch):
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("auto") == torch.device("cuda", 0)


def test_products_are_bfloat16_on_a_gpu_that_has_it(monkeypatch):
    cpu, gpu, found = torch.device("cpu"), torch.device("cuda", 0), [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[0])
    assert dtype_of("auto", cpu) == dtype_of("float32", gpu) == torch.float32
    assert dtype_of("auto", gpu) == dtype_of(torch.bfloat16, cpu) == torch.bfloat16
    found[0] = (7, 5)
    assert dtype_of("auto", gpu) == torch.float32


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_a_name_that_is_no_device_is_refused(name):
    with pytest.raises(InputError, match=f"device: '{name}' is no device; give auto, cpu, cuda"):
        device_of(name)


def test_a_device_that_is_not_there_says_what_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "_total", lambda number: 24 << 30)
    assert device_of("cuda") == torch.device("cuda", 0)
    with pytest.raises(InputError) as error:
        device_of("cuda:1")
    assert str(error.value) == (
        "device: cuda:1 is not there; this machine has cpu, cuda:0 with 24 GiB"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_requests_refuse_a_device_that_is_not_there():
    with pytest.raises(InputError, match=r"device: cuda is not there; this machine has cpu$"):
        bitknap.Calibration(device="cuda")
    with pytest.raises(InputError, match="device: cuda is not there"):
        bitknap.evaluate("reference:mixtral", evaluation=bitknap.Evaluation(device="cuda"))


def test_the_limit_is_that_of_the_memory_where_it_computes(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 20))
    assert memory_limit(cpu, None, 5) is None
    assert memory_limit(cpu, 7, 5) == 7
    assert memory_limit(gpu, 7, None) == 10
    assert memory_limit(gpu, 7, 5) == 5
