"""Measure launches on the local GPU and write its table, which overrides the heuristic.

    python -m bitknap.kernels.tune --experts 128 --topk 8 --hidden 2048 --intermediate 768 -o FILE

Weights are random, with the given widths mixed; speed does not depend on their values. Calls are
captured in CUDA graphs that cycle through the weights of several layers, so that weights come from
memory and not from a cache; the median time decides. Move the file to `configs/` beside this one.
Most of the time goes into compiling: set --processes to the number of cores.

No table is shipped yet.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bitknap.arguments import add_output
from bitknap.disk.atomic import write_whole
from bitknap.disk.outputs import check_output
from bitknap.errors import InputError
from bitknap.kernels.experts import Experts
from bitknap.kernels.launch import (
    Case,
    Device,
    Launch,
    Tile,
    file_name,
    heuristic,
    write_table,
)
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.kernels.moe import device_of, moe
from bitknap.kernels.random_experts import made_up_experts

Projection = Literal["gate_up", "down"]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_COPIES = 8  # layers that a graph cycles through, unless fewer take `_MEMORY` bytes
_MEMORY = 1 << 30  # well past any second-level cache
_CALLS, _ROUNDS = 20, 30


def starts(case: Case, device: Device) -> list[Launch]:
    """Return the initial launches: the heuristic's, and some of other paths and tiles."""
    first = heuristic(case, device)
    if first.path == "decode":
        return [first]
    launches = [first]
    for tokens in (16, 32, 64, 128):
        tile = Tile(rows=64, warps=4 if tokens <= 32 else 8, stages=2)
        launches.append(Launch(path="grouped", tokens=tokens, gate_up=tile, down=tile))
    dense = Launch(path="dense", tokens=64, gate_up=Tile(), down=Tile())
    return list(dict.fromkeys([*launches, dense]))


def changes(launch: Launch, projection: Projection) -> list[Launch]:
    """Return launches that tile one projection differently; the other is tuned independently."""
    decode, now = launch.path == "decode", getattr(launch, projection)
    if launch.path == "dense":
        return []
    rows = (32, 64) if projection == "gate_up" else (64, 128)
    splits = (1, 2, 4, 8) if decode and projection == "down" else (1,)
    stages = (2, 3, 4) if decode and projection == "gate_up" else (2, 3)
    return [
        replace(launch, **{projection: replace(now, rows=r, split=s, stages=n, columns=c)})
        for r, s, n, c in product(rows, splits, stages, (64, 128))
    ]


def tune(
    cases: Sequence[Case],
    bits: Sequence[int] = (2, 3, 4, 8),
    dtype: torch.dtype = torch.bfloat16,
    processes: int = 1,
) -> list[tuple[Case, Launch, float]]:
    """Return the fastest launch for each number of tokens, and its seconds.

    From every initial launch, the tilings of gate and up are tried, then, with the best, those of
    down.

    Args:
        cases: the shapes of one layer at several numbers of tokens.
        bits: widths, assigned to experts in turn.
        dtype: dtype of activations.
        processes: number of processes that compile everything first.

    Raises:
        InputError: there is no GPU, or the cases are from several layers.
    """
    if not torch.cuda.is_available():
        raise InputError("tune: no GPU is available, and launches are measured on one")
    if len({replace(case, tokens=1) for case in cases}) != 1:
        raise InputError(f"tune: {len(cases)} cases of several layers; tune one layer at a time")
    experts, hidden, intermediate = cases[0].experts, cases[0].hidden, cases[0].intermediate
    device = device_of(torch.cuda.current_device())
    recipes = [Recipe(bits=bits[i % len(bits)], group=128) for i in range(experts)]
    if processes > 1:
        _compile_all(cases, recipes, device, dtype, processes)
    layers = [made_up_experts(recipes, hidden, intermediate, device="cuda")]
    size = sum(t.nbytes for t in layers[0].tensors)
    for seed in range(1, min(_COPIES, max(2, _MEMORY // size))):
        layers.append(made_up_experts(recipes, hidden, intermediate, device="cuda", seed=seed))

    def fastest(case: Case, launches: Iterable[Launch]) -> tuple[float, Launch]:
        timed = [(measure(layers, case, one, dtype), one) for one in dict.fromkeys(launches)]
        return min(timed, key=lambda pair: pair[0])

    tuned = []
    for case in cases:
        ends = []
        for start in starts(case, device):
            _, cut = fastest(case, [start, *changes(start, "gate_up")])
            ends.append(fastest(case, [cut, *changes(cut, "down")]))
        seconds, best = min(ends, key=lambda pair: pair[0])
        tuned.append((case, best, seconds))
    return tuned


def _compile_all(
    cases: Sequence[Case],
    recipes: Sequence[Recipe],
    device: Device,
    dtype: torch.dtype,
    processes: int,
) -> None:
    """Launch everything once in several processes, which fills Triton's compilation cache."""
    jobs: dict[Launch, Case] = {}
    for case in cases:
        for start in starts(case, device):
            for launch in (start, *changes(start, "gate_up"), *changes(start, "down")):
                jobs.setdefault(launch, case)
    each = [list(jobs.items())[i :: 4 * processes] for i in range(4 * processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_launched, recipes, dtype), each))


def _launched(
    recipes: Sequence[Recipe], dtype: torch.dtype, jobs: Sequence[tuple[Launch, Case]]
) -> None:
    """Launch some cases with all-zero weights."""
    for launch, case in jobs:
        layer = made_up_experts(recipes, case.hidden, case.intermediate, device="cuda", seed=None)
        measure([layer], case, launch, dtype, rounds=0)


def measure(
    layers: Sequence[Experts],
    case: Case,
    launch: Launch,
    dtype: torch.dtype,
    rounds: int = _ROUNDS,
) -> float:
    """Return the median seconds of one call; infinity if the device cannot run it or `rounds` is 0.

    Args:
        layers: layers whose weights the calls use in turn.
        case: the shapes.
        launch: the launch.
        dtype: dtype of activations.
        rounds: number of graphs to time; 0 launches a few calls and times nothing.
    """
    from triton.runtime.errors import OutOfResources

    x = torch.randn(case.tokens, case.hidden, device="cuda", dtype=dtype)
    routes = [_route(case) for _ in layers]
    weights = torch.rand(case.tokens, case.topk, device="cuda")

    def call() -> None:
        for i in range(_CALLS):
            at = i % len(layers)
            moe(x, routes[at], weights, layers[at], launch)

    try:
        call()
    except (OutOfResources, torch.cuda.OutOfMemoryError):
        return math.inf
    torch.cuda.synchronize()
    if not rounds:
        return math.inf
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / _CALLS)
    return statistics.median(times)


def _route(case: Case) -> Tensor:
    scores = torch.rand(case.tokens, case.experts, device="cuda")
    return scores.topk(case.topk, dim=1).indices


def main(arguments: list[str] | None = None) -> None:
    """Tune one shape from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("experts", "topk", "hidden", "intermediate"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes that compile first"
    )
    add_output(
        parser, "File to write, .json; named after the GPU if it is not given.", required=False
    )
    given = vars(parser.parse_args(arguments))
    out, processes = given.pop("out"), given.pop("processes")
    cases = [Case(**given | {"tokens": count}) for count in given["tokens"]]
    try:
        if out is not None:
            check_output(out, "file", overwrite=True)
        if not torch.cuda.is_available():
            raise InputError("tune: no GPU is available, and launches are measured on one")
        gpu = torch.cuda.get_device_name()
        out = out or Path(file_name(gpu))
        check_output(out, "file", overwrite=True)
        tuned = tune(cases, processes=processes)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    note = f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
    text = write_table(gpu, [(case, launch) for case, launch, _ in tuned], note)
    write_whole(out, text.encode())
    for case, launch, seconds in tuned:
        sys.stderr.write(f"{case.tokens} tokens: {seconds * 1e6:.1f} us, {launch.path}\n")


if __name__ == "__main__":
    main()
