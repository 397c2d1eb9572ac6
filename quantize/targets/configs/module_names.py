"""What other tools call the modules of a model: transformers 5's names, one module an expert."""

from __future__ import annotations

from dataclasses import dataclass

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import MismatchError
from bitknap.quantization.models.matrix_views import ExpertLayer, Layout
from bitknap.quantization.targets.target import ExportJob

# Blocks of experts that the hub names so and transformers 5 calls "mlp".
_FORMER, _PRESENT = ".block_sparse_moe.", ".mlp."


@dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """The modules of a model that hold weights.

    Attributes:
        formats: the format of each module that a plan covers, by name.
        others: names of all other modules: routers, norms, embeddings, and what is left out.
    """

    formats: dict[str, Format]
    others: tuple[str, ...]

    @classmethod
    def of(cls, job: ExportJob) -> Modules:
        """Return the modules of a model under a plan, each expert's matrices by themselves.

        Raises:
            MismatchError: two units of one fused module have different formats.
        """
        return cls._named(job, unit_names(job.layout))

    @classmethod
    def stacked(cls, job: ExportJob) -> Modules:
        """Return the parameters of a model under a plan, as transformers 5 stacks experts.

        Names of parameters end in "weight", but for those that stack experts.

        Raises:
            MismatchError: two units of one parameter have different formats.
        """
        units, routed = job.plan.units, ROLES.index("routed")
        names = []
        for name, role in zip(unit_names(job.layout), units.role.tolist(), strict=True):
            if role != routed:
                names.append(f"{name}.weight")
                continue
            stack, _, leaf = name.rsplit(".", 2)
            gated = job.layout.layers[0].gated and leaf in ("gate_proj", "up_proj")
            names.append(f"{stack}.{'gate_up_proj' if gated else leaf}")
        found = cls._named(job, names)
        return cls(formats=found.formats, others=tuple(f"{name}.weight" for name in found.others))

    @classmethod
    def stored(cls, job: ExportJob) -> Modules:
        """Return the modules of a model under a plan, by the names that its files have.

        Raises:
            MismatchError: two units of one fused module have different formats.
        """
        names = [view.tensor.removesuffix(".weight") for view in job.layout.views]
        return cls._named(job, names, renames=False)

    @classmethod
    def _named(cls, job: ExportJob, names: list[str], *, renames: bool = True) -> Modules:
        layout, plan = job.layout, job.plan
        renames = renames and any(_renamed(layer) for layer in layout.layers)
        formats: dict[str, Format] = {}
        for unit, name in enumerate(names):
            format = plan.format_of(unit)
            if formats.setdefault(name, format) != format:
                raise _apart(plan, unit, name, formats[name])
        weights = (name.removesuffix(".weight") for name in job.source.headers)
        covered = {view.tensor for view in layout.views}
        others = [
            present(name) if renames else name
            for full, name in zip(job.source.headers, weights, strict=True)
            if full.endswith(".weight") and full not in covered
        ]
        return cls(formats=formats, others=tuple(others))


def unit_names(layout: Layout) -> list[str]:
    """Return the name of the module of each unit, in the layout's order."""
    layers = {layer.layer: layer for layer in layout.layers}
    routed = ROLES.index("routed")
    stacks = {number: _stack(layer) for number, layer in layers.items()}
    units = layout.units
    columns = zip(
        units.layer.tolist(),
        units.role.tolist(),
        units.expert.tolist(),
        units.projection.tolist(),
        layout.views,
        strict=True,
    )
    return [
        f"{stacks[layer]}{expert}.{units.projections[projection]}_proj"
        if role == routed
        else view.tensor.removesuffix(".weight")
        for layer, role, expert, projection, view in columns
    ]


def _stack(layer: ExpertLayer) -> str:
    """Return the name of a layer's experts, with a dot behind it."""
    name = f"{layer.module}."
    if _renamed(layer):
        return present(name)
    return name if ".experts." in name else f"{name}experts."


def present(name: str) -> str:
    """Return transformers 5's name of a module that the hub calls otherwise."""
    return name.replace(_FORMER, _PRESENT)


def _renamed(layer: ExpertLayer) -> bool:
    return layer.kind == "modules" and _FORMER in f"{layer.module}."


def _apart(plan: BitPlan, unit: int, name: str, other: Format) -> MismatchError:
    return MismatchError(
        f"{plan.units.label(unit)} has {plan.format_of(unit)}, another part of {name} has {other}; "
        "a module has one format: solve again with a profile that ties them"
    )
