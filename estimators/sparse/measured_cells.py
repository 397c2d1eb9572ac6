"""Measured losses of a few units in a few formats, from which sparse predictors learn.

A sample is one cell of the cost table that was measured: the loss of the model with one unit in one
format and everything else unchanged. Samples of another model, quantizer or set of formats are
refused, since their losses mean something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools, Floats, Longs, frozen
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import COLUMNS, Units
from bitknap.disk.column_file import read_columns, write_columns
from bitknap.errors import FileError, InputError, MismatchError
from bitknap.estimators.measuring.noise_floor import KEY, USUAL

KIND, VERSION = "bitknap.samples", "1.0"
_DTYPES: dict[str, npt.DTypeLike] = {
    "unit": np.int64,
    "column": np.int64,
    "loss": np.float64,
    "error": np.float64,
    **{f"units.{name}": dtype for name, dtype in COLUMNS.items()},
}
# Provenance that every set of samples must have, and that must agree when two are joined.
_ORIGIN = ("model", "method", "text", "tokens", "seed")
_JOINED = ("model", "method", "text")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossSamples:
    """Measured cells of one model's cost table, unique and sorted by unit and format.

    Cells that are given more than once are merged: the mean of their losses, with the standard
    error of that mean.

    Attributes:
        units: all units of the model, measured or not.
        formats: the formats that were candidates, measured or not.
        unit: index into `units`, int64[N].
        column: index into `formats`, int64[N].
        loss: measured increase of loss, float64[N], nats per token; noise may make it negative.
        error: standard error of `loss`, float64[N], or None.
        provenance: JSON values; "model" (fingerprint), "method" (quantizer), "text" (hash),
            "tokens" and "seed" are required.
    """

    units: Units
    formats: tuple[Format, ...]
    unit: Longs
    column: Longs
    loss: Floats
    error: Floats | None = None
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        missing = [key for key in _ORIGIN if key not in self.provenance]
        if missing:
            raise InputError(
                f"provenance: {missing[0]!r} is missing; samples must record what they were "
                "measured on"
            )
        loss = frozen("loss", self.loss, np.float64)
        if loss.ndim != 1 or not len(loss):
            raise InputError(
                f"loss: shape {loss.shape}, expected one entry per sample, at least one"
            )
        unit = frozen("unit", self.unit, np.int64, loss.shape)
        column = frozen("column", self.column, np.int64, loss.shape)
        error = None
        if self.error is not None:
            error = frozen("error", self.error, np.float64, loss.shape)
        formats = tuple(self.formats)
        _check("unit", (unit < 0) | (unit >= len(self.units)), unit, f"0 to {len(self.units) - 1}")
        _check(
            "column", (column < 0) | (column >= len(formats)), column, f"0 to {len(formats) - 1}"
        )
        _check("loss", ~np.isfinite(loss), loss, "a finite number; measure it again")
        if error is not None:
            _check("error", ~((error >= 0) & np.isfinite(error)), error, "a number of at least 0")
        values = _merged(unit * len(formats) + column, loss, error, len(formats))
        for name, value in {**values, "formats": formats}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "provenance", dict(self.provenance))

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def logs(self) -> Floats:
        """Logarithm of the losses that are believed; float64[N]."""
        logarithms: Floats = np.log(self.believed)
        return logarithms

    @property
    def floor(self) -> float:
        """Losses below this are noise of arithmetic, nats per token, above 0."""
        return float(self.provenance.get(KEY, USUAL))

    @property
    def believed(self) -> Floats:
        """The losses, those below the floor raised to it; float64[N]."""
        believed: Floats = np.maximum(self.loss, self.floor)
        return believed

    @property
    def log_errors(self) -> Floats:
        """Standard error of `logs` to first order, at most 1; zeros where none is known."""
        if self.error is None:
            return np.zeros(len(self))
        errors: Floats = np.minimum(self.error / self.believed, 1.0)
        return errors

    @property
    def seen(self) -> Bools:
        """Which units have at least one sample, bool[U]."""
        return np.bincount(self.unit, minlength=len(self.units)) > 0

    def pick(self, which: npt.NDArray[Any]) -> LossSamples:
        """Return some of the samples, by index or by boolean mask."""
        return replace(
            self,
            unit=self.unit[which],
            column=self.column[which],
            loss=self.loss[which],
            error=None if self.error is None else self.error[which],
        )

    def check(self, units: Units, formats: Sequence[Format], provenance: Mapping[str, Any]) -> None:
        """Raise MismatchError unless the samples are about these units and formats.

        Args:
            units: the model's units.
            formats: must be among the samples' formats; a kept precision need not be.
            provenance: its "model" and "method", if present, must equal the samples'.
        """
        for key in ("model", "method"):
            ours, theirs = self.provenance[key], provenance.get(key)
            if theirs is not None and theirs != ours:
                raise MismatchError(
                    f"samples: measured with {key} {ours}, used with {theirs}; measure them again"
                )
        if not self.units.same_as(units):
            raise MismatchError(
                f"samples: their {len(self.units)} units differ from the {len(units)} of this "
                "model; measure them on this model"
            )
        unknown = [f for f in formats if f.kind != "keep" and f not in self.formats]
        if unknown:
            raise MismatchError(
                f"samples: {unknown[0]} was not measured, only "
                f"{', '.join(map(str, self.formats))}; measure it or leave it out"
            )

    def join(self, other: LossSamples) -> LossSamples:
        """Return both together; cells that both have are merged.

        The provenance is the first's; entries that must agree are checked.

        Raises:
            MismatchError: the samples differ in model, quantizer, text, formats or units.
        """
        for key in _JOINED:
            ours, theirs = self.provenance[key], other.provenance[key]
            if ours != theirs:
                raise MismatchError(
                    f"samples: {key} {ours} cannot be joined with {theirs}; keep them apart"
                )
        if self.formats != other.formats or not self.units.same_as(other.units):
            raise MismatchError(
                "samples: those of different units or formats cannot be joined; keep them apart"
            )
        errors = None
        if self.error is not None and other.error is not None:
            errors = np.concatenate([self.error, other.error])
        kept = {k: v for k, v in self.provenance.items() if other.provenance.get(k) == v}
        if KEY in self.provenance or KEY in other.provenance:
            kept[KEY] = max(self.floor, other.floor)
        return LossSamples(
            units=self.units,
            formats=self.formats,
            unit=np.concatenate([self.unit, other.unit]),
            column=np.concatenate([self.column, other.column]),
            loss=np.concatenate([self.loss, other.loss]),
            error=errors,
            provenance={**{key: self.provenance[key] for key in _ORIGIN}, **kept},
        )

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file, whole or not at all; equal samples give equal bytes."""
        header = {
            "format": KIND,
            "version": VERSION,
            "formats": [item.name for item in self.formats],
            "projections": list(self.units.projections),
            "provenance": dict(self.provenance),
        }
        arrays = {"unit": self.unit, "column": self.column, "loss": self.loss}
        arrays |= {f"units.{name}": column for name, column in self.units.to_arrays().items()}
        if self.error is not None:
            arrays["error"] = self.error
        write_columns(Path(path), header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> LossSamples:
        """Read what `save` wrote.

        Raises:
            FileError: the file is missing, truncated, corrupt, or of an unknown version.
        """
        where = Path(path)
        header, arrays = read_columns(where, "loss samples", KIND, VERSION, _DTYPES, ("error",))
        try:
            columns = {name: arrays[f"units.{name}"] for name in COLUMNS}
            return cls(
                units=Units.from_arrays(columns, header["projections"]),
                formats=tuple(Format.parse(name) for name in header["formats"]),
                unit=arrays["unit"],
                column=arrays["column"],
                loss=arrays["loss"],
                error=arrays.get("error"),
                provenance=header["provenance"],
            )
        except InputError as error:
            raise FileError(f"{path}: {error}") from None


def _check(name: str, wrong: Bools, values: npt.NDArray[Any], wanted: str) -> None:
    if wrong.any():
        sample = int(wrong.argmax())
        raise InputError(f"{name}[{sample}]: {values[sample]} is not {wanted}")


def _merged(
    cells: Longs, loss: Floats, error: Floats | None, width: int
) -> dict[str, npt.NDArray[Any] | None]:
    """Return the columns with each cell once: mean loss, and the error of that mean."""
    distinct, place, count = np.unique(cells, return_inverse=True, return_counts=True)
    values: dict[str, npt.NDArray[Any] | None] = {
        "unit": distinct // width,
        "column": distinct % width,
        "loss": np.bincount(place, loss) / count,
        "error": None if error is None else np.sqrt(np.bincount(place, error**2)) / count,
    }
    for value in values.values():
        if value is not None:
            value.setflags(write=False)
    return values
