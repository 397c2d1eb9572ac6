"""Write your own target: what another runtime can hold.

Run it with `python examples/own_target.py`. It reads the headers of a bundled model.

A target says which widths a runtime stores, which units it forces to share a format, and whether
the shapes of a model's matrices fit it. The guide is the docstring of
`bitknap.quantization.targets.target`.
"""

import bitknap
from bitknap.allocation import Units
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.bundled import folder_of
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.targets.shape_rules import TARGETS, fits
from bitknap.quantization.targets.target import Fit


class TileEngine:
    """A made-up accelerator: 4 and 8 bits, tiles of 32 × 32, one format an expert."""

    name = "tile-engine"
    about = "A made-up accelerator with tiles of 32 x 32."
    bits = (4, 8)
    profile = "expert"

    def fit(self, units: Units) -> Fit:
        """Judge all units together, before any weight is read."""
        wrong = (units.rows % 32 != 0) | (units.cols % 32 != 0)
        if wrong.any():
            reason = f"{units.label(int(wrong.argmax()))} is not made of tiles of 32 x 32"
            return Fit(target=self, possible=False, bits=(), groups=(), reason=reason)
        return Fit(target=self, possible=True, bits=self.bits, groups=(32,), reason="")


def main() -> tuple[Fit, ...]:
    """Judge a bundled model, and plan for the target above."""
    source = Checkpoint.open(folder_of("reference:mixtral"))
    units = walk_headers(source.config, source.shapes, ()).units
    judged = fits(units, (TileEngine(), *TARGETS))
    for one in judged:
        print(f"{one.target.name}: {'yes' if one.possible else 'no'} {one.reason}")

    ours = judged[0]
    table = bitknap.estimate(
        "reference:mixtral",
        estimator=bitknap.DataFree(),
        formats=bitknap.formats(bits=ours.bits, group_size=ours.groups),
    )
    tied = table.tie(bitknap.profile(ours.target.profile))
    plan = bitknap.solve(bitknap.Problem(tied, bitknap.Budget.bits(5))).plan
    print(f"a plan for {ours.target.name}: {plan.bpw:.3f} bits a weight")
    return judged


if __name__ == "__main__":
    main()
