"""How fast a machine does the parts of the work: typical figures, or those of a short probe."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitknap.allocation.problem.format import Format
from bitknap.api.requests import default_formats
from bitknap.estimators.costs.weighed_errors import stored_alike
from bitknap.estimators.measuring.kl_replay import BATCH_TOKENS
from bitknap.quantization.models.headers_only import experts_per_token, text_config
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.rounding.methods import RTN, Hqq, round_trip
from bitknap.quantization.source.checkpoint import Checkpoint

# Seconds that a probe spends on products, on rounding to nearest, and on HQQ.
_PRODUCTS, _ROUNDING, _HQQ = 6.0, 8.0, 2.0
# Bytes written and read to measure a disk, and weights rounded at a time.
_FILE, _WEIGHTS = 1 << 27, 1 << 20

# How many times as long as rounding to nearest other rounding takes: to types of ggml, and to grids
# with a code for zero (benchmarks/results/rounding_rates.md).
_GGML = {
    "q8_0": 0.22,
    "q6_k": 2,
    "q5_1": 6.6,
    "q5_k": 7,
    "q5_0": 1.7,
    "q4_1": 6.5,
    "q4_k": 6.6,
    "q4_0": 1.7,
    "iq4_nl": 20,
    "iq4_xs": 21,
    "mxfp4": 0.33,
    "q3_k": 2.4,
    "iq3_s": 19,
    "iq3_xxs": 24,
    "q2_k": 7.8,
    "iq2_s": 12,
    "iq2_xs": 36,
    "iq2_xxs": 18,
    "iq1_m": 8.9,
    "iq1_s": 11,
}
_MIDTREAD = 6.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates of a machine.

    Attributes:
        flops: float32 operations (products and sums) per second in an expert's products.
        rtn: weights per second rounded to nearest in one format.
        hqq: the same by HQQ.
        gptq: the same by GPTQ.
        reads: bytes per second read from the model's disk.
        streams: bytes per second written to temporary files and read again.
        cores: cores that this holds for.
        memory: bytes of memory; None if it does not matter.
        probed: whether the rates were measured on the machine itself.
    """

    flops: float
    rtn: float
    hqq: float
    gptq: float
    reads: float
    streams: float
    cores: int
    memory: int | None = None
    probed: bool = False

    def named(self, cores: int | None, memory: int | None) -> Machine:
        """Return a machine with other cores, which compute as fast as these, and other memory."""
        more = 1.0 if cores is None else cores / self.cores
        return replace(
            self,
            flops=self.flops * more,
            rtn=self.rtn * more,
            hqq=self.hqq * more,
            gptq=self.gptq * more,
            cores=self.cores if cores is None else cores,
            memory=self.memory if memory is None else memory,
        )

    def rounding(self, method: str, format: Format) -> float:
        """Return the seconds that a method takes to round a weight to a format.

        Args:
            method: name of a rounding method; of one that is not known, to nearest.
            format: the format, of ggml the type that rows are stored as.
        """
        if format.kind == "ggml":
            return _GGML.get(format.source, 0.0) / self.rtn
        rates = {"hqq": self.hqq, "gptq": self.gptq, "midtread": self.rtn / _MIDTREAD}
        return 1 / rates.get(method, self.rtn)


# Two cores: rates of rounding and packing are in the middle of the range measured in
# benchmarks/results/quantize.md.
TYPICAL = Machine(
    flops=1e11, rtn=2e7, hqq=1e6, gptq=2e6, reads=2e8, streams=4e8, cores=2, memory=None
)


def probe(source: Checkpoint, layout: Layout) -> Machine:
    """Measure the rates of this machine at a model's shapes; takes about 20 seconds.

    Weights and inputs are random; of the model's own files only some are read, where they are on
    this machine.

    Args:
        source: the model.
        layout: its units.
    """
    largest = max(layout.layers, key=lambda layer: layer.hidden * layer.intermediate)
    topk = max(experts_per_token(text_config(source.config)) or [1]) or 1
    tokens = max(1, BATCH_TOKENS * topk // largest.experts)
    rtn = _rounding(largest.hidden)
    with tempfile.TemporaryDirectory(prefix="bitknap-") as folder:
        file = Path(folder) / "stream"
        content = os.urandom(1 << 20) * (_FILE >> 20)
        written = _seconds(lambda: _write(file, content))
        read = _seconds(lambda: _read(file))
    own = max(source.folder.glob("*.safetensors"), key=lambda f: f.stat().st_size, default=None)
    return Machine(
        flops=_products(largest.hidden, largest.intermediate, tokens, 3 if largest.gated else 2),
        rtn=rtn,
        hqq=_hqq(largest.hidden),
        gptq=rtn * TYPICAL.gptq / TYPICAL.rtn,
        reads=_FILE / read if own is None else _own_rate(own),
        streams=2 * _FILE / (written + read),
        cores=torch.get_num_threads(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        probed=True,
    )


@torch.inference_mode()
def _products(hidden: int, middle: int, tokens: int, matrices: int) -> float:
    """Return operations per second of an expert's products, each time with other weights."""
    count = max(2, min(8, (1 << 28) // (4 * hidden * middle)))
    first = [torch.randn(middle, hidden) for _ in range(count)]
    second = [torch.randn(hidden, middle) for _ in range(count)]
    x = torch.randn(tokens, hidden)
    done, spent = 0, 0.0
    while spent < _PRODUCTS:
        started = time.perf_counter()
        for into, out in zip(first, second, strict=True):
            h = torch.nn.functional.silu(x @ into.T)
            if matrices == 3:
                h = h * (x @ into.T)
            _ = h @ out.T
        spent += time.perf_counter() - started
        done += 2 * matrices * count * tokens * hidden * middle
    return done / spent


def _rounding(cols: int) -> float:
    """Return weights per second, over all formats that rows of this length tell apart."""
    weights = torch.randn(1, max(1, _WEIGHTS // (8 * cols)), cols) * 0.02
    done, spent = 0, 0.0
    grids = list(stored_alike(default_formats(), cols))
    while spent < _ROUNDING:
        for grid in grids:
            spent += _seconds(lambda grid=grid: round_trip(weights, grid, RTN))  # type: ignore[misc]
            done += weights.numel()
            if spent > 2 * _ROUNDING:
                break
    return done / spent


def _hqq(cols: int) -> float:
    weights = torch.randn(1, max(1, _WEIGHTS // (8 * cols)), cols) * 0.02
    grid = next(iter(stored_alike(default_formats(), cols)))
    done, spent = 0, 0.0
    while spent < _HQQ:
        spent += _seconds(lambda: round_trip(weights, grid, Hqq()))
        done += weights.numel()
    return done / spent


def _own_rate(file: Path) -> float:
    size = min(2 * _FILE, file.stat().st_size)
    return size / _seconds(lambda: _read(file, size))


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _read(file: Path, size: int = -1) -> None:
    with file.open("rb", buffering=0) as content:
        if hasattr(os, "posix_fadvise"):  # off the disk, not out of the system's memory
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        content.read(size)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-9)
