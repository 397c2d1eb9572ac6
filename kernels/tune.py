"""Measure launches on the GPU at hand and write its table, which overrides the heuristic.

    python -m bitknap.kernels.tune --experts 128 --topk 8 --hidden 2048 --intermediate 768 -o FILE

Weights are random and mixed over the widths given; speed does not depend on their values. Calls are
captured in CUDA graphs that walk over several layers' weights, so that they come from memory and
not from a cache; the median of their times decides. Move the file to `configs/` beside this one.

No table is shipped yet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from bitknap.errors import InputError
from bitknap.files import write_whole
from bitknap.kernels.experts import Experts
from bitknap.kernels.launch import (
    DECODE_TOKENS,
    Case,
    Launch,
    Tile,
    file_name,
    heuristic,
    write_table,
)
from bitknap.kernels.made_up import made_up_experts
from bitknap.kernels.moe import device_of, moe
from bitknap.kernels.words import Recipe

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_COPIES = 8  # layers that a graph walks over, unless fewer take `_MEMORY` bytes
_MEMORY = 1 << 30  # well past any second-level cache
_CALLS, _ROUNDS = 20, 30


def candidates(case: Case, least: int) -> Iterator[Launch]:
    """Yield the launches that are tried for a case.

    Args:
        case: what is launched.
        least: fewest tokens that a program takes on this device.
    """
    if case.tokens <= DECODE_TOKENS:
        tokens = max(least, 8 if case.tokens <= 8 else 16)
        for rows, stages, split, down in product((32, 64), (2, 3, 4), (1, 2, 4, 8), (64, 128)):
            yield Launch(
                path="decode",
                tokens=tokens,
                gate_up=Tile(rows=rows, stages=stages),
                down=Tile(rows=down, stages=stages, split=split),
            )
        return
    for tokens, rows, down, stages in product((16, 32, 64, 128), (32, 64), (64, 128), (2, 3)):
        warps = 4 if tokens <= 32 else 8
        yield Launch(
            path="grouped",
            tokens=tokens,
            gate_up=Tile(rows=rows, warps=warps, stages=stages),
            down=Tile(rows=down, warps=warps, stages=stages),
        )
    yield Launch(path="dense", tokens=64, gate_up=Tile(), down=Tile())


def tune(
    experts: int,
    topk: int,
    hidden: int,
    intermediate: int,
    bits: Sequence[int] = (2, 3, 4, 8),
    dtype: torch.dtype = torch.bfloat16,
    tokens: Sequence[int] = TOKENS,
) -> list[tuple[Case, Launch, float]]:
    """Return the fastest launch of each number of tokens, and its seconds, best of all candidates.

    Raises:
        InputError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise InputError("tune: no GPU is at hand, and launches are measured on one")
    recipes = [Recipe(bits=bits[i % len(bits)], group=128) for i in range(experts)]
    layers = [made_up_experts(recipes, hidden, intermediate, device="cuda")]
    size = sum(t.nbytes for t in layers[0].tensors)
    for seed in range(1, min(_COPIES, max(2, _MEMORY // size))):
        layers.append(made_up_experts(recipes, hidden, intermediate, device="cuda", seed=seed))
    device = device_of(torch.cuda.current_device())
    found = []
    for count in tokens:
        case = Case(
            tokens=count, topk=topk, experts=experts, hidden=hidden, intermediate=intermediate
        )
        timed = []
        for launch in dict.fromkeys([heuristic(case, device), *candidates(case, device.least)]):
            seconds = measure(layers, case, launch, dtype)
            if seconds is not None:
                timed.append((seconds, launch))
        seconds, best = min(timed, key=lambda pair: pair[0])
        found.append((case, best, seconds))
    return found


def measure(
    layers: Sequence[Experts], case: Case, launch: Launch, dtype: torch.dtype
) -> float | None:
    """Return the median seconds of one call, None if the device cannot run this launch."""
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
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times: list[float] = []
    for _ in range(_ROUNDS):
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
    parser.add_argument("-o", "--out", type=Path, help="default: the GPU's name")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    try:
        found = tune(**given)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    gpu = torch.cuda.get_device_name()
    note = f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
    text = write_table(gpu, [(case, launch) for case, launch, _ in found], note)
    write_whole(out or Path(file_name(gpu)), text.encode())
    for case, launch, seconds in found:
        sys.stderr.write(f"{case.tokens} tokens: {seconds * 1e6:.1f} us, {launch.path}\n")


if __name__ == "__main__":
    main()
