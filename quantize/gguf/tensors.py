"""Every tensor of a file: its name, shape and type, and how its bytes come about.

Routed experts of a layer's projection become one tensor, expert after expert. Matrices that a plan
leaves out keep their stored precision; norms, routers and biases are float32, as llama.cpp wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.codecs.ggml import stored_as
from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import ROLES, Unit
from bitknap.errors import ModelError
from bitknap.quantization.ggml import library
from bitknap.quantization.ggml.container import Entry
from bitknap.quantization.gguf import names
from bitknap.quantization.gguf.architectures import Architecture, Unwritable
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.writer import Rounded
from bitknap.quantization.rounding.ggml import Blocks
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.grouping import PIECE, stacks
from bitknap.quantization.stacks.reading import all_finite, read_stored

_KEPT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_OF_FORMAT = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "mxfp4": "mxfp4"}
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Part(NamedTuple):
    """Bytes of a tensor that are made together.

    Attributes:
        start: the first of them.
        nbytes: how many they are.
        read: returns what they are made of.
        make: returns the bytes of what `read` gave, uint8.
    """

    start: int
    nbytes: int
    read: Callable[[], Tensor]
    make: Callable[[Tensor], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor of a file.

    Attributes:
        entry: its name, shape and type.
        parts: how its bytes come about, in order.
        tensors: names of the checkpoint's tensors that it is made of.
        units: the planned units in it, by number in the plan.
    """

    entry: Entry
    parts: tuple[Part, ...]
    tensors: tuple[str, ...] = ()
    units: tuple[int, ...] = ()


def type_of(format: Format, cols: int) -> str:
    """Return the type that a matrix of a format has in a file."""
    return stored_as(format.source, cols) if format.kind == "ggml" else _OF_FORMAT[format.source]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint on its way into a file.

    Attributes:
        source: the checkpoint.
        config: its transformers configuration, of the language model.
        architecture: what llama.cpp calls it.
        plan: the format of its units.
        rounded: how they are rounded, and by what statistics of their inputs.
    """

    source: Checkpoint
    config: Any
    architecture: Architecture
    plan: BitPlan
    rounded: Rounded

    def stored(self) -> list[Stored]:
        """Return all tensors, in the order in which they are written: block after block.

        Raises:
            Unwritable: the checkpoint has a tensor that llama.cpp has no name for.
        """
        every = walk_headers(
            self.source.config, self.source.shapes, ("shared", "attention", "dense")
        )
        found = [*self._matrices(every), *self._others(every), *self._factors()]
        return sorted(found, key=lambda one: _place(one.entry.name))

    @property
    def absorbed(self) -> bool:
        """Whether MLA's up-projection is stored as two tensors, as llama.cpp prefers it.

        If it is planned, it stays one: only so can its rows keep their rounding.
        """
        units = self.plan.units
        known = dict(zip(units.projections, range(len(units.projections)), strict=True))
        attention = units.role == ROLES.index("attention")
        planned = attention & (units.projection == known.get("kv_b", -1))
        return self.architecture.latent and not planned.any()

    def _matrices(self, every: Layout) -> Iterator[Stored]:
        planned = {self.plan.units.label(i): i for i in range(len(self.plan.units))}
        for run in stacks(every.units):
            unit = every.units.row(int(run[0]))
            name = names.of_unit(unit)
            if name is None:
                raise self._nameless(every.views[run[0]].tensor)
            if unit.projection == "kv_b" and self.absorbed:
                yield from self._split_latent(unit, every.views[run[0]].tensor)
                continue
            numbers = [planned.get(every.units.label(int(one)), -1) for one in run]
            shape = (len(run), unit.rows, unit.cols)
            entry = Entry(
                f"{name}.weight",
                shape if unit.role == "routed" else shape[1:],
                self._type(numbers[0], every.views[run[0]].tensor, unit.cols),
            )
            made = _Matrices(self, every, run, numbers, entry, self._order(unit))
            yield Stored(
                entry=entry,
                parts=tuple(made.parts()),
                tensors=tuple({every.views[one].tensor for one in run}),
                units=tuple(number for number in numbers if number >= 0),
            )

    def _type(self, number: int, tensor: str, cols: int) -> str:
        if number >= 0:
            return type_of(self.plan.format_of(number), cols)
        return _KEPT[self._dtype(tensor)]

    def _dtype(self, tensor: str) -> torch.dtype:
        """Return the dtype that a tensor is kept in."""
        stored = self.source.precision(tensor) if tensor not in self.source.low_bit else "bf16"
        return _DTYPES.get(_OF_FORMAT.get(stored, ""), torch.bfloat16)

    def _order(self, unit: Unit) -> np.ndarray | None:
        """Return the order of a matrix's rows in the file, None for the checkpoint's own."""
        if not self.architecture.permuted or unit.role != "attention":
            return None
        heads = {"q": self.config.num_attention_heads, "k": self.config.num_key_value_heads}
        count = heads.get(unit.projection)
        return None if count is None else rotary_pairs(unit.rows, int(count))

    def _split_latent(self, unit: Unit, tensor: str) -> Iterator[Stored]:
        """Yield MLA's up-projection as two tensors by head: of keys, transposed, and of values."""
        nope, value = int(self.config.qk_nope_head_dim), int(self.config.v_head_dim)
        heads = unit.rows // (nope + value)

        def by_head() -> Tensor:
            return self.source.read(tensor).view(heads, nope + value, unit.cols)

        dtype = self._dtype(tensor)
        base = f"blk.{unit.layer}."
        yield _kept(
            f"{base}attn_k_b.weight",
            (heads, unit.cols, nope),
            dtype,
            lambda: by_head()[:, :nope].mT,
            tensor,
        )
        yield _kept(
            f"{base}attn_v_b.weight",
            (heads, value, unit.cols),
            dtype,
            lambda: by_head()[:, nope:],
            tensor,
        )

    def _others(self, every: Layout) -> Iterator[Stored]:
        """Yield the tensors that hold no matrix of `every`."""
        held = {view.tensor for view in every.views}
        for tensor, (_, shape) in self.source.shapes.items():
            if tensor in held or tensor.endswith("rotary_emb.inv_freq"):
                continue
            if tensor.endswith("gate_up_proj_bias"):
                yield from self._split_bias(tensor, shape)
                continue
            name = names.of_kept(tensor, self.architecture.ffn_norm)
            if name is None:
                if _beyond(tensor, int(self.config.num_hidden_layers)):
                    continue
                raise self._nameless(tensor)
            if name == "output.weight" and self.config.tie_word_embeddings:
                continue
            yield self._other(name, tensor, shape)
            tied = self.config.tie_word_embeddings and not self.architecture.shares_head
            if name == "token_embd.weight" and tied:
                yield self._other("output.weight", tensor, shape)

    def _other(self, name: str, tensor: str, shape: tuple[int, ...]) -> Stored:
        squeezed = tuple(size for size in shape if size > 1) or (1,)
        wide = len(squeezed) == 1 or "ffn_gate_inp" in name or name.endswith(".bias")
        dtype = torch.float32 if wide else self._dtype(tensor)
        order = self._bias_order(name, shape[0])

        def read() -> Tensor:
            values = self.source.read(tensor).reshape(squeezed)
            return values if order is None else values[torch.from_numpy(order)]

        return _kept(name, squeezed, dtype, read, tensor)

    def _bias_order(self, name: str, rows: int) -> np.ndarray | None:
        heads = {"q": self.config.num_attention_heads, "k": self.config.num_key_value_heads}
        leaf = name.rpartition(".attn_")[2].removesuffix(".bias")
        if not self.architecture.permuted or leaf not in heads:
            return None
        return rotary_pairs(rows, int(heads[leaf]))

    def _split_bias(self, tensor: str, shape: tuple[int, ...]) -> Iterator[Stored]:
        """Yield the biases of gate and up, which alternate."""
        layer = tensor.partition("layers.")[2].partition(".")[0]
        for start, leaf in enumerate(("gate", "up")):
            yield _kept(
                f"blk.{layer}.ffn_{leaf}_exps.bias",
                (shape[0], shape[1] // 2),
                torch.float32,
                lambda start=start: self.source.read(tensor)[:, start::2],  # type: ignore[misc]
                tensor,
            )

    def _factors(self) -> Iterator[Stored]:
        """Yield the factors by which Llama 3 slows its rotary embedding down."""
        rope = dict(self.config.rope_parameters or {})
        if rope.get("rope_type") != "llama3":
            return
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        steps = torch.arange(0, 2 * len(slowed), 2).float() / (2 * len(slowed))
        factors = rope["rope_theta"] ** -steps / slowed
        yield _kept("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors)

    def _nameless(self, tensor: str) -> Unwritable:
        return Unwritable(
            f"{tensor}: llama.cpp has no such tensor in {self.architecture.name}; name an output "
            "without .gguf: a folder with the types that llama-quantize reads"
        )


@dataclass(frozen=True, slots=True)
class _Matrices:
    """The bytes of matrices that are one tensor of a file.

    Attributes:
        model: the checkpoint.
        layout: all its matrices.
        run: these, int64 [n].
        numbers: their numbers in the plan; -1 where it has none.
        entry: the tensor.
        order: the order of their rows in the file.
    """

    model: Model
    layout: Layout
    run: np.ndarray
    numbers: Sequence[int]
    entry: Entry
    order: np.ndarray | None

    def parts(self) -> Iterator[Part]:
        """Yield the parts, some experts at a time."""
        units = self.layout.units
        size = 4 * int(units.rows[self.run[0]]) * int(units.cols[self.run[0]])
        step = max(1, PIECE // max(1, size))
        each = self.entry.nbytes // len(self.run)
        for first in range(0, len(self.run), step):
            which = self.run[first : first + step]
            yield Part(
                start=first * each,
                nbytes=len(which) * each,
                read=partial(read_stored, self.layout, which, self.model.source),
                make=partial(self._bytes, np.array(self.numbers[first : first + step])),
            )

    def _bytes(self, numbers: np.ndarray, weights: Tensor) -> np.ndarray:
        count, rows, _ = weights.shape
        type = self.entry.type
        if type in _DTYPES:
            lines = raw(weights, _DTYPES[type]).reshape(count, rows, -1)
        elif self.model.plan.format_of(int(numbers[0])).kind == "keep":
            lines = library.quantize(weights.flatten(0, 1).numpy(), type)
        else:
            how = self.model.rounded
            known = None if how.inputs is None else how.inputs(numbers)
            format = self.model.plan.format_of(int(numbers[0]))
            made = how.rounding.quantize(weights, format, known)
            assert isinstance(made, Blocks), made.format
            lines = made.blocks.numpy()
        lines = lines.reshape(count, rows, -1)
        return lines if self.order is None else lines[:, self.order]


def rotary_pairs(rows: int, heads: int) -> np.ndarray:
    """Return the order in which llama.cpp's `llama` has the rows of q and k, int64 [rows].

    A checkpoint has the two halves of each head one above the other; there they alternate.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def raw(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return the bytes of values in a dtype, uint8."""
    data: np.ndarray = values.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


def _kept(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    read: Callable[[], Tensor],
    tensor: str = "",
) -> Stored:
    """Return a tensor that keeps its precision.

    Args:
        name: its name in the file.
        shape: its shape there.
        dtype: its dtype there.
        read: returns its values.
        tensor: the checkpoint's tensor that they are of; "" if they are computed.
    """

    def make(values: Tensor) -> np.ndarray:
        if not all_finite(values.float() if values.dtype.itemsize < 2 else values):
            raise ModelError(
                f"{name}: NaN or infinite weight; repair the checkpoint before exporting it"
            )
        return raw(values, dtype)

    entry = Entry(name, shape, _KEPT[dtype])
    part = Part(0, entry.nbytes, read, make)
    return Stored(entry=entry, parts=(part,), tensors=(tensor,) * bool(tensor))


def _beyond(tensor: str, layers: int) -> bool:
    """Return whether a tensor belongs to a layer that transformers does not load either."""
    number = tensor.partition("layers.")[2].partition(".")[0]
    return number.isdecimal() and int(number) >= layers


def _place(name: str) -> tuple[int, int, str]:
    """Return where a tensor stands: what is outside the blocks first, then block after block."""
    block = name.split(".")[1] if name.startswith("blk.") else ""
    return (1, int(block), name) if block else (0, 0, name)
