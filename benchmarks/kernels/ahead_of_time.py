"""Compile the kernels that a layer launches for absent GPUs, and count registers and instructions.

This checks kernels on machines without a GPU: it fails on spilled registers, on more shared memory
than a multiprocessor has, and on more instructions per weight than the budget. It runs in its own
process, without TRITON_INTERPRET, and needs no driver.

Budget: a program that unpacks weights keeps up with memory as long as its instructions take no
longer than its bytes. An H200's multiprocessor issues 128 lane-instructions a clock; at 4.3 TB/s
(measured copy), 132 multiprocessors and 1.98 GHz it gets 16.5 bytes a clock, so a weight of w bits
may take 0.97 w lane-instructions. Programs of 64 or more tokens are bound by matrix units instead:
64 multiply-adds at 2,048 a clock take as long as 4 lane-instructions. Budgets are checked on sm_90.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitknap.kernels.experts import Experts, opened
from bitknap.kernels.launch import Case, Device, Launch, Tile, heuristic
from bitknap.kernels.layout.kinds import Kind
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.kernels.random_experts import Structure, made_up_experts
from bitknap.kernels.run_triton import Execution, run

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DEVICES = {
    "sm_80": Device("A100", 108, 8),
    "sm_90": Device("H200", 132),
    "sm_100": Device("B200", 148, 10),
    "gfx942": Device("MI300X", 304, 0),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
PER_BIT = 128 / (4.3e12 / 132 / 1.98e9 * 8)  # lane-instructions a bit of a weight
_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer to launch: shapes of a model, and storage of the experts' row blocks, in turn."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    topk: int
    recipes: tuple[Recipe, ...]
    gate: tuple[Recipe, ...] | None = None
    gated: bool = True
    biased: bool = False
    activation: Any = "silu"
    blocks: int = 1

    def meta(self) -> Experts:
        """Return the experts without allocating memory."""

        def entries(recipes: Sequence[Recipe]) -> list[Recipe]:
            return [recipes[i % len(recipes)] for i in range(self.experts * self.blocks)]

        return made_up_experts(
            entries(self.recipes),
            self.hidden,
            self.intermediate,
            Structure(
                gate=None if self.gate is None else entries(self.gate),
                activation=self.activation,
                gated=self.gated,
                biased=self.biased,
                blocks=self.blocks,
            ),
            device="meta",
            seed=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One compilation: a kernel, its arguments' types and its constants."""

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    tile: Tile
    kinds: tuple[Kind, ...] = ()
    rows: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The compilation result of a variant.

    Attributes:
        target: the target, such as "sm_90".
        registers: number of registers per thread.
        spills: instructions that save or restore registers.
        shared: bytes of shared memory of a program.
        per_weight: lane-instructions a weight of every innermost loop with matrix instructions.
        asm: the program's text.
    """

    target: str
    registers: int
    spills: int
    shared: int
    per_weight: tuple[float, ...]
    asm: str = field(repr=False)


def variants(
    layer: Layer, tokens: int, dtype: torch.dtype, target: str, launch: Launch | None = None
) -> Iterator[Variant]:
    """Yield the variants that one call of the operator compiles, for a target and token count."""
    case = Case(
        tokens=tokens,
        topk=layer.topk,
        experts=layer.experts,
        hidden=layer.hidden,
        intermediate=layer.intermediate,
    )
    launch = launch or heuristic(case, DEVICES[target])
    started: list[tuple[Any, ...]] = []
    experts = layer.meta()
    x = torch.empty(tokens, layer.hidden, dtype=dtype, device="meta")
    index = torch.empty(tokens, layer.topk, dtype=torch.int64, device="meta")
    weights = torch.empty(tokens, layer.topk, dtype=dtype, device="meta")
    run(
        x,
        index,
        weights,
        opened(list(experts.tensors), experts.how),
        launch,
        Execution(asm=TARGETS[target].backend == "cuda", start=lambda *call: started.append(call)),
    )
    for kernel, _, arguments, constants, tile in started:
        names = [name for name in kernel.arg_names if name not in constants]
        codes = constants.get("KINDS", ())
        rows = constants.get("HALF", 0) * (2 if constants.get("TIED") else 1)
        yield Variant(
            name=f"{layer.name} T{tokens} {kernel.__name__}",
            kernel=kernel,
            signature={n: _type(a) for n, a in zip(names, arguments, strict=True)},
            constants=constants,
            tile=tile,
            kinds=tuple(Kind.of(code) for code in codes),
            rows=rows or constants.get("BN", 0),
            tokens=constants.get("BM", 0),
        )


def _type(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _TYPES[argument.dtype]
    return tuple(map(_type, argument)) if isinstance(argument, tuple) else "i32"


def build(variant: Variant, target: str) -> Built:
    """Compile a variant for a target."""
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for at, name in enumerate(names):
        kind = signature[name]
        places = [(at,)] if isinstance(kind, str) else [(at, i) for i in range(len(kind))]
        if not isinstance(kind, str) or kind.startswith("*"):
            aligned |= {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(
        fn=variant.kernel, signature=signature, constexprs=dict(variant.constants), attrs=aligned
    )
    options = {"num_warps": variant.tile.warps, "num_stages": variant.tile.stages}
    made = triton.compile(source, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "hip":
        return _amd(made, variant, target)
    return _nvidia(made, variant, target)


def _nvidia(made: Any, variant: Variant, target: str) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        usage = _dump(file, "--dump-resource-usage")
        sass = _dump(file, "-sass")
    registers = re.search(r"REG:(\d+)", usage)
    lines = [
        (int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)
    ]
    loops = [
        (int(goal, 16), at)
        for at, text in lines
        for goal in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if int(goal, 16) < at
    ]
    return Built(
        target=target,
        registers=int(registers[1]) if registers else 0,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=made.metadata.shared,
        per_weight=_per_weight(lines, loops, r"MMA", variant, 32),
        asm=sass,
    )


def _dump(file: Path, option: str) -> str:
    command = [str(_BINARIES / "cuobjdump"), option, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(made: Any, variant: Variant, target: str) -> Built:
    text = made.asm["amdgcn"]

    def value(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(match[1]) if match else 0

    lines: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if match := re.match(r"(\.LBB\w+):", line):
            labels[match[1]] = len(lines)
        elif re.match(r"\s+[a-z]+_\w+", line):
            lines.append((len(lines), line.strip()))
            jump = re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(lines) - 1))
    return Built(
        target=target,
        registers=value("vgpr_count"),
        spills=value("vgpr_spill_count"),
        shared=made.metadata.shared,
        per_weight=_per_weight(lines, loops, r"v_mfma", variant, 64),
        asm=text,
    )


def _per_weight(
    lines: list[tuple[int, str]],
    loops: list[tuple[int, int]],
    matrix: str,
    variant: Variant,
    lanes: int,
) -> tuple[float, ...]:
    """Return lane-instructions per weight of innermost matmul loops; 256 columns per iteration."""
    if not variant.rows:
        return ()
    # Instructions by address; of loops with the same start, only the longest.
    busy: dict[int, tuple[int, int]] = {}
    for begin, end in loops:
        body = [text for at, text in lines if begin <= at <= end]
        if any(re.search(matrix, text) for text in body):
            busy[begin] = max(busy.get(begin, (0, 0)), (end, len(body)))
    inner = [
        (begin, end, count)
        for begin, (end, count) in sorted(busy.items())
        if not any(begin < other <= end for other in busy)
    ]
    weights = variant.rows * 256 / (lanes * variant.tile.warps)
    return tuple(round(count / weights, 2) for _, _, count in inner)


def budget(variant: Variant) -> float | None:
    """Return the lane-instructions that a weight may take, None for kernels without matrices."""
    if not variant.tokens or not variant.kinds:
        return None
    if not variant.constants.get("POST", True):
        return 4.0 * variant.tokens / 64
    # A layer of several kinds is launched as one, and its widest kind has the largest budget.
    return round(PER_BIT * max(kind.weight for kind in variant.kinds), 2)


def problems(variant: Variant, built: Built) -> list[str]:
    """Return one line for each violated limit; empty if there is none."""
    messages = []
    if built.spills:
        messages.append(f"{built.spills} instructions spill registers")
    if built.shared > SHARED[built.target]:
        messages.append(f"{built.shared} bytes of shared memory, limit {SHARED[built.target]}")
    limit = budget(variant)
    if limit is not None and built.target == "sm_90" and built.per_weight:
        most = max(built.per_weight)
        if most > limit:
            messages.append(f"{most} instructions a weight, budget {limit}")
    return [f"{variant.name} on {built.target}: {text}" for text in messages]
