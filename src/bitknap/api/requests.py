"""Requests: frozen values that say how a model is calibrated, what it may become, and what is kept.

Python callers and the command line build the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from bitknap.allocation import Format, Units
from bitknap.allocation import formats as make_formats
from bitknap.allocation.problem.checks import number, whole
from bitknap.allocation.problem.format import GROUP_SIZES
from bitknap.allocation.refinement.loop import EVALUATIONS, FORMER_DRIVERS
from bitknap.deprecation import renamed_value
from bitknap.errors import InputError
from bitknap.estimators.costs.weighed_errors import plainest
from bitknap.estimators.evidence.effort import Effort
from bitknap.estimators.measuring.documents import TextLike, text_of
from bitknap.estimators.measuring.text import BUILTIN
from bitknap.estimators.signals import rows_of_matrices as blocks_of_rows
from bitknap.estimators.tables.several_texts import Rule
from bitknap.estimators.tables.super_expert_floor import FLOOR
from bitknap.names import check_name
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.shards import MAX_SHARD_SIZE
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.rounding.methods import method as method_of
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.devices import AUTO, Computing, device_of, dtype_of, memory_limit
from bitknap.quantization.stacks.row_blocks import split_rows
from bitknap.quantization.targets.catalog import target_of
from bitknap.quantization.targets.target import Target

CALIBRATION_TOKENS = 8_192
# Number of calibration tokens that plans are measured on.
REFINE_TOKENS = 16_384


def default_formats(units: Units | None = None) -> tuple[Format, ...]:
    """Return the default formats: widths × group sizes × zero point × metadata.

    Args:
        units: omit formats that equal another one on every row of these units.
    """
    every = make_formats(range(1, 9), GROUP_SIZES, (False, True), ("fp16", "compact"))
    widths = () if units is None else np.unique(units.cols).tolist()
    return tuple(f for f in every if not widths or any(plainest(f, w) == f for w in widths))


@dataclass(frozen=True, slots=True)
class TextSets:
    """Several calibration texts, each with its own cost table.

    Attributes:
        sets: The texts, each in a form that `Calibration.text` accepts.
    """

    sets: Sequence[TextLike]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", tuple(map(text_of, self.sets)))
        if not self.sets:
            raise InputError("text: no calibration set is given; pass at least one text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How a model is calibrated, to see which weights matter.

    Attributes:
        text: A path, "builtin", a list of strings (each a document), token windows (integers
            [windows, length], or an iterable of rows), or `TextSets` of several of these.
        tokens: Number of tokens to use from each text.
        include: Roles besides routed experts: "attention", "shared", "dense".
        seed: Random seed for noise, labels and rotation.
        rounding: How weights will be rounded; costs are measured for this method.
        device: Where models run and weights are rounded: "auto" (a GPU if there is one), "cpu",
            "cuda" or "cuda:N".
        dtype: Dtype of matrix products in running models: "auto" (bfloat16 on a GPU, float32 on the
            CPU), "float32" or "bfloat16". All else is computed in float32.
        max_memory: Maximum bytes; a model that needs more is run layer by layer. None sets no
            bound. It holds for the CPU.
        device_memory: Maximum bytes on a GPU; what is free there when not given.
        imatrix: An importance matrix of llama.cpp that stands for the text, for the model that it
            was made with: no model is run. For estimators that read no text, and methods that take
            mean squares of inputs alone ("ggml").
        robust: How costs of several texts are combined: "mean" (default), "worst" or "mean+sd".
        risk: Number of standard deviations that "mean+sd" adds.
        thorough: Round all rows of every matrix, not a sample of them, and measure every group by
            itself, on all tokens; takes many times as long on large models.
        measure_time: Seconds after which no further reading of groups begins. Groups that were not
            measured by then share a gain, so the table depends on how fast the machine is;
            with a journal the same call goes on from the readings taken so far. None sets no limit.
    """

    text: TextLike | TextSets = BUILTIN
    tokens: int = CALIBRATION_TOKENS
    include: Collection[str] = ()
    seed: int = 0
    rounding: Rounding | str = RTN
    device: str | torch.device = AUTO
    dtype: str | torch.dtype = AUTO
    max_memory: int | None = None
    device_memory: int | None = None
    imatrix: Path | None = None
    robust: Rule | None = None
    risk: float = 1.0
    thorough: bool = False
    measure_time: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, TextSets):
            object.__setattr__(self, "text", text_of(self.text))
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "rounding", method_of(self.rounding))
        object.__setattr__(self, "device", device_of(self.device))
        dtype_of(self.dtype, self.on_device)
        number("risk", self.risk)
        if self.measure_time is not None:
            number("measure_time", self.measure_time)
        if self.robust is not None:
            check_name("robust", self.robust, get_args(Rule))

    @property
    def method(self) -> Rounding:
        """How weights will be rounded, as a value."""
        return method_of(self.rounding)

    @property
    def effort(self) -> Effort:
        """How much estimators round and measure."""
        return Effort(thorough=self.thorough, seconds=self.measure_time)

    @property
    def on_device(self) -> torch.device:
        """Where models run and weights are rounded, as a value."""
        return device_of(self.device)

    @property
    def products(self) -> torch.dtype:
        """Dtype of matrix products, as a value."""
        return dtype_of(self.dtype, self.on_device)

    @property
    def computing(self) -> Computing:
        """Where and how models compute, as a value."""
        return Computing(device=self.on_device, dtype=self.products, host=self.max_memory)

    @property
    def memory(self) -> int | None:
        """Maximum bytes on the device; None for any number."""
        return memory_limit(self.on_device, self.max_memory, self.device_memory)

    @property
    def each(self) -> tuple[Calibration, ...]:
        """One calibration for each text."""
        sets = self.text.sets if isinstance(self.text, TextSets) else (self.text,)
        return tuple(replace(self, text=one) for one in sets)

    @property
    def only_text(self) -> TextLike:
        """The only text.

        Raises:
            InputError: There are several texts.
        """
        if isinstance(self.text, TextSets):
            if len(self.text.sets) > 1:
                raise InputError(f"text: {len(self.text.sets)} sets are given; pass one text here")
            return self.text.sets[0]
        return self.text

    def on(self, text: TextLike | TextSets | None) -> Calibration:
        """Return the calibration on another text, or this one if none is given.

        Raises:
            InputError: This calibration already has a text.
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
    """Which formats the units of a model may have.

    Attributes:
        options: Formats to choose from; `default_formats()` when not given.
        keep: Also allow leaving a matrix unquantized, in its stored precision.
        protect: Minimum bits for an expert whose output is far above its layer's; 0 protects none.
        row_blocks: Number of row blocks of each matrix, each with its own format.
        permute: First sort the experts' neurons by sensitivity, so that row blocks differ; takes
            one more pass over the (first) text.
        rotate: First rotate the residual stream by random Hadamard transforms.
        target: Runtime whose formats alone are offered, a name in `TARGETS` or a `Target`; of
            `options`, those that it has.
    """

    options: Sequence[Format] | None = None
    keep: bool = False
    protect: int = FLOOR
    row_blocks: int = 1
    permute: bool = False
    rotate: bool = False
    target: Target | str | None = None

    def __post_init__(self) -> None:
        if self.options is not None:
            object.__setattr__(self, "options", tuple(self.options))
        whole("protect", self.protect)
        blocks_of_rows.check(self.row_blocks, permute=self.permute)
        if self.target is not None:
            object.__setattr__(self, "target", target_of(self.target))
            self._check_target(target_of(self.target))

    @classmethod
    def of(cls, given: Sequence[Format] | Formats | None) -> Formats:
        """Return the request of a caller, who may pass only a list of formats."""
        return given if isinstance(given, Formats) else cls(options=given)

    @property
    def runtime(self) -> Target | None:
        """The runtime whose formats alone are offered, as a value."""
        return None if self.target is None else target_of(self.target)

    def _check_target(self, target: Target) -> None:
        if target.cuts_rows:
            return
        if self.row_blocks > 1:
            raise InputError(
                f"`row_blocks`: {target.name} stores one format a matrix; leave it out"
            )
        if self.keep:
            raise InputError(f"`keep`: {target.name} has no format for that; leave it out")

    def listed(self, source: Checkpoint, include: Collection[str]) -> tuple[Format, ...] | None:
        """Return the formats for a model; None means `default_formats` of its units.

        Args:
            source: the model.
            include: roles besides routed experts.

        Raises:
            InputError: `keep` is set, but the experts do not share one precision that can be kept;
                or the target has none of the formats.
        """
        if self.runtime is not None and not self.runtime.cuts_rows:
            return self._of_target(self.runtime, source, include)
        if not self.keep:
            return None if self.options is None else tuple(self.options)
        options = default_formats() if self.options is None else self.options
        return (*options, Format.keep(_precision(source)))

    def _of_target(
        self, target: Target, source: Checkpoint, include: Collection[str]
    ) -> tuple[Format, ...]:
        target.check_model(source.config)
        menu = target.menu(self.layout(source, include).units)
        if self.options is not None:
            # Types of ggml are known by their widths, grids by all but how they are stored.
            wanted = {*self.options, *(one.bits for one in self.options if not one.foreign)}
            menu = tuple(one for one in menu if one in wanted or _asked_as(one) in wanted)
        if not menu:
            raise InputError(
                f"`options`: {target.name} has none of these formats for this model; leave them out"
            )
        return menu

    def layout(self, source: Checkpoint, include: Collection[str]) -> Layout:
        """Return the units of a model that these formats are for, cut into row blocks.

        Args:
            source: the model.
            include: roles besides routed experts.
        """
        whole = walk_headers(source.config, source.shapes, include)
        return whole if self.row_blocks == 1 else split_rows(whole, self.row_blocks)


def _asked_as(format: Format) -> Format | int:
    """Return what a format of another runtime's own files has in common with those asked for."""
    if not format.foreign:
        return format
    return format.bits if format.kind == "ggml" else replace(format, metadata="fp16")


def _precision(source: Checkpoint) -> str:
    """Return the one precision in which all experts of a model are stored."""
    views = walk_headers(source.config, source.shapes, ()).views
    stored = {source.precision(view.tensor) for view in views}
    if len(stored) > 1:
        raise InputError(
            f"`keep`: experts are stored in several precisions ({', '.join(sorted(stored))}), and "
            "one can be kept; leave it out"
        )
    kept = stored.pop()
    if not kept:
        raise InputError("`keep`: experts are stored in a form that cannot be kept; leave it out")
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Files kept on disk so that a killed run can continue.

    Attributes:
        journal: File that keeps measurements; after a kill, the same call continues from it.
            Delete it with `bitknap.estimators.measuring.readings.forget` once the result is saved.
        scratch: Folder for a permuted or rotated copy of the model, which `quantize` reuses; a
            temporary folder when not given.
        overwrite: Replace an existing output, and the remains of a run with other inputs.
    """

    journal: Path | None = None
    scratch: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a plan's weights are rounded and written.

    Attributes:
        rounding: Rounding method; the one that the plan was made for when not given.
        force: Allow another method than the one that the plan's costs are measured for.
        max_shard_size: Maximum size of a file, such as "5GB"; a larger tensor has its own file.
    """

    rounding: Rounding | str | None = None
    force: bool = False
    max_shard_size: int | str = MAX_SHARD_SIZE

    def __post_init__(self) -> None:
        if self.rounding is not None:
            object.__setattr__(self, "rounding", method_of(self.rounding))


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """How plans are refined by measuring them.

    Attributes:
        evaluations: Number of plans to measure.
        driver: How plans are proposed: "posterior" (a Bayesian model of the costs), or by Optuna's
            "tpe" or "cmaes" sampler.
        tokens: Number of calibration tokens to measure plans on.
        seed: Random seed of the proposals.
    """

    evaluations: int = EVALUATIONS
    driver: Literal["posterior", "tpe", "cmaes"] = "posterior"
    tokens: int = REFINE_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        # The dataclass's own __init__ stands between here and the caller.
        driver = renamed_value("driver", self.driver, FORMER_DRIVERS, stacklevel=3)
        object.__setattr__(self, "driver", driver)
