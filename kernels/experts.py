"""One layer's routed experts, in the form that launches read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bitknap.errors import InputError
from bitknap.kernels.experts_table import ExpertsTable
from bitknap.kernels.layout.kinds import Kind
from bitknap.kernels.layout.scale_words import Recipe
from bitknap.names import check_name

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"]
"""The activation on gate (or on up, without a gate). `swiglu_oai` is from gpt-oss: gate is capped
at 7, up is clamped to ±7, and the result is (up + 1) · gate · sigmoid(1.702 gate)."""

_DTYPES = {str(d): d for d in (torch.bfloat16, torch.float16, torch.float32)}
_COLUMNS = (
    "buffer",
    "bits",
    "group",
    "word",
    "share",
    "symmetric",
    "codes_at",
    "words_at",
    "rows_at",
    "kind",
    "order",
)
_TABLES = ("gate", "up", "down")
_BIASES = ("gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts [E] of one layer: hidden size H, intermediate size I.

    Attributes:
        gate: gate projections [I, H]; None if experts have none, in which case up is activated.
        up: up projections [I, H].
        down: down projections [H, I].
        activation: activation on gate, or on up without a gate.
        gate_bias: added to gate's outputs, [E, I].
        up_bias: added to up's outputs, [E, I].
        down_bias: added to down's outputs before weighting, [E, H].
        tensors: all tensors above, in the order that `how` describes; derived.
        how: everything else as a string, for operators that take only tensors and strings; derived.

    Raises:
        InputError: the parts do not match each other.
    """

    gate: ExpertsTable | None = None
    up: ExpertsTable
    down: ExpertsTable
    activation: Activation
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    tensors: tuple[Tensor, ...] = field(init=False, repr=False)
    how: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        tables = {name: t for name in _TABLES if (t := getattr(self, name)) is not None}
        biases = {name: b for name in _BIASES if (b := getattr(self, name)) is not None}
        columns = [getattr(table, name) for table in tables.values() for name in _COLUMNS]
        description = {
            "activation": self.activation,
            "tables": {
                name: [t.rows, t.cols, str(t.kept), t.blocks, *(k.code for k in t.kinds)]
                for name, t in tables.items()
            },
            "biases": list(biases),
            "tied": self.gate is not None and self.gate.kind_list() == self.up.kind_list(),
        }
        object.__setattr__(self, "tensors", (*columns, *(b.contiguous() for b in biases.values())))
        object.__setattr__(self, "how", json.dumps(description))

    def __len__(self) -> int:
        return len(self.up)

    @property
    def hidden(self) -> int:
        """H, the hidden size."""
        return self.up.cols

    @property
    def intermediate(self) -> int:
        """I, the intermediate size."""
        return self.up.rows

    def _check(self) -> None:
        check_name("activation", self.activation, get_args(Activation))
        if self.gate is None and self.activation == "swiglu_oai":
            raise InputError("activation swiglu_oai: needs a gate, and there is none; pass one")
        shape = (len(self.up), self.up.rows, self.up.cols)
        wanted = {"gate": shape, "down": (shape[0], shape[2], shape[1])}
        for name, expected in wanted.items():
            table = getattr(self, name)
            if table is not None and (len(table), table.rows, table.cols) != expected:
                actual = (len(table), table.rows, table.cols)
                raise InputError(
                    f"{name} projections {actual}: with up's {shape} they must be {expected}"
                )
        if self.gate is not None and self.gate.blocks != self.up.blocks:
            raise InputError(
                f"gate in {self.gate.blocks} blocks of rows, up in {self.up.blocks}: cut them alike"
            )
        sizes = {"gate_bias": shape[:2], "up_bias": shape[:2], "down_bias": wanted["down"][:2]}
        for name, size in sizes.items():
            bias = getattr(self, name)
            if bias is not None and tuple(bias.shape) != size:
                raise InputError(f"{name} {tuple(bias.shape)}: must be {size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One projection's tensors and compile-time constants.

    Attributes:
        rows: outputs.
        cols: inputs.
        kinds: the kinds that occur, most bits first.
        kept: dtype of experts in source precision, if there are any.
        blocks: number of row blocks of each expert.
        columns: the tensors of an `ExpertsTable` by name.
    """

    rows: int
    cols: int
    kinds: tuple[Kind, ...]
    kept: torch.dtype | None
    blocks: int
    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.columns["order"])

    @property
    def long(self) -> int:
        """Number of rows in a block."""
        return self.rows // self.blocks

    def table(self) -> ExpertsTable:
        """Return the original table; copies the columns back to the host."""
        names = ("bits", "group", "word", "share", "symmetric", "kind")
        rows = zip(*(self.columns[name].tolist() for name in names), strict=True)
        recipes = tuple(
            Recipe(
                bits=bits,
                group=group,
                share=share,
                symmetric=bool(symmetric),
                kept=0 if word else self.long * self.cols * bits // 8,
                scaled=bool(Kind.of(kind).scaled),
            )
            for bits, group, word, share, symmetric, kind in rows
        )
        return ExpertsTable(
            rows=self.rows,
            cols=self.cols,
            recipes=recipes,
            kept=self.kept,
            blocks=self.blocks,
            **self.columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """`Experts` as an operator rebuilds them from `tensors` and `how`.

    `tied` says whether gate and up of every expert are stored alike.
    """

    gate: Stack | None
    up: Stack
    down: Stack
    activation: Activation
    tied: bool
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    def experts(self) -> Experts:
        """Return the original experts; copies small tensors back to the host."""
        return Experts(
            gate=self.gate.table() if self.gate else None,
            up=self.up.table(),
            down=self.down.table(),
            activation=self.activation,
            gate_bias=self.gate_bias,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
        )


def opened(tensors: list[Tensor], how: str) -> Opened:
    """Rebuild experts from `Experts.tensors` and `Experts.how` without reading any tensor."""
    known = _parsed(how)
    stacks, at = {}, 0
    for name, about in known["tables"].items():
        columns = dict(zip(_COLUMNS, tensors[at : at + len(_COLUMNS)], strict=True))
        stacks[name] = Stack(columns=columns, **about)
        at += len(_COLUMNS)
    biases = dict(zip(known["biases"], tensors[at:], strict=True))
    return Opened(
        gate=stacks.get("gate"),
        up=stacks["up"],
        down=stacks["down"],
        activation=known["activation"],
        tied=known["tied"],
        gate_bias=biases.get("gate_bias"),
        up_bias=biases.get("up_bias"),
        down_bias=biases.get("down_bias"),
    )


@cache
def _parsed(how: str) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(how)
    known["tables"] = {
        name: {
            "rows": rows,
            "cols": cols,
            "kept": _DTYPES.get(kept),
            "blocks": blocks,
            "kinds": tuple(Kind.of(code) for code in codes),
        }
        for name, (rows, cols, kept, blocks, *codes) in known["tables"].items()
    }
    return known
