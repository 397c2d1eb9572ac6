"""Shell patterns over the names of ModelOpt's quantizers; the last one that matches decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import ROLES
from bitknap.quantization.targets.configs.module_names import Modules, unit_names
from bitknap.quantization.targets.configs.patterns import check_matches
from bitknap.quantization.targets.target import ExportJob

Rule = tuple[str, Format]
# The name of a module's quantizer, and those of a stack's, whose experts ModelOpt keeps together.
_END = "weight_quantizer"
_STACKED = (f"gate_up_proj_{_END}", f"up_proj_{_END}", f"down_proj_{_END}")


def rules(job: ExportJob, modules: Modules) -> list[Rule]:
    """Return patterns for every quantizer that is on, general ones first.

    All experts of a layer have one format. The commonest one stands for all layers, and others are
    named by their layer.
    """
    layers = _layers(job)
    made: list[Rule] = []
    if layers:
        (usual, _), *_ = Counter(layers.values()).most_common(1)
        stems = dict.fromkeys(_without_number(name) for name in layers)
        made += [(f"{stem}*{_END}", usual) for stem in stems]
        made += [(f"{name}.*{_END}", one) for name, one in layers.items() if one != usual]
    routed = set(_routed(job))
    made += [
        (f"{name}.{_END}", format) for name, format in modules.formats.items() if name not in routed
    ]
    return made


def check(target: str, job: ExportJob, modules: Modules, made: Sequence[Rule]) -> None:
    """Read the patterns as ModelOpt does, for experts that are modules and for stacked ones.

    Raises:
        MismatchError: a quantizer gets something else than the plan says.
    """
    wanted: dict[str, Format | None] = {f"{name}.{_END}": None for name in modules.others}
    wanted |= {f"{name}.{_END}": format for name, format in modules.formats.items()}
    for name, format in _layers(job).items():
        wanted |= {f"{name}.{end}": format for end in _STACKED}
    given = {name: _last(name, made) for name in wanted}
    check_matches(target, wanted, given)


def _last(name: str, made: Sequence[Rule]) -> Format | None:
    # A name can match only a pattern whose plain beginning it shares.
    for pattern, format in reversed(made):
        if name.startswith(pattern.partition("*")[0]) and fnmatchcase(name, pattern):
            return format
    return None


def _layers(job: ExportJob) -> dict[str, Format]:
    """Return the format of each layer's experts, by the name of their stack."""
    routed = ROLES.index("routed")
    return {
        name.rsplit(".", 2)[0]: job.plan.format_of(unit)
        for unit, (name, role) in enumerate(
            zip(unit_names(job.layout), job.plan.units.role.tolist(), strict=True)
        )
        if role == routed
    }


def _routed(job: ExportJob) -> Iterator[str]:
    routed = ROLES.index("routed")
    for name, role in zip(unit_names(job.layout), job.plan.units.role.tolist(), strict=True):
        if role == routed:
            yield name


def _without_number(stack: str) -> str:
    """Return a pattern for the stacks of all layers: the layer's number becomes a star."""
    return ".".join("*" if part.isdecimal() else part for part in f"{stack}.".split("."))
