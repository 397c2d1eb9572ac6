"""Time of a call in a CUDA graph, on weights that no cache holds; and the device's peak rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

GRAPH_CALLS = 20
RUNS = 100
_WARM = 3
_LEAST_RUNS, _SECONDS = 10, 2.0  # after the minimum, runs continue only within this time
_CEILING_BYTES = 1 << 30
_MATMUL = 8192

Call = Callable[[], object]


def memory_roof(ceilings: Mapping[str, float]) -> float:
    """Return the peak bytes per second: reading, or reading and writing."""
    return max(ceilings["read"], ceilings["copy"])


def seconds_of(
    calls: Sequence[Call], device: str, runs: int = RUNS, *, graph: bool = True
) -> dict[str, Any]:
    """Return the median seconds of one call, and how they were measured.

    Args:
        calls: the same call on different weights and inputs; they take turns.
        device: "cuda" or "cpu".
        runs: number of measurements, or as many as time allows.
        graph: whether calls may be captured, because they read nothing back to the host.
    """
    if device == "cpu":
        return _on_cpu(calls, runs)
    turns = [calls[i % len(calls)] for i in range(max(GRAPH_CALLS, len(calls)))]
    run = _in_a_graph if graph else _one_by_one
    return {**_summary(run(turns, runs), len(turns)), "graph": graph}


def _on_cpu(calls: Sequence[Call], runs: int) -> dict[str, Any]:
    spent = []
    for run in range(runs):
        start = time.perf_counter()
        calls[run % len(calls)]()
        spent.append(time.perf_counter() - start)
    return {**_summary(spent, 1), "graph": False}


def _in_a_graph(turns: Sequence[Call], runs: int) -> list[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM):
            for call in turns:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turns:
            call()
    graph.replay()
    return _timed(graph.replay, runs)


def _one_by_one(turns: Sequence[Call], runs: int) -> list[float]:
    def all_of_them() -> None:
        for call in turns:
            call()

    all_of_them()
    return _timed(all_of_them, runs)


def _timed(run: Callable[[], object], runs: int) -> list[float]:
    spent: list[float] = []
    while len(spent) < runs and (len(spent) < _LEAST_RUNS or sum(spent) < _SECONDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) / 1e3)
    return spent


def _summary(spent: Sequence[float], calls: int) -> dict[str, Any]:
    each = sorted(seconds / calls for seconds in spent)
    low, high = (each[int(share * (len(each) - 1))] for share in (0.1, 0.9))
    return {"seconds": statistics.median(each), "low": low, "high": high, "runs": len(each)}


def ceilings(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Return the peak rates of the device: bytes per second read and copied, and matmul FLOP/s."""
    small = device == "cpu"
    size, side, runs = (1 << 22, 256, 3) if small else (_CEILING_BYTES, _MATMUL, RUNS)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # int32 sums read all and write nothing; additions bound float sums on some devices.
    words = source.view(torch.int32)
    a = torch.randn(side, side, device=device).to(dtype)
    read = seconds_of([lambda: words.amax()], device, runs)["seconds"]
    copied = seconds_of([lambda: target.copy_(source)], device, runs)["seconds"]
    product = seconds_of([lambda: a @ a], device, max(3, runs // 5))["seconds"]
    return {
        "read": source.nbytes / read,
        "copy": 2 * source.nbytes / copied,
        "matmul": 2 * side**3 / product,
    }
