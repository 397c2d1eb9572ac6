"""Launch settings of a layer: from a heuristic, or from a table measured on a GPU.

The heuristic's numbers are derived from compiled code (registers, shared memory, tiles per
multiprocessor). Their results on an H200 are in `benchmarks/results/kernels.md`; they are not yet
tuned on it. `kernels.tune` measures launches and writes `configs/<GPU>.json`, which overrides them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

from bitknap.errors import InputError

DECODE_TOKENS = 16
# Pairs of a token and an expert, for each expert, from which weights are written out once: above,
# unpacking them costs more than reading them once in 16 bits (kernels.md#crossover computes 1.2 to
# 5 thousand tokens for three models, whose pairs per expert agree).
DENSE_PAIRS = 320
Path = Literal["decode", "grouped", "dense"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one projection is tiled.

    Attributes:
        rows: rows of one matrix per program: 32, 64 or 128.
        split: runs that columns are cut into, for the down projection of few tokens.
        warps: number of warps of a program.
        stages: number of stages of its software pipeline.
        columns: most columns that are multiplied at once: 32, 64 or 128, which all of a block's
            groups divide. Fewer leave more room for products and unpacking to overlap.
    """

    rows: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3
    columns: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a layer is launched.

    Attributes:
        path: "decode" (at most 16 tokens, nothing sorted), "grouped" (pairs sorted by expert), or
            "dense" (weights dequantized once, then torch's grouped product).
        tokens: tokens per program: 8, 16, 32, 64 or 128; up to 32, sums are scaled instead of
            weights.
        gate_up: how gate and up are tiled.
        down: how down is tiled.
    """

    path: Path
    tokens: int
    gate_up: Tile
    down: Tile

    @property
    def post(self) -> bool:
        """Whether sums are scaled group by group, instead of weights."""
        return self.tokens <= 32

    def text(self) -> str:
        """Return the launch as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Launch:
        """Undo `text`."""
        return _parsed(text)


@cache
def _parsed(text: str) -> Launch:
    known = json.loads(text)
    gate_up, down = Tile(**known.pop("gate_up")), Tile(**known.pop("down"))
    return Launch(**known, gate_up=gate_up, down=down)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The shapes that a launch is chosen for.

    Attributes:
        tokens: T.
        topk: experts per token.
        experts: E.
        hidden: H.
        intermediate: I.
    """

    tokens: int
    topk: int
    experts: int
    hidden: int
    intermediate: int

    @property
    def bucket(self) -> int:
        """The least power of two of at least `tokens`: cases in one bucket share a launch."""
        return 1 << max(0, self.tokens - 1).bit_length()


class Device(NamedTuple):
    """The device that a launch is chosen for.

    Attributes:
        name: name of the device in torch.
        processors: number of multiprocessors.
        generation: major compute capability; 0 for AMD devices.
    """

    name: str
    processors: int
    generation: int = 9

    @property
    def amd(self) -> bool:
        """Whether it is an AMD device."""
        return self.generation == 0

    @property
    def least(self) -> int:
        """Fewest tokens per program.

        8 if matrix units support that side; on Blackwell 8 tokens spill registers, and on AMD they
        fall back to plain arithmetic.
        """
        return 8 if self.generation in (8, 9) else 16


def choose(case: Case, device: Device) -> Launch:
    """Return the launch for a case: from measurements on this GPU, or else from the heuristic."""
    return _table(device.name).get(_key(case)) or heuristic(case, device)


def heuristic(case: Case, device: Device) -> Launch:
    """Return a launch from shapes alone."""
    pairs = case.tokens * case.topk
    if case.tokens <= DECODE_TOKENS:
        return _few(case, device)
    if pairs >= DENSE_PAIRS * case.experts:
        return Launch(path="dense", tokens=64, gate_up=Tile(), down=Tile())
    for tokens in (16, 32):
        if pairs <= tokens * case.experts:
            tile = Tile(rows=64, stages=2 if device.amd else 3)
            return Launch(path="grouped", tokens=tokens, gate_up=tile, down=tile)
    if device.amd:  # 64 KiB of shared memory
        tile = Tile(rows=64, warps=8, stages=1)
        return Launch(path="grouped", tokens=64, gate_up=replace(tile, rows=32), down=tile)
    # Larger tiles spill on Blackwell and on Ampere.
    gate_up = Tile(rows=32 if device.generation >= 10 else 64, warps=8, stages=2)
    down = Tile(rows=64 if device.generation == 8 else 128, warps=8, stages=2)
    tokens = 64 if pairs < 96 * case.experts else 128
    return Launch(path="grouped", tokens=tokens, gate_up=gate_up, down=down)


def _few(case: Case, device: Device) -> Launch:
    """Return the launch for the decode path."""
    # At most as many experts as pairs, each with one tile of tokens.
    experts = min(case.tokens * case.topk, case.experts)
    # On Blackwell, programs of 128 rows spill with groups of 32, and those of 64 with three stages.
    roomy = device.generation < 10
    wide = roomy and experts * -(-case.intermediate // 64) >= 2 * device.processors
    rows = 128 if roomy else 64
    # 128 rows at once unpack with the fewest instructions; columns are cut into runs where that
    # leaves multiprocessors idle. A run is at least two blocks, so that its pipeline has work to
    # overlap.
    tiles = max(1, experts * -(-case.hidden // rows))
    split = min(8, case.intermediate // 512, -(-2 * device.processors // tiles))
    stages = 2 if device.generation in (0, 8) else 3
    return Launch(
        path="decode",
        tokens=max(device.least, 8 if case.tokens <= 8 else 16),
        gate_up=Tile(rows=64 if wide else 32, stages=stages),
        down=Tile(rows=rows, split=max(1, split), stages=stages if roomy else 2),
    )


def write_table(gpu: str, rows: Sequence[tuple[Case, Launch]], note: str) -> str:
    """Return a GPU's table as JSON.

    Args:
        gpu: name of the device.
        rows: the best launch of each case.
        note: date and versions of the measurement.
    """
    launches = [{"case": _key(case), "launch": asdict(launch)} for case, launch in rows]
    header = {"format": "bitknap.launches", "version": "1.0"}
    table = {**header, "gpu": gpu, "measured": note, "launches": launches}
    return json.dumps(table, indent=1) + "\n"


def file_name(gpu: str) -> str:
    """Return the name of a GPU's table."""
    return "".join(c if c.isalnum() else "_" for c in gpu).lower() + ".json"


def _key(case: Case) -> str:
    return f"E{case.experts} k{case.topk} H{case.hidden} I{case.intermediate} T{case.bucket}"


@cache
def _table(gpu: str) -> dict[str, Launch]:
    file = resources.files("bitknap.kernels") / "configs" / file_name(gpu)
    if not file.is_file():
        return {}
    rows = json.loads(file.read_text())["launches"]
    return {row["case"]: _parsed(json.dumps(row["launch"])) for row in rows}


def check(launch: Launch, case: Case) -> None:
    """Raise unless a case can be launched this way.

    Raises:
        InputError: too many tokens for the path.
    """
    if launch.path == "decode" and case.tokens > launch.tokens:
        raise InputError(
            f"launch: {case.tokens} tokens are more than the {launch.tokens} that the decode path "
            "takes; choose the grouped path"
        )
