"""What is written for llama.cpp: a file, or a folder with that file and a recipe for it.

OUT.gguf            the model whole: blocks of ggml, tokenizer and all
OUT/                otherwise, a folder:
model.gguf        the same, where the architecture is known here
tensor-types.txt  for `llama-quantize --tensor-type-file`: the plan's types
imatrix.gguf      for `llama-quantize --imatrix`: with it, its blocks are exactly ours
README.md         how to serve the one, and to use the others
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.disk.atomic import check_space, folder_bytes, write_whole
from bitknap.disk.manifest import names_in, sign
from bitknap.disk.outputs import check_output, whole_folder
from bitknap.errors import ModelError
from bitknap.quantization.gguf import imatrix, names, writer
from bitknap.quantization.gguf.architectures import Unwritable
from bitknap.quantization.gguf.tensors import Model, type_of
from bitknap.quantization.packed.model_card import hub_id
from bitknap.quantization.packed.writer import Rounded
from bitknap.quantization.rounding.ggml import importance
from bitknap.quantization.stacks.grouping import stacks
from bitknap.quantization.targets.target import Exported, ExportJob

MODEL, TYPE_FILE, IMPORTANCE = "model.gguf", "tensor-types.txt", "imatrix.gguf"


def write_file(job: ExportJob, rounded: Rounded) -> Exported:
    """Write the model whole.

    Raises:
        ModelError: llama.cpp has no such architecture or tokenizer, or a weight is NaN.
    """
    model = writer.model_of(job.source, job.plan, rounded)
    made = writer.save(
        model, job.out, _name(job, model), overwrite=job.overwrite, progress=job.progress
    )
    return Exported(
        path=job.out,
        files=(job.out.name,),
        nbytes=made.nbytes,
        unit_bytes=made.unit_bytes,
        checks=(_said(made),),
        warnings=made.warnings,
    )


def write_folder(job: ExportJob, rounded: Rounded) -> Exported:
    """Write the recipe for llama-quantize, and the model whole if its architecture is known."""
    inputs, laid, why = [job.source.folder], None, ""
    check_output(job.out, "folder", overwrite=job.overwrite, inputs=inputs)
    try:
        model = writer.model_of(job.source, job.plan, rounded)
        laid = writer.lay_out(model, _name(job, model), MODEL)
    except Unwritable as error:
        why = f"no {MODEL} was written: {error}"
    if laid is None:
        with whole_folder(job.out, overwrite=job.overwrite, inputs=inputs) as part:
            checks, warnings = _texts(job.plan, rounded, part, whole=False)
        return _exported(job, checks, [*warnings, why])
    task = laid.task(job.out, "folder")
    check_space(job.out, laid.starts[-1] - task.partial.allocated())
    with task.made("export", overwrite=job.overwrite, progress=job.progress) as part:
        checks, warnings = _texts(job.plan, rounded, part, whole=True)
        made = laid.checked(part)
        sign(part)
    return _exported(job, [_said(made), *checks], [*made.warnings, *warnings], made.unit_bytes)


def _texts(
    plan: BitPlan, rounded: Rounded, folder: Path, *, whole: bool
) -> tuple[list[str], list[str]]:
    """Write all but the model; return checks and warnings."""
    said = _recipe(plan, rounded, folder)
    write_whole(folder / "README.md", _readme(whole=whole).encode())
    return said


def _exported(
    job: ExportJob, checks: Sequence[str], warnings: Sequence[str], unit_bytes: int | None = None
) -> Exported:
    return Exported(
        path=job.out,
        files=tuple(names_in(job.out)),
        nbytes=folder_bytes(job.out),
        unit_bytes=unit_bytes,
        checks=tuple(checks),
        warnings=tuple(warnings),
    )


def _name(job: ExportJob, model: Model) -> str:
    return hub_id(job.source.folder) or str(model.config.model_type)


def _said(made: writer.Written) -> str:
    return (
        f"{made.tensors} tensors read back with the plan's types and {made.unit_bytes:,} bytes of "
        "units, as predicted"
    )


def _recipe(plan: BitPlan, rounded: Rounded, folder: Path) -> tuple[list[str], list[str]]:
    """Write the types and the importances of the planned tensors; return checks and warnings."""
    units, types = plan.units, {}
    known: dict[str, np.ndarray] = {}
    nameless = []
    for run in stacks(units):
        first = int(run[0])
        name = names.of_unit(units.row(first))
        if name is None:
            nameless.append(units.label(first))
            continue
        tensor = f"{name}.weight"
        types[tensor] = type_of(plan.format_of(first), int(units.cols[first]))
        if rounded.inputs is not None:
            known[tensor] = importance(rounded.inputs(run).squares)
    write_whole(folder / TYPE_FILE, imatrix.types_text(list(types.items())).encode())
    text = str(rounded.about.get("text", ""))
    if known:
        write_whole(folder / IMPORTANCE, imatrix.content_of(known, text, writer.digest(plan)))
    warnings = (
        [
            f"llama.cpp's names for {len(nameless)} matrices are not known here, first "
            f"{nameless[0]}: llama-quantize gives them the type of its command"
        ]
        if nameless
        else []
    )
    return [_matched(types, folder / TYPE_FILE)], warnings


def _matched(types: Mapping[str, str], path: Path) -> str:
    """Match every pattern of a file of types against every name; the first that is found counts."""
    lines = [line.rpartition("=") for line in path.read_text().splitlines()]
    patterns = {re.compile(pattern): type for pattern, _, type in lines}
    for name, type in types.items():
        found = next((to for pattern, to in patterns.items() if pattern.search(name)), None)
        if found != type:
            raise ModelError(f"{path.name}: {name} would get {found}, the plan says {type}")
    return f"{len(types)} patterns of {TYPE_FILE} matched again: each tensor gets the plan's type"


def _readme(*, whole: bool) -> str:
    """Return how to serve what is in the folder."""
    serve = f"Serve it:\n\n    llama-server -m {MODEL}\n\n" if whole else ""
    return (
        "# A plan of Bitknap for llama.cpp\n\n"
        f"{serve}The same types by llama.cpp's own tools, from a GGUF file of the source model in "
        "16 or 32 bits:\n\n"
        f"    llama-quantize --imatrix {IMPORTANCE} --tensor-type-file {TYPE_FILE} \\\n"
        "        SOURCE.gguf OUT.gguf Q8_0\n"
    )
