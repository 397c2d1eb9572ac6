"""Ways to run a case: Bitknap, transformers, the usual Triton pattern, and vLLM if installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bitknap.benchmarks.kernels.cases import (
    DTYPES,
    KEPT,
    MIXES,
    Case,
    bytes_of,
    elsewhere,
    experts_of,
    flops_of,
    routed,
)
from bitknap.benchmarks.kernels.timing import Call, memory_roof, seconds_of
from bitknap.benchmarks.quantize.peers import installed
from bitknap.errors import BitknapError
from bitknap.kernels.experts import Experts, opened
from bitknap.kernels.launch import Case as Shape
from bitknap.kernels.launch import Device, choose, heuristic
from bitknap.kernels.moe import device_of, moe

OURS, GATE_UP, INTERPRETED, NAIVE = "ours", "ours: gate and up", "ours: interpreted", "naive Triton"
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
EAGER = "transformers eager"  # reads back which experts are hit
VLLM = "vLLM fused_experts"
# Copies of the weights take turns, so that none is in a cache when it is read again.
_SETS = 8
_MEMORY = 24 << 30  # total bytes of all copies
_COPIES = 8 << 30  # maximum bytes that `batched_mm` may copy in a call
_PROCESSORS = 132
Routing = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where cases are measured, and how often.

    Attributes:
        device: "cuda", or "cpu" for a toy run.
        runs: number of measurements per case.
        ceilings: peak rates of the device: "read" and "copy" in bytes/s, "matmul" in FLOP/s.
    """

    device: str
    runs: int
    ceilings: Mapping[str, float]


def measured(cases: Sequence[Case], setting: Setting) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each case's name and one row per way; cases with the same weights must be adjacent."""
    for _, group in groupby(cases, key=lambda case: (case.weights_name, case.dtype)):
        some = list(group)
        sets = _sets(some[0], setting.device)
        peers = _Peers(some[0], setting.device)
        for case in some:
            yield case.name, list(_rows(case, sets, peers, setting))
        del sets, peers
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def _rows(
    case: Case, sets: Sequence[Experts], peers: _Peers, setting: Setting
) -> Iterator[dict[str, Any]]:
    routes = [routed(case, setting.device, seed) for seed in range(_SETS)]

    def roof(*, down: bool) -> dict[str, Any]:
        sizes = [bytes_of(sets[0], case, index, down=down) for _, index, _ in routes]
        size, flops = sum(sizes) / len(sizes), flops_of(case, down=down)
        ideal = max(size / memory_roof(setting.ceilings), flops / setting.ceilings["matmul"])
        return {"bytes": size, "flops": flops, "ideal": ideal}

    facts = {
        "model": case.layer.name,
        "mix": case.mix,
        "group": case.group,
        "batch": case.batch,
        "routing": case.routing,
        "dtype": case.dtype,
    }
    for way, make in {**_ours(case, sets, setting.device), **peers.ways(case)}.items():
        about = {**facts, **roof(down=way != GATE_UP), "way": way}
        try:
            calls = [make(i, route) for i, route in enumerate(routes)]
            timed = seconds_of(calls, setting.device, setting.runs, graph=way != EAGER)
        except (torch.cuda.OutOfMemoryError, BitknapError) as error:
            yield {**about, "note": str(error).splitlines()[0]}
            continue
        yield {**about, **timed, "share": about["ideal"] / timed["seconds"]}


def _sets(case: Case, device: str) -> list[Experts]:
    """Return the same experts at several addresses, as many as fit."""
    first = experts_of(case, device)
    tables = (first.gate, first.up, first.down)
    size = sum(table.buffer.nbytes for table in tables if table is not None)
    count = 1 if device == "cpu" else max(2, min(_SETS, _MEMORY // size))
    return [first, *(elsewhere(first) for _ in range(count - 1))]


Make = Callable[[int, Routing], Call]


def _ours(case: Case, sets: Sequence[Experts], device: str) -> dict[str, Make]:
    ways: dict[str, Make] = {OURS: lambda i, route: partial(moe, *route, sets[i % len(sets)])}
    if device == "cuda" and choose(_shape(case), device_of(0)).path != "dense":
        # The rest of the layer is the down projection and the sum over experts.
        ways[GATE_UP] = lambda i, route: _by_triton(case, route, sets[i % len(sets)], gate_up=True)
    elif _interpreting() and len(set(MIXES[case.mix])) > 2:  # slow: every width is in one launch
        ways[INTERPRETED] = lambda i, route: _by_triton(case, route, sets[i % len(sets)])
    return ways


def _by_triton(case: Case, route: Routing, experts: Experts, *, gate_up: bool = False) -> Call:
    """Return a direct call of the Triton kernels: all of them, or only those for gate and up."""
    from bitknap.kernels.run_triton import Execution, run

    shape = _shape(case)
    how = opened(list(experts.tensors), experts.how)
    if _interpreting():
        launch = heuristic(shape, Device("none", _PROCESSORS))
        execution = Execution(compute=torch.float32, asm=False)
        return lambda: run(*route, how, launch, execution)
    device = device_of(torch.cuda.current_device())
    launch = choose(shape, device)

    def call() -> object:
        past = False

        def start(kernel: Any, grid: Any, given: Any, constants: Any, tile: Any) -> None:
            nonlocal past
            if not (gate_up and past):
                kernel[grid](*given, **constants, num_warps=tile.warps, num_stages=tile.stages)
            past = past or kernel.__name__.endswith("gate_up")

        return run(*route, how, launch, Execution(asm=not device.amd, start=start))

    return call


def _shape(case: Case) -> Shape:
    layer = case.layer
    return Shape(
        tokens=case.batch,
        topk=layer.top_k,
        experts=layer.experts,
        hidden=layer.hidden,
        intermediate=layer.intermediate,
    )


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


class _Peers:
    """Other ways to run a layer: with bf16 weights, or with the usual 4-bit kernel."""

    def __init__(self, case: Case, device: str) -> None:
        self.device, self.case = device, case
        self.stacks: list[tuple[Tensor, Tensor]] = []
        self.naive: list[Any] = []
        layer, dtype = case.layer, DTYPES[case.dtype]
        size = 3 * layer.experts * layer.hidden * layer.intermediate * dtype.itemsize
        count = 1 if device == "cpu" else max(2, min(_SETS, _MEMORY // size))
        if case.mix == KEPT:
            shape = (layer.experts, 2 * layer.intermediate, layer.hidden)
            for _ in range(count):
                gate_up = torch.randn(shape, device=device, dtype=dtype) / layer.hidden**0.5
                down = gate_up.new_empty(layer.experts, layer.hidden, layer.intermediate)
                self.stacks.append((gate_up, down.normal_(std=layer.intermediate**-0.5)))
        if case.mix == "4" and (device == "cuda" or _interpreting()):
            from bitknap.benchmarks.kernels.naive import Naive

            sizes = (layer.experts, layer.hidden, layer.intermediate, case.group)
            self.naive = [Naive(*sizes, dtype, device, seed) for seed in range(count)]

    def ways(self, case: Case) -> dict[str, Make]:
        """Return the ways that can run a case."""
        makers: dict[str, Make] = {}
        if self.naive:
            makers[NAIVE] = lambda i, route: partial(self.naive[i % len(self.naive)], *route)
        if not self.stacks:
            return makers
        expert = sum(stack[0].nbytes for stack in self.stacks[0])
        for way in TRANSFORMERS:
            pairs = case.batch * case.layer.top_k
            if way != "batched_mm" or pairs * expert <= _COPIES:
                makers[f"transformers {way}"] = partial(self._transformers, way)
        if installed("vllm") and self.device == "cuda":
            makers[VLLM] = self._vllm
        return makers

    def _transformers(self, way: str, i: int, route: Routing) -> Call:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        layer = self.case.layer
        config = MixtralConfig(
            hidden_size=layer.hidden,
            intermediate_size=layer.intermediate,
            num_local_experts=layer.experts,
        )
        config._experts_implementation = way
        with torch.device("meta"):
            module: Any = MixtralExperts(config)
        gate_up, down = self.stacks[i % len(self.stacks)]
        module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(down, requires_grad=False)
        return partial(module, *route)

    def _vllm(self, i: int, route: Routing) -> Call:
        from vllm.model_executor.layers.fused_moe import fused_experts

        x, index, weights = route
        stacks = self.stacks[i % len(self.stacks)]
        return partial(fused_experts, x, *stacks, weights.float(), index.int())
