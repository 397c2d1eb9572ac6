"""Write settings for another tool, with the plan that they came from."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from bitknap.allocation.problem.format import Format
from bitknap.disk.atomic import folder_bytes, write_whole
from bitknap.disk.manifest import names_in
from bitknap.disk.outputs import whole_folder
from bitknap.quantization.packed.folder import PLAN
from bitknap.quantization.targets.configs.module_names import Modules
from bitknap.quantization.targets.configs.patterns import (
    Pattern,
    check_matches,
    first_matches,
    patterns,
)
from bitknap.quantization.targets.target import Exported, ExportJob


def usual(modules: Modules) -> Format:
    """Return the format that most modules have, for which no rule is needed."""
    (format, _), *_ = Counter(modules.formats.values()).most_common(1)
    return format


def rules(modules: Modules, *, without: Format | None = None) -> list[Pattern]:
    """Return patterns for all modules, exact and without overlap.

    Args:
        modules: the modules; those that a plan leaves out get patterns without a format.
        without: a format whose modules need no pattern.
    """
    groups: defaultdict[Format | None, list[str]] = defaultdict(list)
    for name, format in modules.formats.items():
        if format != without:
            groups[format].append(name)
    groups[None] = list(modules.others)
    return patterns(groups, [*modules.formats, *modules.others])


def check(target: str, modules: Modules, made: Sequence[Pattern], other: Format | None) -> None:
    """Read patterns as tools do that take the first one that matches a name from its start.

    Args:
        target: the target's name.
        modules: the modules, and what each of them must get.
        made: the patterns, in the order of the settings.
        other: what a module gets that no pattern matches.

    Raises:
        MismatchError: a module gets something else.
    """
    wanted: dict[str, Format | None] = {**dict.fromkeys(modules.others), **modules.formats}
    found = first_matches([pattern.regex for pattern in made], wanted)
    given = {name: made[found[name]].format if name in found else other for name in wanted}
    check_matches(target, wanted, given)


def text(content: Mapping[str, Any]) -> str:
    """Return JSON values as text."""
    return json.dumps(content, indent=1) + "\n"


def write(job: ExportJob, tool: str, files: Mapping[str, str], checks: Sequence[str]) -> Exported:
    """Write a folder of settings: JSON files, and the plan.

    Args:
        job: what is exported.
        tool: the tool's name in the warning that it rounds by itself.
        files: the content of each file.
        checks: what was verified.
    """
    with whole_folder(job.out, overwrite=job.overwrite, inputs=[job.source.folder]) as folder:
        for name, content in files.items():
            write_whole(folder / name, content.encode())
        job.plan.save(folder / PLAN)
    method = job.plan.header.get("method", "rtn")
    return Exported(
        path=job.out,
        files=tuple(names_in(job.out)),
        nbytes=folder_bytes(job.out),
        checks=tuple(checks),
        warnings=(
            f"{tool} rounds the weights by itself; the plan's costs are of rounding by {method}",
        ),
    )


def matched(modules: Modules, rules: int) -> str:
    """Say that all modules were matched against the rules."""
    left, covered = len(modules.others), len(modules.formats)
    return (
        f"{rules} rules: each of {covered:,} modules gets the plan's format, and {left:,} others "
        "(routers, norms, embeddings and what the plan leaves out) none"
    )
