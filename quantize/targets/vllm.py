"""Target `vllm`: Bitknap's own packed checkpoint, which vLLM serves where Bitknap is installed.

It holds every format and every plan, packed as the plan says; transformers loads it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Bools
from bitknap.allocation.problem.format import GROUP_SIZES, Format, formats
from bitknap.allocation.problem.units import Units
from bitknap.disk.atomic import folder_bytes
from bitknap.disk.manifest import names_in
from bitknap.disk.outputs import Kind
from bitknap.quantization.targets.target import Exported, ExportJob, Fit

if TYPE_CHECKING:
    from bitknap.quantization.source.checkpoint import Checkpoint


class Vllm:
    """vLLM and transformers, by the plug-ins that come with Bitknap."""

    name = "vllm"
    about = "vLLM and transformers with Bitknap installed: any mix of formats, packed."
    profile = "gate_eq_up"
    bits = tuple(range(1, 9))
    rounding = ""
    reads_weights = True
    cuts_rows = True

    def fit(self, units: Units) -> Fit:
        """Every shape fits; group sizes that divide every row need no padding."""
        sizes = [size for size in GROUP_SIZES if isinstance(size, int)]
        groups = tuple(size for size in sizes if not (units.cols % size).any())
        return Fit(target=self, possible=True, bits=self.bits, groups=groups, reason="")

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Every model is packed; whether transformers can build it is checked on writing."""

    def menu(self, units: Units) -> tuple[Format, ...]:
        """Return every usual grid, from few bits to many."""
        return formats(self.bits, GROUP_SIZES, (False, True), ("fp16", "compact", "compact6"))

    def holds(self, format: Format, rows: npt.ArrayLike, cols: npt.ArrayLike) -> Bools:
        """Every grid but GPTQ's, and every precision that a source can have, is stored as it is."""
        shape = np.broadcast(np.asarray(rows), np.asarray(cols)).shape
        held = format.kind in ("grid", "keep") and not format.foreign
        return np.full(shape, held, dtype=np.bool_)

    def check(self, plan: BitPlan) -> None:
        """Every plan can be written; whether it belongs to the model is checked on writing."""

    def output(self, out: Path) -> Kind:
        """A folder is written."""
        return "folder"

    def check_output(self, source: Checkpoint, out: Path) -> None:
        """What can be written does not depend on the output's name."""

    def export(self, job: ExportJob) -> Exported:
        """Write the packed checkpoint."""
        from bitknap.quantization.packed import writer

        sizes = writer.save(
            job.source,
            job.plan,
            job.out,
            job.rounded or writer.BY_RTN,
            max_shard_size=job.max_shard_size,
            overwrite=job.overwrite,
            progress=job.progress,
        )
        return Exported(
            path=job.out,
            files=tuple(names_in(job.out)),
            nbytes=folder_bytes(job.out),
            unit_bytes=sizes["written"],
            checks=(
                f"the units take {sizes['written']:,} bytes, as the plan says",
                "transformers would build the model that the configuration describes",
            ),
        )
