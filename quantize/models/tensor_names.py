"""How tensors are named, on disk and in memory: one table of regexes.

    model.layers.3.mlp.experts.17.up_proj.weight
    └ stack ┘      └────────── rest ─────────┘     layer 3, routed, expert 17, up

A name that matches no row of the table is not a unit. Tensors that look like experts and match no
row are an error, so that a new layout is never silently left at full precision.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from bitknap.errors import ModelError
from bitknap.names import check_name
from bitknap.quantization.models.matrix_views import Block, Found, View

INCLUDES = ("shared", "attention", "dense")

_LAYER = re.compile(
    r"(?P<stack>(?:.*?\.)??)(?:layers|blocks|block|layer|h)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
# Towers of another modality, and multi-token prediction, which transformers does not load.
_OTHER_STACK = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|speech|mtp)")

_MLP = r"(?:mlp|feed_forward|block_sparse_moe|ffn|mixer|DenseReluDense)"
_ATTENTION = (
    r"(?:self_attn|self_attention|attention|attn|linear_attn|SelfAttention|norm_attn_norm\.attn)"
)
_CROSS = r"(?:EncDecAttention|encoder_attn|cross_attn|cross_attention)"

# (role, regex over the rest). T5's sublayers have the prefix `layer.N.`.
_RULES = tuple(
    (role, re.compile(r"(?:layer\.\d+\.)?" + regex))
    for role, regex in (
        ("routed", r"(?:.+\.)?experts\.(?:expert_)?(?P<expert>\d+)\.(?P<leaf>\w+)"),
        ("shared", r"(?:.+\.)?shared_(?:experts?|mlp)\.(?:(?P<expert>\d+)\.)?(?P<leaf>\w+)"),
        ("attention", _ATTENTION + r"\.(?P<path>.+)"),
        ("attention", r"(?P<cross>" + _CROSS + r")\.(?P<path>.+)"),
        ("attention", r"mixer\.(?P<path>[qkvo]_proj)"),
        ("dense", _MLP + r"\.(?P<leaf>\w+)"),
        ("dense", r"mlps\.(?P<index>\d+)\.(?P<leaf>\w+)"),  # LongCat: two MLPs a layer
    )
)

# The projections a 2-D weight holds, one above the other.
_LEAVES = {
    **dict.fromkeys(("gate_proj", "w1", "wi_0"), ("gate",)),
    **dict.fromkeys(("up_proj", "w3", "wi_1", "wi", "fc1"), ("up",)),
    **dict.fromkeys(("down_proj", "w2", "wo", "fc2", "output_linear"), ("down",)),
    **dict.fromkeys(("gate_up_proj", "input_linear"), ("gate", "up")),
}

# Tensors that stack all experts of a layer. DBRX's are 2-D, experts one above the other.
STACKED = re.compile(
    r"(?P<module>(?:.+\.)?(?:experts(?:\.mlp)?|block_sparse_moe))\."
    r"(?P<leaf>gate_up_proj|gate_proj|up_proj|down_proj|fc[12]|(?:in|out)put_linear|w1|v1|w2)"
)
STACKED_LEAVES = {
    **_LEAVES,
    "fc1": ("gate", "up"),  # Aria; in NLLB, which stacks nothing, it is an up projection
    "v1": ("up",),
}

# Tensors that must not be ignored: matrices among experts, and anything 3-D inside an MLP.
_EXPERT_LIKE = re.compile(r"(?:^|\.)experts?\.")
_MLP_LIKE = re.compile(r"(?:^|\.)(?:\w*moe|" + _MLP + r")\.")

_ROUTER = re.compile(r"(?:.+\.)?(?:gate|router)(?:\.(?:layer|classifier|proj|gate|wg))?\.weight")
_NOT_ROUTER = re.compile(r"(?:^|\.)(?:experts|shared_\w+|" + _ATTENTION + r")\.")

# Hub names of attention that differ from the module's, by model_type.
DISK_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "kimi_linear": ((r"^self_attn\.(f_[ab]_proj)\b", r"self_attn.forget_gate.\1"),),
    "bailing_hybrid": (
        (r"^attention\.dense\b", "self_attn.o_proj"),
        (r"^attention\.f_proj\b", "self_attn.forget_gate.f_proj"),
    ),
    "deepseek_v4": (
        (r"^attn\.indexer\.compressor\.", "attn.compressor.indexer."),
        (r"^attn\.indexer\.weights_proj\b", "attn.compressor.indexer.scorer.weights_proj"),
        (r"^attn\.indexer\.", "attn.compressor.indexer."),
        (r"^(attn\..*)\bw(q_a|q_b|kv|o_a|o_b|gate)\b", r"\1\2_proj"),
    ),
}


class Name(NamedTuple):
    """The parts of a tensor's name; several `projections` if matrices share the tensor."""

    role: str
    expert: int
    projections: tuple[str, ...]


class Stacks:
    """Layer numbers that are unique over the model's stacks of layers.

    Args:
        names: all tensor names of the model.
        renames: (regex, replacement) pairs for the part after the layer number.
        layers: how many layers there are; later ones (multi-token prediction) are left out.
    """

    def __init__(
        self,
        names: Iterable[str],
        renames: Iterable[tuple[str, str]] = (),
        layers: int | None = None,
    ) -> None:
        self._renames = tuple((re.compile(regex), text) for regex, text in renames)
        self._layers = layers
        self._places: dict[str, tuple[str, int, str] | None] = {}
        depth: dict[str, int] = {}
        for name in names:
            match = _LAYER.fullmatch(name)
            if match:
                depth[match["stack"]] = max(depth.get(match["stack"], 0), int(match["layer"]) + 1)
        self._offset = {
            stack: depth.get(f"{stack.removesuffix('decoder.')}encoder.", 0)
            if stack.endswith("decoder.")
            else 0
            for stack in depth
        }

    def split(self, name: str) -> tuple[str, int, str] | None:
        """Return (stack, global layer number, rest), or None for a tensor outside the layers."""
        if name not in self._places:
            self._places[name] = self._split(name)
        return self._places[name]

    def _split(self, name: str) -> tuple[str, int, str] | None:
        match = _LAYER.fullmatch(name)
        if match is None or _OTHER_STACK.search(match["stack"]):
            return None
        layer, rest = int(match["layer"]), match["rest"]
        if self._layers is not None and layer >= self._layers:
            return None
        for regex, text in self._renames:
            rest = regex.sub(text, rest)
        return match["stack"], self._offset[match["stack"]] + layer, rest


def take_apart(rest: str) -> Name | None:
    """Return the key of a 2-D weight, from the part of its name after the layer number.

    Args:
        rest: without a trailing `.weight`.
    """
    for role, regex in _RULES:
        match = regex.fullmatch(rest)
        if match is None:
            continue
        groups = match.groupdict()
        if role == "attention":
            if rest.endswith("relative_attention_bias"):
                return None  # T5: an embedding
            path = re.sub(r"_proj(?=_|$)", "", groups["path"])
            return Name(role, -1, (f"cross.{path}" if "cross" in groups else path,))
        projections = _LEAVES.get(groups["leaf"], ())
        if groups.get("index"):
            projections = tuple(f"{groups['index']}.{name}" for name in projections)
        if projections:
            return Name(role, int(groups.get("expert") or -1), projections)
    return None


def find_linears(
    weights: Mapping[str, tuple[int, ...]], stacks: Stacks, include: Collection[str]
) -> Iterator[Found]:
    """Yield the units among 2-D weights, stored as [out, in].

    Args:
        weights: name, ending in `.weight`, to shape.
        stacks: numbers the layers.
        include: roles wanted beside the routed experts.

    Raises:
        InputError: a role cannot be included.
    """
    for role in include:
        check_name("include", role, INCLUDES)
    for full, shape in weights.items():
        place = stacks.split(full)
        name = take_apart(place[2].removesuffix(".weight")) if place else None
        if place is None or name is None or (name.role != "routed" and name.role not in include):
            continue
        rows = shape[0] // len(name.projections)
        for part, projection in enumerate(name.projections):
            cut = (part * rows, (part + 1) * rows) if len(name.projections) > 1 else (None, None)
            view = View(tensor=full, start=cut[0], stop=cut[1])
            yield Found(place[1], name.role, name.expert, projection, view, (rows, shape[1]))


def modules_blocks(found: Iterable[Found], names: Collection[str]) -> dict[int, Block]:
    """Return, by layer, the experts that are modules of their own."""
    blocks: dict[int, Block] = {}
    for row in found:
        if row.role == "routed" and row.layer not in blocks:
            tensor = row.view.tensor
            module = tensor[: tensor.rindex(".experts.") + len(".experts")]
            biased = tensor.removesuffix("weight") + "bias" in names
            blocks[row.layer] = Block(module=module, biased=biased, kind="modules")
    return blocks


def find_router(
    shapes: Mapping[str, tuple[int, ...]], stacks: Stacks, found: Iterable[Found]
) -> dict[int, str]:
    """Return the name of the router's weight, by layer.

    Args:
        shapes: all tensors of the model.
        stacks: numbers the layers.
        found: the routed matrices, which show how many experts a layer has.
    """
    experts: dict[int, int] = {}
    for row in found:
        if row.role == "routed":
            experts[row.layer] = max(experts.get(row.layer, 0), row.expert + 1)
    routers: dict[int, str] = {}
    for full, shape in shapes.items():
        place = stacks.split(full) if len(shape) == 2 else None
        if place is None or place[1] not in experts or _NOT_ROUTER.search(place[2]):
            continue
        # LongCat's router also scores experts that compute nothing.
        if shape[0] >= experts[place[1]] and _ROUTER.fullmatch(place[2]):
            routers.setdefault(place[1], full)
    return routers


def find_unknown(
    shapes: Mapping[str, tuple[int, ...]],
    stacks: Stacks,
    used: Collection[str],
    include: Collection[str],
) -> str | None:
    """Return the first tensor that looks like experts and is not `used`, or None.

    Args:
        shapes: all tensors of the model.
        stacks: numbers the layers.
        used: tensors that hold units, or are known not to.
        include: roles wanted beside the routed experts.
    """
    for full, shape in shapes.items():
        place = stacks.split(full) if len(shape) > 1 and full not in used else None
        if place is None or place[2].endswith("bias") or "conv" in place[2]:
            continue
        rest = place[2]
        if ".shared_" in rest and "shared" not in include:
            continue
        if _EXPERT_LIKE.search(rest) or (len(shape) > 2 and _MLP_LIKE.search(rest)):
            return full
    return None


def check_stacks(found: Iterable[Found], stacks: Stacks) -> None:
    """Refuse units in two stacks of layers that are not an encoder and its decoder.

    Raises:
        ModelError: there are such units; the message names the stacks.
    """
    places = (stacks.split(row.view.tensor) for row in found)
    used = sorted({place[0] for place in places if place})
    if len({re.sub(r"(?:en|de)coder\.$", "", stack) for stack in used}) > 1:
        names = ", ".join(stack.removesuffix(".") for stack in used)
        raise ModelError(
            f"units in {len(used)} stacks of layers ({names}); save one of these parts as a model "
            "of its own with transformers and pass that"
        )
