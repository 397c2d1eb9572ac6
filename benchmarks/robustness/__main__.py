"""Campaigns against lost work: `python -m bitknap.benchmarks.robustness -o DIR`.

A part that was stopped goes on where it was when the command is repeated.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitknap.arguments import add_output
from bitknap.benchmarks.result_files import claim, read_results, write_report, write_results
from bitknap.benchmarks.robustness.circumstances import CIRCUMSTANCES, run_circumstances
from bitknap.benchmarks.robustness.commands import COMMANDS, Long
from bitknap.benchmarks.robustness.disks import run_full
from bitknap.benchmarks.robustness.forked import prepare
from bitknap.benchmarks.robustness.kills import run_kills
from bitknap.benchmarks.robustness.malformed import cases, run_case
from bitknap.benchmarks.robustness.materials import materials
from bitknap.benchmarks.robustness.report import about, markdown, summary
from bitknap.names import one_of

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Cases that are run together.

    Attributes:
        group: what they are of, such as a command's name; "" in a part without groups.
        first: the first one's number in its group.
        count: how many.
        seed: random seed of the campaign.
    """

    group: str
    first: int
    count: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the campaign.

    Attributes:
        count: number of cases, of each command where a part goes over commands.
        block: cases that are run before their rows are written.
        groups: names of what it goes over.
        run: yields a row a case of a block.
    """

    count: int
    block: int
    groups: tuple[str, ...]
    run: Callable[[Block, Path, Path], Rows]


def _kill(block: Block, made: Path, scratch: Path) -> Rows:
    yield from run_kills(_command(block), block.count, _seed(block), made, scratch)


def _disk(block: Block, made: Path, scratch: Path) -> Rows:
    yield from run_full(_command(block), block.count, _seed(block), made, scratch)


def _malformed(block: Block, made: Path, scratch: Path) -> Rows:
    for case in cases(block.first + block.count, block.seed, first=block.first):
        yield run_case(case, made, scratch) or {"input": case.subject.name, "faults": []}


def _circumstances(block: Block, made: Path, scratch: Path) -> Rows:
    yield from run_circumstances(block.group, block.first, block.count, block.seed, made, scratch)


def _command(block: Block) -> Long:
    return next(one for one in COMMANDS if one.name == block.group)


def _seed(block: Block) -> str:
    return f"{block.seed} {block.first}"


_NAMES = tuple(one.name for one in COMMANDS)
# Optuna writes studies; whether they grow or not is its own to say.
_WRITERS = tuple(one.name for one in COMMANDS if not one.storage)
PARTS = {
    "kill": Part(count=100, block=25, groups=_NAMES, run=_kill),
    "disk": Part(count=30, block=30, groups=_WRITERS, run=_disk),
    "malformed": Part(count=10_000, block=500, groups=("",), run=_malformed),
    "circumstances": Part(count=64, block=16, groups=tuple(CIRCUMSTANCES), run=_circumstances),
}
_GROUPS = tuple(dict.fromkeys(group for part in PARTS.values() for group in part.groups if group))


def run(
    out: Path,
    counts: Mapping[str, int | None],
    seed: int,
    say: Callable[[str], None],
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Run parts, a block at a time, and write what was found after each of them.

    Args:
        out: folder for `robustness.json`, `robustness.md` and what finished blocks found.
        counts: number of cases in each group, by part; the part's own number when None.
        seed: the random seed.
        say: called with a line for each finished block.
        only: groups of cases, such as commands that are killed; all when empty.
    """
    prepare()
    with tempfile.TemporaryDirectory(prefix="robustness") as folder:
        root = Path(folder)
        made = materials(root / "materials")
        for name, count in counts.items():
            for block in _blocks(PARTS[name], count, seed, only):
                label = f"{block.group.replace(' ', '-') or 'all'}.{block.first}+{block.count}"
                file = out / f"robustness.{name}.{label}.{seed}.json"
                if file.exists():
                    continue
                rows = list(PARTS[name].run(block, made, root / "work" / "here"))
                document = {"part": name, "group": block.group, "seed": seed, "rows": rows}
                write_results(file, document)
                faults = sum(bool(row["faults"]) for row in rows)
                say(f"{name}: {label}: {len(rows)} cases, {faults} with faults")
                shutil.rmtree(root / "work", ignore_errors=True)
    found = [read_results(file) for file in sorted(out.glob("robustness.*.*.json"))]
    document = {"about": about(seed), **summary(found)}
    write_results(out / "robustness.json", document)
    write_report(out / "robustness.md", markdown(document))
    return document


def _blocks(part: Part, count: int | None, seed: int, only: Sequence[str]) -> list[Block]:
    total = part.count if count is None else count
    return [
        Block(group=group, first=first, count=min(part.block, total - first), seed=seed)
        for group in part.groups
        if not (only and group) or group in only
        for first in range(0, total, part.block)
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser, "Folder to write.")
    parser.add_argument("--part", type=one_of("part", PARTS), action="append")
    parser.add_argument("--count", type=int, help="cases in each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=one_of("group", _GROUPS), action="append", help="groups of cases"
    )
    args = parser.parse_args()
    kept = [file.name for file in args.out.glob("robustness.*.*.json")]
    claim(parser, args.out, "robustness.json", "robustness.md", *kept)
    counts = dict.fromkeys(args.part or PARTS, args.count)
    run(args.out, counts, args.seed, lambda x: print(x, flush=True), args.only or ())


if __name__ == "__main__":
    main()
