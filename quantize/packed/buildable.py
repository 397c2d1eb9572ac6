"""Check, before any work is done, whether transformers can build what a checkpoint holds.

The model is built without weights from config.json, transformers' own renamings and conversions
are applied to empty tensors of the shapes on disk, and the result is compared with the parameters
that the model has. So every command refuses a checkpoint that could not be loaded, and says which
part of which file is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitknap.allocation.problem.units import ROLES
from bitknap.errors import ModelError
from bitknap.quantization.models.headers_only import count_of, text_config, walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.config import to_plain
from bitknap.quantization.packed.folder import is_packed, roles_of
from bitknap.quantization.packed.opened import open_packed
from bitknap.quantization.packed.outline import PREFIX
from bitknap.quantization.source.architecture import config_of, hollow
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.safetensors_header import DTYPES
from bitknap.quantization.source.source_config import METHOD
from bitknap.quantization.source.transformers_calls import calling_transformers

# Name to (safetensors dtype, shape), as `Checkpoint.shapes` gives it.
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
# Configuration keys for the number of layers and experts, and for the width of a head.
_COUNT = re.compile(
    r"(moe_)?(num|n)_(\w+_)?(layers|experts)|(encoder|decoder)_layers|depth|(\w+_)?head_dim"
)


def check(folder: Path, *, reads_text: bool = False) -> None:
    """Refuse a checkpoint, packed or plain, that could not be loaded; reads headers alone.

    Args:
        folder: the checkpoint.
        reads_text: whether the model has to predict text.

    Raises:
        FileError: a file is missing, truncated, corrupt or of an unknown version.
        ModelError: transformers does not know the architecture, or the tensors are not those of
            the model that config.json describes.
    """
    if not is_packed(folder):
        check_loadable(Checkpoint.open(folder), reads_text=reads_text)
        return
    packed = open_packed(folder)
    model = hollow(folder, to_plain(config_of(folder)))
    roles = roles_of(packed.plan.units)
    check_tensors(folder, model, packed.shapes, packed.whole, roles)
    if reads_text:
        check_head(folder, model)


def check_source(
    source: Checkpoint,
    include: Collection[str] = (),
    *,
    known: bool = True,
    reads_text: bool = False,
) -> Layout:
    """Return a checkpoint's units, walked on its headers, after checking that they can be loaded.

    Args:
        source: the checkpoint.
        include: roles beside the routed experts.
        known: refuse architectures that transformers cannot build; otherwise only their headers are
            checked.
        reads_text: whether the model has to predict text.

    Raises:
        InputError: a role that cannot be included.
        ModelError: it is packed already, has no units, or transformers could not load it.
    """
    check_unpacked(source)
    _check_counts(source)
    try:
        model = hollow(source.folder, config_of(source.folder))
    except ModelError:
        if known or reads_text:
            raise
        return walk_headers(source.config, source.shapes, include)
    layout = walk_headers(source.config, source.shapes, include)
    check_tensors(source.folder, model, source.shapes, layout, include)
    if reads_text:
        check_head(source.folder, model)
    return layout


def check_loadable(source: Checkpoint, *, reads_text: bool = False) -> None:
    """Refuse a plain checkpoint that transformers could not load, with or without experts.

    Raises:
        ModelError: says which part of which file is wrong.
    """
    _check_counts(source)
    model = hollow(source.folder, config_of(source.folder))
    check_tensors(source.folder, model, source.shapes)
    if reads_text:
        check_head(source.folder, model)


def check_unpacked(source: Checkpoint) -> None:
    """Raise ModelError for a checkpoint that Bitknap has packed already."""
    about = source.config.get("quantization_config")
    method = about.get("quant_method") if isinstance(about, Mapping) else None
    if method == METHOD or any(name.startswith(PREFIX) for name in source.headers):
        raise ModelError(
            f"{source.folder}: already a packed checkpoint of Bitknap; "
            "pass the model that it was made from"
        )


def check_tensors(
    folder: Path,
    model: Any,
    shapes: Shapes,
    layout: Layout | None = None,
    include: Collection[str] = (),
) -> None:
    """Compare the tensors of a checkpoint with a model that was built without weights.

    Args:
        folder: named in messages.
        model: as `hollow` gives it.
        shapes: the tensors on disk.
        layout: the units in them; experts are not compared if it is not given.
        include: roles of these units beside the routed experts.

    Raises:
        ModelError: experts differ in number or size, or a tensor is missing or of another shape.
    """
    if layout is not None:
        try:
            built = walk(model, include)
        except ModelError as error:
            if "no routed experts" not in str(error):
                raise
            raise ModelError(
                f"{folder}: config.json describes a model without the {len(layout.units)} matrices "
                "to plan that the weights hold; correct config.json"
            ) from None
        _check_units(folder, layout, built)
    state: dict[str, Tensor] = model.state_dict()
    made = _converted(folder, model, state, shapes)
    for name, tensor in made.items():
        if tensor.shape != state[name].shape:
            raise ModelError(
                f"{folder}: {name}: shape {list(tensor.shape)} in the weights, but "
                f"{list(state[name].shape)} according to config.json; one of the two belongs to "
                "another model"
            )
    if missing := sorted(_missing(model, state, made)):
        raise ModelError(
            f"{folder}: {len(missing)} tensors are missing that config.json asks for, such as "
            f"{missing[0]}; download the weights again, or correct config.json"
        )


def check_head(folder: Path, model: Any) -> None:
    """Raise ModelError for a model that does not predict tokens."""
    if not any(getattr(m, "get_output_embeddings", lambda: None)() for m in model.modules()):
        raise ModelError(
            f"{folder}: {type(model).__name__} has no language-model head, so no text can be "
            "predicted with it; use `estimator=DataFree()`, or the model with its head"
        )


def stored_as(
    model: Any, state: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, list[tuple[str, str, Any]]]:
    """Return the stored tensors of each parameter, by transformers' renamings.

    Args:
        model: the model, with or without weights.
        state: its parameters and buffers.
        names: the tensors on disk.

    Returns:
        By the (first) parameter that they make: stored name, pattern, transformers' conversion.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.core_model_loading import dot_natural_key as in_order

    mapping = get_model_conversion_mapping(model)
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    by_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
    by_target: dict[str, list[tuple[str, str, Any]]] = {}
    for stored in sorted(names, key=in_order):
        target, pattern = rename_source_key(
            stored, renamings, converters, model.base_model_prefix, state
        )
        if target not in state and stored in state:
            target, pattern = stored, None
        if target not in state:
            continue
        if pattern is None:
            by_target.setdefault(target, []).append(
                (stored, stored, WeightRenaming(stored, target))
            )
        else:
            by_target.setdefault(target, []).append((stored, pattern, by_pattern[pattern]))
    return by_target


def _check_counts(source: Checkpoint) -> None:
    """Refuse more layers or experts, or wider heads, than weights hold: building takes long.

    A layer takes a tensor; an expert takes one, or a slice of one; a head takes rows of one.
    """
    tensors = len(source.headers)
    layers = count_of(text_config(source.config), "num_hidden_layers")
    if layers is not None and not 0 < layers <= tensors:
        raise ModelError(
            f"{source.folder}: config.json: num_hidden_layers: {layers}, but the weights have only "
            f"{tensors} tensors; correct config.json"
        )
    longest = max((size for _, shape in source.shapes.values() for size in shape), default=0)
    for name, count in _counts(source.config):
        if count > max(tensors, longest):
            raise ModelError(
                f"{source.folder}: config.json: {name}: {count}, but the weights have only "
                f"{tensors} tensors, none longer than {longest}; correct config.json"
            )


def _counts(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the counts and head widths in a configuration and its parts."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value, f"{prefix}{name}.")
        elif _COUNT.fullmatch(name) and isinstance(value, int | float):
            yield f"{prefix}{name}", value


def _check_units(folder: Path, stored: Layout, built: Layout) -> None:
    """Compare the units in the weights with those of the model that config.json describes."""
    wanted = {layer.layer: layer for layer in built.layers}
    for layer in stored.layers:
        other = wanted.pop(layer.layer, None)
        if other is None:
            raise ModelError(
                f"{folder}: layer {layer.layer} has experts in the weights ({layer.module}), but "
                "none according to config.json; correct config.json"
            )
        for what in ("experts", "hidden", "intermediate", "gated"):
            actual, said = getattr(layer, what), getattr(other, what)
            if actual != said:
                raise ModelError(
                    f"{folder}: {layer.module}: {what} of its experts is {actual} in the weights, "
                    f"config.json says {said}; one of the two belongs to another model"
                )
    if wanted:
        missing = next(iter(wanted.values()))
        raise ModelError(
            f"{folder}: layer {missing.layer}: config.json says that it has {missing.experts} "
            "experts, but the weights hold none; download them again, or correct config.json"
        )
    _check_matrices(folder, stored, built)


def _check_matrices(folder: Path, stored: Layout, built: Layout) -> None:
    """Compare the units one by one."""
    mine, theirs = _keys(stored), _keys(built)
    for unit, (ours, its) in enumerate(zip(mine, theirs, strict=False)):
        if ours != its:
            raise ModelError(
                f"{folder}: {stored.views[unit].tensor}: {_matrix(ours)} in the weights, where "
                f"config.json says {_matrix(its)}; a tensor is missing, extra, or from another "
                "model"
            )
    if len(mine) != len(theirs):
        raise ModelError(
            f"{folder}: the weights hold {len(mine):,} matrices to plan, but the model that "
            f"config.json describes has {len(theirs):,}; correct config.json"
        )


def _keys(layout: Layout) -> list[tuple[Any, ...]]:
    """Return role, layer, expert, projection and shape of every unit, in their order."""
    units = layout.units
    names = [str(name) for name in units.projections]
    columns = (units.role, units.layer, units.expert, units.projection, units.rows, units.cols)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        (ROLES[role], layer, expert, names[projection], height, width)
        for role, layer, expert, projection, height, width in rows
    ]


def _matrix(key: tuple[Any, ...]) -> str:
    role, layer, expert, projection, height, width = key
    owner = f"expert {expert} of layer {layer}" if role == "routed" else f"layer {layer} ({role})"
    return f"{projection} of {owner} [{height}, {width}]"


def _converted(
    folder: Path, model: Any, state: Mapping[str, Tensor], shapes: Shapes
) -> dict[str, Tensor]:
    """Return the parameters that the tensors on disk make, on the meta device."""
    made: dict[str, Tensor] = {}
    with calling_transformers(f"{folder}: transformers cannot name the tensors of the model"):
        by_target = stored_as(model, state, shapes)
    for first, parts in by_target.items():
        transform: Any = None
        for stored, pattern, kind in parts:
            transform = transform or deepcopy(kind)
            dtype, shape = shapes[stored]
            empty = torch.empty(shape, dtype=DTYPES.get(dtype, torch.uint8), device="meta")
            transform.add_tensor(first, stored, pattern, empty)
        what = f"{folder}: transformers cannot make {first} of {parts[0][0]} and its like"
        with calling_transformers(what, "the weights do not fit config.json"):
            done = transform.convert(first, model=model, config=model.config)
        values = {n: v[0] if isinstance(v, list) else v for n, v in done.items()}
        made |= {name: value for name, value in values.items() if name in state}
    return made


def _missing(model: Any, state: Mapping[str, Tensor], made: Collection[str]) -> set[str]:
    """Return the parameters that nothing on disk makes, and that transformers would not tie."""
    missing = set(state) - set(made)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, origin in tied.items():
        if target in made or origin in made:
            missing -= {target, origin}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return {name for name in missing if not any(re.search(x, name) for x in ignored)}
