"""Find the experts of a checkpoint from its `config.json` and safetensors headers alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from bitknap.errors import ModelError
from bitknap.quantization.models.matrix_views import (
    Block,
    Found,
    Layout,
    View,
    arrange,
    cut,
    describe,
)
from bitknap.quantization.models.tensor_names import (
    DISK_NAMES,
    STACKED,
    STACKED_LEAVES,
    Stacks,
    check_stacks,
    find_linears,
    find_router,
    find_unknown,
    modules_blocks,
)

# Model types whose gate and up alternate, which shapes do not show.
_INTERLEAVED = ("gpt_oss",)
_PLAIN = ("F64", "F32", "F16", "BF16")
_NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
# Configuration keys for the number of experts per token.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k")

_Shape = tuple[int, ...]


def walk_headers(
    config: Mapping[str, Any],
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    include: Collection[str] = (),
) -> Layout:
    """Return the units of a checkpoint, in the order of `live_model.walk` on its live model.

    Args:
        config: the parsed `config.json`.
        headers: tensor name to (safetensors dtype, shape).
        include: roles beside the routed experts: "shared", "attention", "dense".

    Raises:
        InputError: a role cannot be included.
        ModelError: there are no units, or tensors are missing, quantized or in an unknown layout.
    """
    text = text_config(config)
    shapes = {name: shape for name, (_, shape) in headers.items()}
    renames = DISK_NAMES.get(str(text.get("model_type")), ())
    both = config.get("is_encoder_decoder", False)
    stacks = Stacks(shapes, renames, None if both else count_of(text, "num_hidden_layers"))
    weights = {n: s for n, s in shapes.items() if len(s) == 2 and n.endswith(".weight")}
    matrices = list(find_linears(weights, stacks, include))
    blocks = modules_blocks(matrices, shapes)
    known = {row.view.tensor for row in matrices}
    matrices = [row for row in matrices if not _computes_nothing(text, row)]
    for group in _stacks_of_experts(shapes, stacks):
        known.update(_stacked(text, shapes, group, matrices, blocks))
    unknown = find_unknown(shapes, stacks, known, include)
    _check_plain(config, headers, [*known, *([unknown] if unknown else ())])
    if unknown:
        raise ModelError(
            f"{unknown}: {text.get('model_type')} stores experts of shape {list(shapes[unknown])} "
            "in a way that is not known; load and save the model with transformers"
        )
    check_stacks(matrices, stacks)
    return arrange(matrices, describe(matrices, blocks, find_router(shapes, stacks, matrices)))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model."""
    for key in _NESTED:
        if isinstance(config.get(key), Mapping):
            return text_config(config[key])
    return config


def count_of(text: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of the named numbers that a configuration has, None if it has none.

    Args:
        text: a configuration, or a part of one.
        names: keys; "a.b" is key b in the part a.

    Raises:
        ModelError: it is not a whole number of at least 0.
    """
    for name, value in _values(text, names):
        if not _is_count(value):
            raise ModelError(f"config.json: {name}: {value!r} is not a whole number of at least 0")
        return int(value)
    return None


def experts_per_token(text: Mapping[str, Any]) -> list[int] | None:
    """Return the number of experts per token: one number for all layers, or one for each layer.

    Args:
        text: the part of a configuration that describes the language model.

    Returns:
        A list of one number, or of one per layer as in HunYuan; None if no key is there.

    Raises:
        ModelError: it is neither a whole number of at least 0 nor a list of them.
    """
    for name, value in _values(text, _EXPERTS_PER_TOKEN):
        counts = value if isinstance(value, list) and value else [value]
        if not all(map(_is_count, counts)):
            raise ModelError(
                f"config.json: {name}: {str(value)[:80]} is neither a whole number of at least 0 "
                "nor a list with one for each layer"
            )
        return counts
    return None


def _values(text: Mapping[str, Any], names: Collection[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        value: Any = text
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            yield name, value


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _computes_nothing(text: Mapping[str, Any], row: Found) -> bool:
    # LongCat saves gate and up projections for zero experts too.
    if row.role != "routed" or not count_of(text, "zero_expert_num"):
        return False
    routed = count_of(text, "n_routed_experts")
    return routed is not None and row.expert >= routed


class _Group(dict[str, str]):
    """The stacked tensors of one experts module: leaf to tensor name."""

    def __init__(self, layer: int, module: str) -> None:
        super().__init__()
        self.layer, self.module = layer, module


def _stacks_of_experts(shapes: Mapping[str, _Shape], stacks: Stacks) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for full, shape in shapes.items():
        place = stacks.split(full) if len(shape) in (2, 3) else None
        match = STACKED.fullmatch(place[2].removesuffix(".weight")) if place else None
        if place is None or match is None:
            continue
        if (len(shape) == 2) == match["module"].endswith("experts.mlp"):
            module = full.removesuffix(".weight").removesuffix(f".{match['leaf']}")
            groups.setdefault(module, _Group(place[1], module))[match["leaf"]] = full
    return list(groups.values())


def _stacked(
    text: Mapping[str, Any],
    shapes: Mapping[str, _Shape],
    group: _Group,
    found: list[Found],
    blocks: dict[int, Block],
) -> list[str]:
    """Add the experts of one group; return the tensors it used."""
    parts = None
    if "v1" in group:
        parts = count_of(text, "ffn_config.moe_num_experts")
        if not parts or any(shapes[full][0] % parts for full in group.values()):
            raise ModelError(
                f"config.json: ffn_config: moe_num_experts: {parts} experts do not divide the "
                f"{shapes[group['v1']][0]} rows of {group['v1']}"
            )
        transposed = False
    else:
        transposed = _transposed(text, shapes, group)
    interleaved = text.get("model_type") in _INTERLEAVED
    experts = parts or min(shapes[full][0] for full in group.values())
    for leaf, full in group.items():
        stack = View(tensor=full, parts=parts, transposed=transposed or leaf == "w2")
        projections = STACKED_LEAVES[leaf]
        found += cut(
            group.layer,
            stack,
            shapes[full],
            projections,
            experts=experts,
            interleaved=interleaved,
        )
    if group.layer in blocks:
        raise ModelError(
            f"layer {group.layer}: experts in both {blocks[group.layer].module} and {group.module}"
        )
    prefix = f"{group.module}."
    biased = any(n.startswith(prefix) and n.endswith("proj_bias") for n in shapes)
    blocks[group.layer] = Block(
        module=group.module, transposed=transposed, interleaved=interleaved, biased=biased
    )
    return list(group.values())


def _transposed(text: Mapping[str, Any], shapes: Mapping[str, _Shape], group: _Group) -> bool:
    """Return whether matrices are stored as [in, out], which shapes of gated experts determine."""
    leaves = {STACKED_LEAVES[leaf]: shapes[full][1:] for leaf, full in group.items()}
    first = leaves.get(("gate", "up")) or leaves.get(("up",))
    down = leaves.get(("down",))
    if first is None or down is None:
        raise ModelError(
            f"{group.module}: has only {', '.join(group)}; a tensor is missing: download the "
            "weights again"
        )
    factor = 2 if ("gate", "up") in leaves else 1
    straight = first == (factor * down[1], down[0])
    turned = first == (down[1], factor * down[0])
    if straight and turned:  # ungated: both readings fit, only the hidden size can decide
        hidden = text.get("hidden_size")
        return first[0] == hidden and first[1] != hidden
    if not straight and not turned:
        raise ModelError(
            f"{group.module}: shapes {list(first)} and {list(down)} do not make experts"
        )
    return turned


def _check_plain(
    config: Mapping[str, Any], headers: Mapping[str, tuple[str, _Shape]], names: Collection[str]
) -> None:
    for name in names:
        if headers[name][0] not in _PLAIN:
            about = config.get("quantization_config")
            method = (
                about.get("quant_method", "unknown") if isinstance(about, Mapping) else "unknown"
            )
            raise ModelError(
                f"{name}: stored as {headers[name][0]} (quantized, method {method}); "
                "dequantize the checkpoint to 16 bits first"
            )
