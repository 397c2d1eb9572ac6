"""Write a plan as the files of another runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bitknap.allocation import BitPlan
from bitknap.api.live import LiveModel, Model, check_named, on_disk
from bitknap.api.quantizing import planned_source, rounded_for
from bitknap.api.requests import Calibration, Resume
from bitknap.disk.outputs import check_apart, check_output
from bitknap.progress import Progress
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.buildable import check_source
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.rounding.methods import planned
from bitknap.quantization.source.checkpoint import Checkpoint, places, resolve
from bitknap.quantization.stacks.alignment import aligned
from bitknap.quantization.stacks.row_blocks import layout_for
from bitknap.quantization.targets import requirements
from bitknap.quantization.targets.catalog import target_of
from bitknap.quantization.targets.target import Exported, ExportJob, Target
from bitknap.report.table_facts import few_tokens_note


def export(
    plan: BitPlan,
    model: Model,
    to: Target | str,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    resume: Resume | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a plan of a model as the files of another runtime, and verify them.

    Finished pieces of weights are kept in a hidden folder next to `out`: after a kill or an error
    the same call continues from there and writes the same bytes.

    Args:
        plan: A plan made from a table of this model.
        model: A folder, a hub id, "reference:NAME", or a `LiveModel`, which is saved to a temporary
            folder first.
        to: The runtime: a name that `bitknap list targets` prints, or a `Target`.
        out: File or folder to write; it appears once it is complete.
        calibration: Text, tokens, seed and memory of rounding methods that calibrate. The roles and
            the method come from the plan.
        resume: `overwrite` replaces an existing `out` that Bitknap wrote, and the remains of a run
            with other inputs; `journal` keeps each layer finished by a layer-by-layer calibration.
        progress: Called with (what, done, of).

    Raises:
        InputError: There is no such target, a package is missing, or `out` may not be written.
        MismatchError: The plan is for another model, or the runtime cannot hold it; the message
            names the first unit that it cannot hold, and the ways out.
        ModelError: The runtime has no such architecture, or a weight is NaN or infinite.
    """
    target, kept, path = target_of(to), resume or Resume(), Path(out)
    if not isinstance(model, LiveModel):
        check_named(model)
        check_apart(path, places(model))  # check before fetching anything
    target.check(plan)
    given = calibration or Calibration()
    asked = replace(given, include=roles_of(plan.units), rounding=planned(plan))
    with on_disk(model) as place:
        origin = Checkpoint.open(resolve(place))
        check_output(
            path,
            target.output(path),
            overwrite=kept.overwrite,
            inputs=[origin.folder],
            copied_from=origin.folder,
        )
        target.check_model(origin.config)
        target.check_output(origin, path)
        check_source(origin, asked.include, reads_text=asked.method.needs_inputs)
        return _exported(origin, plan, target, path, asked, kept, progress)


def _exported(
    origin: Checkpoint,
    plan: BitPlan,
    target: Target,
    path: Path,
    asked: Calibration,
    kept: Resume,
    progress: Progress | None,
) -> Exported:
    """Let a target write a plan of a checkpoint, or of the transformed copy that it describes."""
    with planned_source(origin, plan, path) as source:
        writer.check_plan(source, plan)
        layout = walk_headers(source.config, source.shapes, asked.include)
        layout = layout_for(plan.units, layout)
        rounded: writer.Rounded | None = None
        few: list[tuple[int, int, str, int]] = []
        if target.reads_weights:
            rounded, few = rounded_for(origin, source, plan, asked, kept, progress)
        job = ExportJob(
            source=source,
            layout=layout,
            plan=aligned(plan, layout),
            out=path,
            rounded=rounded,
            overwrite=kept.overwrite,
            progress=progress,
        )
        written = target.export(job)
    seen = (few_tokens_note(few),) if few else ()
    return replace(written, warnings=(*written.warnings, *seen))


def sizes_of(written: Exported, plan: BitPlan) -> dict[str, Any]:
    """Return an export in the form of what `quantize` returns, with "checks" and "warnings"."""
    return {
        "method": str(plan.header.get("method", "rtn")),
        "predicted": plan.total_bytes,
        "written": written.unit_bytes,
        "checkpoint": written.nbytes,
        "few_tokens": [],
        "decoded": 0,
        "left_out": {},
        "checks": written.checks,
        "warnings": written.warnings,
    }


def coarsen(plan: BitPlan, to: Target | str) -> BitPlan:
    """Return a plan that a runtime can hold, never with fewer bits or bytes for any unit.

    Units that the runtime forces to share a format get the smallest of its formats that has at
    least the bits and the bytes that the plan gives to each of them. The costs that the plan was
    made from say nothing about the result; a plan solved for the runtime loses less at equal bytes.

    Args:
        plan: A plan.
        to: The runtime: a name that `bitknap list targets` prints, or a `Target`.

    Raises:
        InputError: There is no such target.
        MismatchError: The plan has row blocks, or the runtime has no format that wide.
    """
    return requirements.coarsened(target_of(to), plan)
