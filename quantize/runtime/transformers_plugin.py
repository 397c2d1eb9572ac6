"""Packed checkpoints as a quantization method of transformers.

Once `bitknap` is imported (`transformers_hook`), `from_pretrained` of a packed checkpoint comes
here: `config.json` says "bitknap", the quantizer points transformers at the files, replaces the
parameters that consist of units by packed weights (`layers`), and reads their streams itself after
transformers has loaded the rest. `save_pretrained` of such a model writes a packed checkpoint.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitknap.errors import ModelError
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.config import VERSION, WEIGHTS, to_plain
from bitknap.quantization.packed.convert_layout import unit_bytes
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.packed.opened import PackedFolder, check_decoded, open_packed
from bitknap.quantization.packed.outline import streams
from bitknap.quantization.runtime.dequantized_cache import Cache
from bitknap.quantization.runtime.layers import (
    Packed,
    pack,
    packed_modules,
    packed_weights,
    unpack,
)
from bitknap.quantization.runtime.packed_weight import PackedWeight, Piece
from bitknap.quantization.runtime.pushing import push_to_hub, save_and_push
from bitknap.quantization.runtime.saving import Companions
from bitknap.quantization.source.source_config import METHOD
from bitknap.quantization.stacks.alignment import aligned
from bitknap.quantization.stacks.row_blocks import layout_for

# Prefix of a stream's buffer in a live model, in the module that has all its units.
_BUFFER = "bitknap_"
# What a packed model does in its own way.
_METHODS: Mapping[str, Callable[..., Any]] = {
    "save_pretrained": save_and_push,
    "push_to_hub": push_to_hub,
}


class BitknapConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed checkpoint, as `packed_config` writes it."""

    def __init__(self, version: str = VERSION, weights: str = WEIGHTS, **others: Any) -> None:
        self.__dict__.update(others)
        self.quant_method = METHOD
        self.version = version
        self.weights = weights


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a stream is in a live model."""

    module: nn.Module
    path: str
    buffer: str


class BitknapQuantizer(HfQuantizer):  # type: ignore[misc]
    """Keeps the weights of a packed checkpoint packed.

    Attributes:
        cache: dequantized matrices; its `limit` may be changed at any time.
    """

    requires_calibration = True  # only checkpoints that are packed already

    def __init__(self, quantization_config: BitknapConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.cache = Cache()
        self._folder: PackedFolder | None = None
        self._places: dict[str, _Place] = {}
        self._companions = Companions()
        self._dtypes: dict[str, torch.dtype] = {}
        self._packed: list[Packed] = []

    def update_attn_implementation(self, config: Any) -> Any:
        """Point transformers at the weights; no other hook that it calls gets the config."""
        config.transformers_weights = self.quantization_config.weights
        return config

    # transformers 5.17 lacks the method above and calls this one with the config.
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files:
            raise ModelError("a packed checkpoint is loaded from its folder, not a state_dict")
        folder = Path(checkpoint_files[0]).parent
        self._companions = Companions.beside(folder, model.config)
        self._folder = open_packed(folder)
        check_decoded(self._folder)
        layout = layout_for(
            self._folder.plan.units, walk(model, include=roles_of(self._folder.plan.units))
        )
        self._replace(model, layout)
        self._dtypes = {n: _dtype(model, n, p) for n, p in model.named_parameters()}
        vars(model.config).pop("transformers_weights", None)
        patterns = (
            ("_keys_to_ignore_on_load_missing", rf"(^|\.){_BUFFER}\w+$"),
            ("_keys_to_ignore_on_load_unexpected", rf"{METHOD}\.\d+\."),
        )
        for attribute, pattern in patterns:
            setattr(model, attribute, {*(getattr(model, attribute) or ()), pattern})
        return model

    def _replace(self, model: Any, layout: Layout) -> None:
        """Give every stream a buffer, and replace parameters that hold units by packed weights."""
        assert self._folder is not None
        plan, kind = aligned(self._folder.plan, layout), self._folder.kind
        nbytes = unit_bytes(plan, kind)
        rows, cols = plan.units.rows.tolist(), plan.units.cols.tolist()
        pieces: defaultdict[str, list[tuple[nn.Module, Piece]]] = defaultdict(list)
        for name, run in streams(plan.units).items():
            sizes = nbytes[run].tolist()
            place = _place(model, name, {layout.views[i].tensor for i in run.tolist()})
            place.module.register_buffer(place.buffer, torch.empty(sum(sizes), dtype=torch.uint8))
            self._places[name], at = place, 0
            for unit, size in zip(run.tolist(), sizes, strict=True):
                view, format = layout.views[unit], plan.format_of(unit)
                place_of = (at, at + size, format, rows[unit], cols[unit], view)
                pieces[view.tensor].append((place.module, Piece(place.buffer, *place_of)))
                at += size
        weights: defaultdict[str, dict[str, PackedWeight]] = defaultdict(dict)
        for tensor, parts in pieces.items():
            path, _, leaf = tensor.rpartition(".")
            like = model.get_parameter(tensor)
            _check_covered(tensor, like, [piece for _, piece in parts])
            weights[path][leaf] = PackedWeight(
                {piece.buffer: holder for holder, piece in parts},
                like,
                _dtype(model, tensor, like),
                [piece for _, piece in parts],
                kind,
                self.cache,
            )
        for path, packed in weights.items():
            pack(model.get_submodule(path), packed)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._folder is not None
        for name, place in self._places.items():
            empty = place.module.get_buffer(place.buffer)
            if empty.device.type == "meta":
                raise ModelError(
                    f"{place.path}: packed weights cannot be offloaded to disk; leave "
                    "offload_buffers out"
                )
            stream = self._folder.checkpoint.read(name)
            place.module._buffers[place.buffer] = stream.to(empty.device)
        for weight in packed_weights(model):
            weight.filled = True
        self._packed = list(packed_modules(model))
        for module in self._packed:
            module.prepare()
        # transformers 5.17 leaves parameters it renames in the dtype they are stored in.
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self._dtypes.get(name, parameter.dtype))
        self._folder = None
        for name, method in _METHODS.items():
            setattr(model, name, MethodType(method, model))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the model's tensors under their names in a packed checkpoint."""
        state = model.state_dict()
        laid = {
            (id(holder), buffer): weight
            for weight in packed_weights(model)
            if weight.layout != weight.stored
            for buffer, holder in weight.holders.items()
        }
        for name, place in self._places.items():
            stream = state.pop(f"{place.path}.{place.buffer}".removeprefix("."))
            weight = laid.get((id(place.module), place.buffer))
            state[name] = stream if weight is None else weight.as_stored(place.buffer)
        return state, {}

    @property
    def companions(self) -> Companions:
        """The files beside the tensors, such as the plan."""
        return self._companions

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        for module in list(model.modules()):
            unpack(module)
        for place in self._places.values():
            del place.module._buffers[place.buffer]
        for name in _METHODS:
            vars(model).pop(name, None)
        to_plain(model.config)
        # A configuration that has been saved holds its dtype as a name.
        named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if named is None else model.to(named)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: `save_pretrained` writes a packed checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether kernels run all packed modules; dequantizing at run time breaks graphs."""
        return all(getattr(module, "kernels", None) is not None for module in self._packed)


def register() -> None:
    """Register the method with transformers, unless it is registered already."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(BitknapConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(BitknapQuantizer)


def _place(model: nn.Module, stream: str, tensors: set[str]) -> _Place:
    """Return where a stream goes: into the innermost module that has all its tensors."""
    modules = (name.rpartition(".")[0].replace(".", "/") for name in tensors)
    path = posixpath.commonpath(modules).replace("/", ".")
    _, _, role, projection = stream.split(".", 3)
    buffer = f"{_BUFFER}{role}_{projection.replace('.', '_')}"
    return _Place(module=model.get_submodule(path), path=path, buffer=buffer)


def _check_covered(name: str, like: Tensor, pieces: Sequence[Piece]) -> None:
    covered = sum(piece.rows * piece.cols for piece in pieces)
    if covered != like.numel():
        raise ModelError(
            f"{name}: only {covered} of its weights belong to units, so it cannot stay packed; "
            "load with bitknap.load(folder), which dequantizes"
        )


def _dtype(model: Any, name: str, like: Tensor) -> torch.dtype:
    """Return the dtype a parameter is loaded in: some models keep some of them in float32."""
    from transformers.core_model_loading import build_glob_alternation

    special = model._get_dtype_plan(like.dtype)
    if special and build_glob_alternation(list(special))[0].search(name):
        return torch.float32
    return like.dtype
