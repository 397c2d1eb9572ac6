"""The protocol `Target`, and how to write your own.

A target is another runtime: which formats it stores, which units it forces to share one (its
profile), how its weights are rounded, and how its files are written.

    class EightBitOnly:
        name = "eight-bit-only"
        about = "One scale a row, 8 bits."
        profile = "free"                        # a name in `PROFILES`
        bits = (8,)
        rounding = ""                           # any method that rounds to grids
        reads_weights = True                    # False: a configuration for another tool
        cuts_rows = False                       # True: row blocks may have formats of their own

        def fit(self, units):
            return Fit(target=self, possible=True, bits=(8,), groups=(), reason="")

        def check_model(self, config):
            pass

        def menu(self, units):
            return (Format(8, 0),)

        def holds(self, format, rows, cols):
            return np.full(np.shape(cols), format == Format(8, 0))

        def check(self, plan):
            check_plan(self, plan)              # `quantize/targets/requirements.py`

        def output(self, out):
            return "folder"

        def check_output(self, source, out):
            pass

        def export(self, job):
            ...

* `fit` judges all units together, by their rows and columns, before any weight is read: it is what
  `bitknap inspect` prints.
* `menu` lists the formats that `--target` offers; their `nbytes` are the runtime's exact bytes.
* `export` is called with a plan that `check` accepts, for the very model that is opened. It writes
  all of its output or none (`whole_folder` in `disk/outputs.py`), reads it back with the runtime's
  own code where that is installed, and says in `Exported.checks` what was verified.

A target is one file in `quantize/targets/` and one row in `TARGETS` there (`catalog.py`). A package
of your own offers one as an entry point of `bitknap.targets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Bools
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import Units
from bitknap.disk.outputs import Kind
from bitknap.progress import Progress

if TYPE_CHECKING:
    from bitknap.quantization.models.matrix_views import Layout
    from bitknap.quantization.packed.writer import Rounded
    from bitknap.quantization.source.checkpoint import Checkpoint


class Target(Protocol):
    """Another runtime, from what it can hold to the file that it loads."""

    @property
    def name(self) -> str:
        """The runtime's name on the command line."""
        ...

    @property
    def about(self) -> str:
        """One sentence for lists."""
        ...

    @property
    def bits(self) -> tuple[int, ...]:
        """Widths that the runtime stores."""
        ...

    @property
    def profile(self) -> str:
        """Name in `PROFILES` of the rule that says which units must share a format."""
        ...

    @property
    def rounding(self) -> str:
        """Name in `METHODS` of the rounding that its files have; "" if any method will do."""
        ...

    @property
    def reads_weights(self) -> bool:
        """Whether weights are rounded and written; False for configurations of other tools."""
        ...

    @property
    def cuts_rows(self) -> bool:
        """Whether row blocks of a matrix may have formats of their own."""
        ...

    def fit(self, units: Units) -> Fit:
        """Return how a model's shapes fit.

        Args:
            units: all units that a plan covers.
        """
        ...

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Raise ModelError if the runtime does not run such a model, before anything is measured.

        Args:
            config: the model's `config.json`.
        """
        ...

    def menu(self, units: Units) -> tuple[Format, ...]:
        """Return the formats that at least one of the units can have, from few bits to many."""
        ...

    def holds(self, format: Format, rows: npt.ArrayLike, cols: npt.ArrayLike) -> Bools:
        """Return whether matrices can be stored in a format, broadcast over `rows` and `cols`."""
        ...

    def check(self, plan: BitPlan) -> None:
        """Raise MismatchError unless the runtime can hold the plan.

        The message names the first unit that it cannot hold, and the ways out.
        """
        ...

    def output(self, out: Path) -> Kind:
        """Return whether the output of that name will be a file or a folder."""
        ...

    def check_output(self, source: Checkpoint, out: Path) -> None:
        """Raise ModelError if that output cannot be written of a model, before it is measured.

        Args:
            source: the model, opened.
            out: the output.
        """
        ...

    def export(self, job: ExportJob) -> Exported:
        """Write the runtime's files.

        Raises:
            ModelError: the runtime has no such architecture.
            InputError: a package that is needed is missing, or the disk has no room.
            MismatchError: what was written is not what the plan says.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a model's shapes fit a target.

    Attributes:
        target: the runtime.
        possible: whether every matrix can be stored.
        bits: widths that every matrix can have.
        groups: its group sizes that divide every row.
        reason: why not, or what is lost; empty if all is well.
    """

    target: Target
    possible: bool
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What a target is asked to write.

    Attributes:
        source: the model, opened.
        layout: its units, and where each of them lies in its tensors.
        plan: the format of every unit, in the order of `layout`.
        out: the file or folder to write.
        rounded: how weights are rounded, with the statistics of units' inputs if they are known;
            None for targets that read no weights.
        max_shard_size: maximum bytes of a weight file, such as "5GB".
        overwrite: whether an output that this tool wrote is replaced.
        progress: called with (what, done, of).
    """

    source: Checkpoint
    layout: Layout
    plan: BitPlan
    out: Path
    rounded: Rounded | None = None
    max_shard_size: int | str = "5GB"
    overwrite: bool = False
    progress: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What a target has written.

    Attributes:
        path: the output.
        files: names of the files, relative to a folder; the name alone of a single file.
        nbytes: bytes of all files.
        unit_bytes: bytes of the units' codes and scales; None where none are written.
        checks: what was verified and how, one sentence with figures each.
        warnings: what a user should know before serving it, one sentence each.
    """

    path: Path
    files: tuple[str, ...]
    nbytes: int
    unit_bytes: int | None = None
    checks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
