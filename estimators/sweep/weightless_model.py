"""A transformers model without weights, which loads them from a checkpoint when needed.

Routed experts are copied matrix by matrix, from the unit that the walker finds on disk to the same
unit in the model. All other tensors are loaded as transformers does, by its renamings and
conversions. Tensors outside the decoder layers are read on first use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitknap.allocation.problem.units import ROLES
from bitknap.errors import FileError, ModelError
from bitknap.estimators.measuring.expert_forward import Experts, experts_at
from bitknap.estimators.measuring.freed_memory import give_back
from bitknap.estimators.measuring.language_model import compute_on
from bitknap.estimators.sweep.disk_tensors import moved
from bitknap.estimators.sweep.host_layers import HostLayers
from bitknap.estimators.sweep.peak_memory import read_bytes
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.models.matrix_views import ExpertLayer, Layout
from bitknap.quantization.packed.buildable import stored_as
from bitknap.quantization.source.architecture import align_experts, config_of, hollow
from bitknap.quantization.source.devices import CPU, HERE, Computing
from bitknap.quantization.source.source import Stored

# What to do about a model that cannot be calibrated layer by layer.
OTHERWISE = "raise `max_memory`, or use `estimator=DataFree()`"


class Skeleton:
    """A model whose parameters are on the meta device, except for the decoder layer in use.

    Args:
        source: the checkpoint, plain or packed.
        include: roles that are units in addition to the routed experts.
        otherwise: what to do about a model that cannot be run layer by layer, for messages.
        where: where layers are loaded and computed, and how.

    Attributes:
        source: the checkpoint.
        otherwise: see above.
        device: where layers are loaded and computed.
        dtype: of matrix products.
        model: the model, float32, in evaluation mode; it can run only layers that are `loaded`.
        layout: its units.
        on_disk: the same units in the checkpoint, in the same order.
        layers: its decoder layers.
        numbers: numbers of the MoE layers, by place in that list.

    Raises:
        ModelError: the units are not all in one list of decoder layers.
    """

    def __init__(
        self,
        source: Stored,
        include: Collection[str] = (),
        otherwise: str = OTHERWISE,
        where: Computing = HERE,
    ) -> None:
        self.source, self.otherwise = source, otherwise
        self.device, self.dtype = where.device, where.dtype
        self.model = _hollow(source, otherwise, where.device)
        compute_on(self.model, where)
        self.layout = walk(self.model, include)
        self.on_disk = walk_headers(source.config, source.shapes, include)
        self._list = _list_of_layers(self.model, self.layout, otherwise)
        self.layers: Any = self.model.get_submodule(self._list)
        self.numbers: dict[int, list[int]] = {}
        for layer in self.layout.layers:
            self.numbers.setdefault(self.place_of(layer.module), []).append(layer.layer)
        self._state: dict[str, Tensor] = self.model.state_dict()
        self._experts = _routed_tensors(self.layout)
        routed = _routed_tensors(self.on_disk)
        others = [name for name in source.shapes if name not in routed]
        self._sources = stored_as(self.model, self._state, others)
        self._before = -1  # the layer that was loaded last
        self._waiting: HostLayers | None = None  # on the CPU, the system's cache keeps files
        if where.device != CPU:
            keep = where.keeps(self._stored_bytes())
            self._waiting = HostLayers(where.device, self._read, keep=keep)
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(f"{self._list}."):
                module.register_forward_pre_hook(partial(self._fill_on_use, name))

    @contextlib.contextmanager
    def loaded(self, place: int) -> Iterator[None]:
        """Load the weights of one decoder layer while the block runs.

        Meanwhile the next one's travel to the device, if they wait in memory, or the system reads
        them: the next in the direction in which layers are loaded.

        Raises:
            FileError: a tensor is missing or damaged.
        """
        names = self._in_layer(place)
        try:
            self._place(place, names)
            following, self._before = 2 * place - self._before, place
            if self._waiting is None or not self._waiting.send(following):
                self.source.read_ahead(self._stored_in(following))
            yield
        finally:
            self._drop(names)
            give_back()

    def _place(self, place: int, names: Collection[str]) -> None:
        """Put the tensors of a decoder layer into the model."""
        if self._waiting is None:
            self._fill(names)
            return
        for name, tensor in self._waiting.take(place).items():
            _put(self.model, name, tensor.to(self._state[name].dtype))
        for name in names:
            if _at(self.model, name).is_meta:
                self._tie(name)

    def _read(self, place: int) -> dict[str, Tensor]:
        """Return the tensors of a decoder layer on the CPU, as they are stored."""
        tensors: dict[str, Tensor] = {}
        for name in self._in_layer(place):
            if name in self._experts:
                tensors[name] = self._stack(name)
            else:
                tensors |= self._converted(name)
        return tensors

    def _stack(self, name: str) -> Tensor:
        """Return a tensor of routed experts in the dtype of their matrices."""
        views, stored = self.layout.views, self.on_disk.views
        stack: Tensor | None = None
        for unit in self._experts[name]:
            matrix = self.source.read_matrix(stored[unit])
            if stack is None:
                stack = torch.zeros(self._state[name].shape, dtype=matrix.dtype)
            kind = torch.promote_types(stack.dtype, matrix.dtype)
            stack = stack.to(kind)
            views[unit].of(stack).copy_(matrix)
        assert stack is not None
        return stack

    def _stored_bytes(self) -> int:
        """Return how many bytes all decoder layers take as they are stored."""
        sizes = read_bytes(self.source)
        layers = range(len(self.layers))
        return sum(sizes.get(name, 0) for place in layers for name in self._stored_in(place))

    def _in_layer(self, place: int) -> list[str]:
        """Return the model's tensors in a decoder layer; none if there is no such layer."""
        return [name for name in self._state if name.startswith(f"{self._list}.{place}.")]

    def _stored_in(self, place: int) -> set[str]:
        """Return the checkpoint's tensors that a decoder layer is made of."""
        names = self._in_layer(place)
        experts = {
            self.on_disk.views[unit].tensor
            for name in names
            for unit in self._experts.get(name, ())
        }
        return experts | {stored for name in names for stored, *_ in self._sources.get(name, ())}

    def holds(self, place: int, tensor: str) -> bool:
        """Return whether a tensor of the model belongs to a decoder layer."""
        return tensor.startswith(f"{self._list}.{place}.")

    def place_of(self, tensor: str) -> int:
        """Return the decoder layer that a tensor of the model belongs to."""
        return int(tensor.removeprefix(f"{self._list}.").partition(".")[0])

    def drop_rest(self) -> None:
        """Drop the tensors that were read from outside the decoder layers."""
        self._drop([name for name in self._state if not name.startswith(f"{self._list}.")])

    def experts(self, layer: ExpertLayer) -> Experts:
        """Return the experts of a layer, with all that they hold except their matrices.

        What they hold, such as biases, stays until the layer is loaded again.

        Raises:
            FileError: a tensor is missing or damaged.
        """
        names = [name for name in self._state if name.startswith(f"{layer.module}.")]
        self._fill([name for name in names if name not in self._experts])
        return experts_at(self.model, layer)

    def weights(self, which: np.ndarray) -> Tensor:
        """Return the weights of equally shaped units, float32 [n, rows, cols], from the disk."""
        from bitknap.quantization.stacks.reading import read_stored

        return read_stored(self.on_disk, which, self.source)

    def _fill_on_use(self, name: str, module: nn.Module, args: Any) -> None:
        """Read a module's own tensors: embeddings and heads are as large as layers.

        On the CPU they lie in files.
        """
        own = [f"{name}.{leaf}".lstrip(".") for leaf in (*module._parameters, *module._buffers)]
        wanted = [x for x in own if x in self._state and _at(self.model, x).is_meta]
        self._fill(wanted, spilled=True)

    def _fill(self, names: Collection[str], *, spilled: bool = False) -> None:
        """Load the values of tensors of the model.

        Raises:
            FileError: one is missing or damaged.
        """
        self._fill_experts([name for name in names if name in self._experts])
        for first in (name for name in names if name not in self._experts):
            for name, value in self._converted(first).items():
                dtype = self._state[name].dtype
                spill = spilled and self.device == CPU
                placed = moved(value, dtype) if spill else value.to(self.device, dtype)
                _put(self.model, name, placed)
        for name in names:
            if _at(self.model, name).is_meta:
                self._tie(name)

    def _fill_experts(self, names: Collection[str]) -> None:
        tensors = {name: torch.zeros(self._state[name].shape, device=self.device) for name in names}
        for name, tensor in tensors.items():
            for unit in self._experts[name]:
                matrix = self.source.read_matrix(self.on_disk.views[unit])
                self.layout.views[unit].of(tensor).copy_(matrix)
            _put(self.model, name, tensor)

    def _converted(self, first: str) -> Mapping[str, Tensor]:
        """Return the tensors converted from the stored ones that belong to `first`, if any."""
        transform: Any = None
        for stored, pattern, kind in self._sources.get(first, ()):
            transform = transform or deepcopy(kind)
            value = self.source.read(stored)
            if pattern != stored:  # tensors that are only renamed are cast to the model's dtype
                value = value.to(self._state[first].dtype)
            transform.add_tensor(first, stored, pattern, value)
        if transform is None:
            return {}
        made = transform.convert(first, model=self.model, config=self.model.config)
        return {n: v[0] if isinstance(v, list) else v for n, v in made.items() if n in self._state}

    def _tie(self, name: str) -> None:
        """Replace a tensor that is not stored by the one to which it is tied."""
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        others = [tied[name]] if name in tied else [a for a, b in tied.items() if b == name]
        for other in others:
            if _at(self.model, other).is_meta and other in self._sources:
                self._fill([other], spilled=True)
            if not _at(self.model, other).is_meta:
                _put(self.model, name, _at(self.model, other))
                return
        raise FileError(f"{self.source.folder}: tensor {name} of the model is missing")

    def _drop(self, names: Collection[str]) -> None:
        for name in names:
            _put(self.model, name, self._state[name])


def _hollow(source: Stored, otherwise: str, device: torch.device) -> Any:
    """Return the model of a checkpoint in evaluation mode, its parameters on the meta device.

    What is computed and not stored is on the device that the model will run on.
    """
    config = config_of(source.folder)
    if config.is_encoder_decoder:
        raise ModelError(
            f"{source.folder}: an encoder-decoder cannot be run layer by layer; {otherwise}"
        )
    model = hollow(source.folder, config)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    # These are computed, not stored, such as the frequencies of rotary embeddings.
    for name, buffer in list(model.named_non_persistent_buffers()):
        _put(model, name, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()
    for name, buffer in list(model.named_non_persistent_buffers()):
        _put(model, name, buffer.to(device))
    align_experts(model)
    return model.eval().requires_grad_(False)


def _list_of_layers(model: nn.Module, layout: Layout, otherwise: str) -> str:
    """Return the name of the one list of decoder layers that holds all units."""
    names = [x.module for x in layout.layers] or [view.tensor for view in layout.views]
    lists = set()
    for name in names:
        parts = name.split(".")
        cuts = [".".join(parts[:i]) for i, part in enumerate(parts) if part.isdigit()]
        lists.add(next((x for x in cuts if isinstance(model.get_submodule(x), nn.ModuleList)), ""))
    if len(lists) != 1 or "" in lists:
        raise ModelError(
            f"{type(model).__name__}: its units do not lie in one list of decoder layers, so it "
            f"cannot be run layer by layer; {otherwise}"
        )
    return lists.pop()


def _routed_tensors(layout: Layout) -> dict[str, list[int]]:
    """Return the routed units of each tensor that contains any."""
    units: dict[str, list[int]] = {}
    for unit in np.flatnonzero(layout.units.role == ROLES.index("routed")).tolist():
        units.setdefault(layout.views[unit].tensor, []).append(unit)
    return units


def _at(model: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(parent), leaf)
    return tensor


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        shared = isinstance(value, nn.Parameter)
        module._parameters[leaf] = (
            value if shared else nn.Parameter(value, requires_grad=False)  # type: ignore[assignment]
        )
    else:
        module._buffers[leaf] = value
