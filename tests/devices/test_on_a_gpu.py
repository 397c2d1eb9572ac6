"""A whole job on a GPU, in both dtypes and every residency; none of it runs without one."""

import numpy as np
import pytest
import torch

import bitknap
from bitknap.estimators.sweep.host_layers import HostLayers
from bitknap.estimators.sweep.peak_memory import layer_bytes, peak_bytes
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint, resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
MODEL = "reference:mixtral"
MENU = bitknap.formats((2, 4), 64)
TOKENS = 2_048


def costs(**asked):
    calibration = bitknap.Calibration(tokens=TOKENS, **asked)
    return bitknap.estimate(MODEL, formats=MENU, calibration=calibration).cost


@pytest.fixture(scope="module")
def on_the_cpu():
    return costs(device="cpu")


def layered():
    """Return a limit of device memory that a layer keeps to, and the whole model does not."""
    source = Checkpoint.open(resolve(MODEL))
    layout = walk_headers(source.config, source.shapes)
    sizes = [find(source, layout, TOKENS, {"kl"}) for find in (layer_bytes, peak_bytes)]
    assert sizes[0] < sizes[1]
    return sum(sizes) // 2


def test_costs_in_float32_are_those_of_the_cpu(on_the_cpu):
    np.testing.assert_allclose(costs(device=DEVICE, dtype="float32"), on_the_cpu, rtol=0.01)


def test_costs_in_bfloat16_are_near(on_the_cpu):
    """Two and four bits lose far more than the noise of bfloat16."""
    np.testing.assert_allclose(costs(device=DEVICE).sum(0), on_the_cpu.sum(0), rtol=0.05)


@pytest.mark.parametrize("host", [None, 0])
def test_layers_come_from_memory_or_from_the_disk(host, on_the_cpu, monkeypatch):
    sent, real = [], HostLayers.send

    def send(self, place):
        sent.append(real(self, place))
        return sent[-1]

    monkeypatch.setattr(HostLayers, "send", send)
    limits = {"device_memory": layered(), "max_memory": host}
    found = costs(device=DEVICE, dtype="float32", **limits)
    np.testing.assert_allclose(found, on_the_cpu, rtol=0.01)
    assert any(sent) == (host is None)


def test_a_packed_model_is_evaluated(tmp_path):
    table = bitknap.estimate(MODEL, bitknap.DataFree(), MENU)
    plan = bitknap.solve(bitknap.Problem(table, bitknap.Budget.parse("3bpw"))).plan
    asked = bitknap.Calibration(device=DEVICE)
    bitknap.quantize(MODEL, plan, tmp_path / "out", calibration=asked)
    losses = [
        bitknap.evaluate(tmp_path / "out", MODEL, tokens=TOKENS, evaluation=where).kl.mean()
        for where in (bitknap.Evaluation(device=DEVICE), bitknap.Evaluation(device="cpu"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
