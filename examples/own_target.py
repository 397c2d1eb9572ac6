"""Write your own target: what another runtime can hold, and the files that it reads.

Run it with `python examples/own_target.py`. It plans a bundled model and writes the plan.

A target says which formats a runtime stores, which units it forces to share one, and how its files
are written. The guide is the docstring of `bitknap.quantization.targets.target`; targets that store
integer grids start from `GridTarget`.
"""

import json
import tempfile
from pathlib import Path

import bitknap
from bitknap.disk.outputs import whole_folder
from bitknap.quantization.targets.shape_rules import GridTarget, ShapeRule
from bitknap.quantization.targets.target import Exported, ExportJob


class TileEngine(GridTarget):
    """A made-up accelerator: 4 and 8 bits, tiles of 32 × 32, one format an expert."""

    name = "tile-engine"
    about = "A made-up accelerator with tiles of 32 x 32."
    profile = "expert"
    rule = ShapeRule(bits=(4, 8), groups=(32,), rows=32, cols=32)
    reads_weights = False

    def export(self, job: ExportJob) -> Exported:
        """Write the width of each unit, by its name."""
        units = job.plan.units
        widths = {units.label(i): job.plan.format_of(i).bits for i in range(len(units))}
        source = job.source.folder
        with whole_folder(job.out, overwrite=job.overwrite, inputs=[source]) as folder:
            (folder / "tiles.json").write_text(json.dumps(widths, indent=1))
        return Exported(
            path=job.out,
            files=("tiles.json",),
            nbytes=(job.out / "tiles.json").stat().st_size,
            checks=(f"{len(widths)} units have a width",),
        )


def main() -> Exported:
    """Plan a bundled model for the target above, and write the plan."""
    target = TileEngine()
    table = bitknap.estimate(
        "reference:mixtral",
        estimator=bitknap.DataFree(),
        formats=bitknap.Formats(target=target),
    )
    tied = table.tie(bitknap.profile(target.profile))
    plan = bitknap.solve(bitknap.Problem(tied, bitknap.Budget.bits(5))).plan
    print(f"a plan for {target.name}: {plan.bpw:.3f} bits a weight")
    with tempfile.TemporaryDirectory() as folder:
        written = bitknap.export(plan, "reference:mixtral", target, Path(folder) / "out")
    print(f"{', '.join(written.files)}: {', '.join(written.checks)}")
    return written


if __name__ == "__main__":
    main()
