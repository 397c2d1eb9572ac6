"""Compile the kernels of many cases in parallel before timing, into Triton's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from bitknap.benchmarks.kernels.cases import Case, experts_of, routed
from bitknap.kernels.moe import moe


def compile_all(cases: Sequence[Case], processes: int, say: Callable[[str], None]) -> None:
    """Run every case once on the GPU; cases with the same weights share a process."""
    alike: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        alike.setdefault((*case.weights_name, case.dtype), []).append(case)
    # Groups with most widths take longest: they come first, and each is split for two processes.
    groups = [part for group in alike.values() for part in (group[::2], group[1::2]) if part]
    groups.sort(key=lambda group: -len(group[0].mix))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_compile, group) for group in groups]):
            say(f"compiled {done.result()}")


def _compile(cases: Sequence[Case]) -> str:
    experts = experts_of(cases[0], "cuda")
    for case in cases:
        moe(*routed(case, "cuda", 0), experts)
    torch.cuda.synchronize()
    return ", ".join(case.name for case in cases)
