"""Requests: frozen values that say how a model is calibrated, what it may become, and what is kept.

Python callers and the command line build the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from bitknap.allocation import Format, Units
from bitknap.allocation import formats as make_formats
from bitknap.allocation.problem.checks import number, whole
from bitknap.allocation.problem.format import GROUP_SIZES
from bitknap.allocation.refinement.loop import EVALUATIONS
from bitknap.errors import InputError
from bitknap.estimators.costs.weighed_errors import plainest
from bitknap.estimators.measuring.documents import TextLike, text_of
from bitknap.estimators.measuring.text import BUILTIN
from bitknap.estimators.signals import rows_of_matrices as blocks_of_rows
from bitknap.estimators.tables.several_texts import Rule
from bitknap.estimators.tables.super_expert_floor import FLOOR
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed.shards import MAX_SHARD_SIZE
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.rounding.methods import method as method_of
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.source.checkpoint import Checkpoint

CALIBRATION_TOKENS = 8_192
# Tokens of the calibration text that plans are measured on.
REFINE_TOKENS = 16_384


def default_formats(units: Units | None = None) -> tuple[Format, ...]:
    """Return the options of the main job: widths × group sizes × zero point × metadata.

    Args:
        units: leave out formats that another one equals on every row of these units.
    """
    every = make_formats(range(1, 9), GROUP_SIZES, (False, True), ("fp16", "compact"))
    widths = () if units is None else np.unique(units.cols).tolist()
    return tuple(f for f in every if not widths or any(plainest(f, w) == f for w in widths))


@dataclass(frozen=True, slots=True)
class TextSets:
    """Several calibration texts, each of which gives a cost table of its own.

    Attributes:
        sets: The texts, each as `Calibration.text` takes one.
    """

    sets: Sequence[TextLike]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", tuple(map(text_of, self.sets)))
        if not self.sets:
            raise InputError("text: no calibration set is given; pass at least one text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a model is run on to see which weights matter.

    Attributes:
        text: A path, "builtin", a list of strings (each a document), token windows (integers
            [windows, length], or an iterable of rows), or `TextSets` of several of these.
        tokens: Tokens to use of each text.
        include: Roles beside routed experts: "attention", "shared", "dense".
        seed: Random seed of the noise, the labels and the rotation that are drawn.
        rounding: How weights will be rounded, which costs are measured for.
        max_memory: Bytes; where more would be needed, gradients or the whole pass go layer by
            layer. None sets no bound.
        robust: What a cost becomes over several texts: "mean" when not given, "worst" or "mean+sd".
        risk: Standard deviations that "mean+sd" adds.
    """

    text: TextLike | TextSets = BUILTIN
    tokens: int = CALIBRATION_TOKENS
    include: Collection[str] = ()
    seed: int = 0
    rounding: Rounding | str = RTN
    max_memory: int | None = None
    robust: Rule | None = None
    risk: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.text, TextSets):
            object.__setattr__(self, "text", text_of(self.text))
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "rounding", method_of(self.rounding))
        number("risk", self.risk)
        if self.robust is not None and self.robust not in get_args(Rule):
            raise InputError(f"robust: {self.robust!r} is not one of {', '.join(get_args(Rule))}")

    @property
    def method(self) -> Rounding:
        """How weights will be rounded, as a value."""
        return method_of(self.rounding)

    @property
    def each(self) -> tuple[Calibration, ...]:
        """One calibration for each text."""
        sets = self.text.sets if isinstance(self.text, TextSets) else (self.text,)
        return tuple(replace(self, text=one) for one in sets)

    @property
    def only_text(self) -> TextLike:
        """The text, where there is one.

        Raises:
            InputError: There are several.
        """
        if isinstance(self.text, TextSets):
            if len(self.text.sets) > 1:
                raise InputError(f"text: {len(self.text.sets)} sets are given; pass one text here")
            return self.text.sets[0]
        return self.text

    def on(self, text: TextLike | TextSets | None) -> Calibration:
        """Return the calibration on another text, or this one if none is given.

        Raises:
            InputError: This one says which text already.
        """
        if text is None:
            return self
        if not (isinstance(self.text, str) and self.text == BUILTIN):
            raise InputError(
                "text: given twice, as `text` and in `calibration`; leave one of them out"
            )
        return replace(self, text=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """What the units of a model may become.

    Attributes:
        options: Formats to choose from; `default_formats()` when not given.
        keep: Also allow leaving a matrix in the precision that it is stored in.
        protect: Bits below which an expert whose output is far above its layer's may have no
            format; 0 protects none.
        row_blocks: Runs of rows of each matrix that may have formats of their own.
        permute: Sort the experts' neurons by sensitivity first, so that the row blocks differ; one
            more pass over the (first) text.
        rotate: Turn the residual stream by random Hadamard transforms first.
    """

    options: Sequence[Format] | None = None
    keep: bool = False
    protect: int = FLOOR
    row_blocks: int = 1
    permute: bool = False
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.options is not None:
            object.__setattr__(self, "options", tuple(self.options))
        whole("protect", self.protect)
        blocks_of_rows.check(self.row_blocks, permute=self.permute)

    @classmethod
    def of(cls, given: Sequence[Format] | Formats | None) -> Formats:
        """Return the request that a caller made, if by a list of formats alone."""
        return given if isinstance(given, Formats) else cls(options=given)

    def listed(self, source: Checkpoint) -> tuple[Format, ...] | None:
        """Return the formats for a model; None leaves them to `default_formats` of its units.

        Raises:
            InputError: `keep` is asked for, and experts have no one precision that can be kept.
        """
        if not self.keep:
            return None if self.options is None else tuple(self.options)
        options = default_formats() if self.options is None else self.options
        return (*options, Format.keep(_precision(source)))


def _precision(source: Checkpoint) -> str:
    """Return the precision that a model's experts are stored in, all of them in one."""
    views = walk_headers(source.config, source.shapes, ()).views
    stored = {source.precision(view.tensor) for view in views}
    if len(stored) > 1:
        raise InputError(f"`keep`: experts are stored in {', '.join(sorted(stored))}; leave it out")
    kept = stored.pop()
    if not kept:
        raise InputError("`keep`: experts are stored in a form that cannot be kept; leave it out")
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """What is kept on disk, so that a killed run goes on.

    Attributes:
        journal: File that keeps what is measured; the same call goes on from it after a kill.
            Delete it with `bitknap.estimators.measuring.readings.forget` once the result is saved.
        scratch: Folder for a permuted or rotated copy of the model, which `quantize` uses again;
            a temporary one, deleted, when not given.
        overwrite: Replace an output that exists, and what a run with other inputs left.
    """

    journal: Path | None = None
    scratch: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a plan's weights are rounded and written.

    Attributes:
        rounding: How to round; what the plan was made for when not given.
        force: Round in another way than the plan's costs are measured for.
        max_shard_size: Most bytes of a file, such as "5GB"; a larger tensor has its own file.
    """

    rounding: Rounding | str | None = None
    force: bool = False
    max_shard_size: int | str = MAX_SHARD_SIZE

    def __post_init__(self) -> None:
        if self.rounding is not None:
            object.__setattr__(self, "rounding", method_of(self.rounding))


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """How plans are searched by measuring them.

    Attributes:
        evaluations: Plans to measure.
        driver: What proposes plans: "belief", or Optuna's "tpe" or "cmaes".
        tokens: Tokens of the calibration text to measure plans on.
        seed: Random seed of the proposals.
    """

    evaluations: int = EVALUATIONS
    driver: Literal["belief", "tpe", "cmaes"] = "belief"
    tokens: int = REFINE_TOKENS
    seed: int = 0
