"""What a campaign found, as numbers and as a page."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

_PACKAGES = ("bitknap", "numpy", "optuna", "safetensors", "tokenizers", "torch", "transformers")
# Kinds of faults of damaged inputs; kills and full disks have lost work alone.
KINDS = ("loss", "traceback", "hang", "memory", "outside", "crash", "words")
_SAID = {
    "kill": (
        "The process is killed at a random moment (half of the cases: at a random file-system "
        "call), and the command is repeated. Lost: anything beside the output changed, the "
        "repeated run failed, its result differs in any byte from that of a run that was not "
        "killed, or something is left over."
    ),
    "disk": (
        "The disk has a random number of free pages, or the bytes of a file are limited. Lost: "
        "anything beside the output changed, a result is half-written, there is more than one "
        "line of error, or the result differs once there is room."
    ),
    "malformed": (
        "Valid files are damaged at random and read by a command. `crash` is an exit status "
        "other than 0 and 2; `words` is an error that is not exactly one line; `hang` is more "
        "than 5 s of processor time; `memory` is more than 1 GiB; `outside` is a changed file "
        "that is not the output."
    ),
    "circumstances": (
        "Two processes write one output; the clock goes backwards, or files are from the future; "
        "the source is on a read-only disk, or behind links; the locale is C; names have spaces, "
        "new lines, other scripts, a leading dash, bytes that are not text, or 220 characters. "
        "Lost: anything beside the output changed, the result differs from the ordinary one, or "
        "there is more than one line of error."
    ),
}


def about(seed: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "seed": seed,
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return counts by part and group, and every fault in full."""
    parts: dict[str, dict[str, dict[str, int]]] = {}
    faults = []
    for document in found:
        name = document["part"]
        for row in document["rows"]:
            group = row["input"] if name == "malformed" else document["group"]
            counts = parts.setdefault(name, {}).setdefault(group, {"cases": 0})
            counts["cases"] += 1
            kinds = row["faults"] if name == "malformed" else ["loss"] * bool(row["faults"])
            for kind in KINDS if name == "malformed" else KINDS[:1]:
                counts[kind] = counts.get(kind, 0) + (kind in kinds)
            if "landed" in row:
                counts["noticed"] = counts.get("noticed", 0) + row["landed"]
            if row["faults"]:
                faults.append({"part": name, **row})
    return {"parts": parts, "faults": faults}


def markdown(document: dict[str, Any]) -> str:
    """Return the page."""
    facts = document["about"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        "# Nothing is lost",
        "",
        f"`python -m bitknap.benchmarks.robustness -o DIR --seed {facts['seed']}`; {versions}; "
        f"{facts['system']}, {facts['cores']} cores. Every number except those of cases should be "
        "0.",
    ]
    for name, groups in document["parts"].items():
        lines += ["", f"## {name}", "", _SAID[name], "", *_table(groups)]
    if document["faults"]:
        lines += ["", "## Faults", "", "Complete in `robustness.json`.", ""]
        lines += [f"- {_line(fault)}" for fault in document["faults"][:50]]
    return "\n".join([*lines, ""])


def _table(groups: dict[str, dict[str, int]]) -> Iterator[str]:
    columns = list(next(iter(groups.values())))
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for group, counts in groups.items():
        yield f"| {group} | " + " | ".join(f"{counts[x]:,}" for x in columns) + " |"
    total = (f"{sum(counts[x] for counts in groups.values()):,}" for x in columns)
    yield "| all | " + " | ".join(total) + " |"


def _line(fault: dict[str, Any]) -> str:
    where = fault.get("input") or fault.get("command")
    said = "; ".join(map(str, fault["faults"][:3]))
    last = f": {fault['said'][-1][:160]}" if fault.get("said") else ""
    return f"{fault['part']}, {where}: {said}{last}".replace("|", "\\|")
