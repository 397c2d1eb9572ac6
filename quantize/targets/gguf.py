"""Target `gguf`: a file that llama.cpp loads, or a folder with that file and a recipe for it.

OUT.gguf            the model whole: blocks of ggml, tokenizer and all
OUT/                otherwise, a folder:
  model.gguf        the same, where the architecture is known here
  tensor-types.txt  for `llama-quantize --tensor-type-file`: the plan's types
  imatrix.gguf      for `llama-quantize --imatrix`: with it, its blocks are exactly ours
  README.md         how to serve the one, and to use the others
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitknap.allocation.codecs.ggml import TYPES
from bitknap.allocation.problem.arrays import Bools
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import Units
from bitknap.disk.atomic import folder_bytes, write_whole
from bitknap.disk.manifest import names_in
from bitknap.disk.outputs import Kind, whole_folder, writing
from bitknap.errors import ModelError
from bitknap.quantization.gguf import imatrix, names, writer
from bitknap.quantization.gguf.tensors import type_of
from bitknap.quantization.rounding.ggml import importance
from bitknap.quantization.stacks.grouping import stacks
from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob

# Types that are worth offering: of equally large ones, those that lose less.
_OF_256 = (
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k"),
    *("iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
)
_OF_32 = ("mxfp4", "iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
_KEPT = ("bf16", "fp16", "fp32", "mxfp4")
MODEL, TYPE_FILE, IMPORTANCE = "model.gguf", "tensor-types.txt", "imatrix.gguf"


class Gguf(GridTarget):
    """llama.cpp: Q8_0, Q4_0 and their like have blocks of 32; K-quants and IQ types of 256."""

    name = "gguf"
    about = "llama.cpp: GGUF with ggml's own types, rounded by ggml."
    profile = "layer_proj"
    rounding = "ggml"
    rule = ShapeRule(
        bits=(1, 2, 3, 4, 5, 6, 8),
        groups=(32,),
        cols=32,
        full_cols=256,
        fallback="K-quants and IQ types, which are all below 4 bits, fall back to blocks of 32",
        fallback_bits=(4, 5, 8),
    )

    def menu(self, units: Units) -> tuple[Format, ...]:
        """Return the types that are offered, from few bits to many.

        Types with blocks of 32 are among them only where some rows are no multiple of 256.
        """
        whole = units.cols % 256 == 0
        types = dict.fromkeys((*(_OF_256 if whole.any() else ()), *(() if whole.all() else _OF_32)))
        size = {name: TYPES[name].nbytes / TYPES[name].block for name in types}
        return tuple(
            map(Format.ggml, sorted(types, key=lambda name: (TYPES[name].bits, size[name])))
        )

    def holds(self, format: Format, rows: npt.ArrayLike, cols: npt.ArrayLike) -> Bools:
        """Return whether matrices can be stored in a format, broadcast over `rows` and `cols`."""
        _, width = np.broadcast_arrays(np.asarray(rows), np.asarray(cols))
        if format.kind == "keep":
            held = width % (32 if format.source == "mxfp4" else 1) == 0
            return np.asarray(held & (format.source in _KEPT))
        return np.asarray((format.kind == "ggml") & (width % (format.group_size or 1) == 0))

    def output(self, out: Path) -> Kind:
        """Return "file" for a name that ends in .gguf."""
        return "file" if out.suffix.lower() == ".gguf" else "folder"

    def export(self, job: ExportJob) -> Exported:
        """Write the model whole, and in a folder the recipe for llama-quantize beside it."""
        if self.output(job.out) == "file":
            with writing(job.out):
                made = _model(job, job.out)
            return Exported(
                path=job.out,
                files=(job.out.name,),
                nbytes=made.nbytes,
                unit_bytes=made.unit_bytes,
                checks=(_said(made),),
                warnings=made.warnings,
            )
        with whole_folder(job.out, overwrite=job.overwrite, inputs=[job.source.folder]) as part:
            checks, warnings = _recipe(job, part)
            try:
                made = _model(job, part / MODEL)
                checks, warnings = [_said(made), *checks], [*made.warnings, *warnings]
                size: int | None = made.unit_bytes
            except ModelError as error:
                size = None
                warnings.append(f"no {MODEL} was written: {error}")
            write_whole(part / "README.md", _readme(whole=size is not None).encode())
        return Exported(
            path=job.out,
            files=tuple(names_in(job.out)),
            nbytes=folder_bytes(job.out),
            unit_bytes=size,
            checks=tuple(checks),
            warnings=tuple(warnings),
        )


def _model(job: ExportJob, out: Path) -> writer.Written:
    assert job.rounded is not None
    model = writer.model_of(job.source, job.plan, job.rounded)
    return writer.save(model, out, job.source.folder.name, job.progress)


def _said(made: writer.Written) -> str:
    return (
        f"{made.tensors} tensors read back with the plan's types and {made.unit_bytes:,} bytes of "
        "units, as predicted"
    )


def _recipe(job: ExportJob, folder: Path) -> tuple[list[str], list[str]]:
    """Write the types and the importances of the planned tensors; return checks and warnings."""
    units, types = job.plan.units, {}
    known: dict[str, np.ndarray] = {}
    nameless = []
    for run in stacks(units):
        first = int(run[0])
        name = names.of_unit(units.row(first))
        if name is None:
            nameless.append(units.label(first))
            continue
        tensor = f"{name}.weight"
        types[tensor] = type_of(job.plan.format_of(first), int(units.cols[first]))
        if job.rounded is not None and job.rounded.inputs is not None:
            known[tensor] = importance(job.rounded.inputs(run).squares)
    write_whole(folder / TYPE_FILE, imatrix.types_text(list(types.items())).encode())
    plan = writer.digest(job.plan)
    text = str(job.rounded.about.get("text", "")) if job.rounded else ""
    if known:
        write_whole(folder / IMPORTANCE, imatrix.content_of(known, text, plan))
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
    import re

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
