"""Target `gguf`: a file that llama.cpp loads, or a folder with that file and a recipe for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bitknap.allocation.codecs.ggml import TYPES
from bitknap.allocation.problem.arrays import Bools
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import Units
from bitknap.disk.outputs import Kind
from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob

if TYPE_CHECKING:
    from bitknap.quantization.source.checkpoint import Checkpoint

# Types that are worth offering: of equally large ones, those that lose less.
_OF_256 = (
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k"),
    *("iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
)
_OF_32 = ("mxfp4", "iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
_KEPT = ("bf16", "fp16", "fp32", "mxfp4")


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

    def check_output(self, source: Checkpoint, out: Path) -> None:
        """Raise ModelError if the model whole is asked for, and llama.cpp has none of its kind."""
        if self.output(out) == "file":
            from bitknap.quantization.gguf import writer

            writer.check(source)

    def export(self, job: ExportJob) -> Exported:
        """Write the model whole, and in a folder the recipe for llama-quantize beside it."""
        from bitknap.quantization.targets.folders import gguf_files

        assert job.rounded is not None
        whole = self.output(job.out) == "file"
        write = gguf_files.write_file if whole else gguf_files.write_folder
        return write(job, job.rounded)
