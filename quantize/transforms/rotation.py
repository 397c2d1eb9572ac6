"""Rotate the residual stream of a model offline, so that few weights stand out.

Replacing the residual stream x by x' = x Q, Q orthogonal, changes nothing that a model computes if
everything that reads the stream undoes Q and everything that writes to it applies Q. RMSNorm
commutes with Q once its weights n are folded into the matrices that read its output:

    embedding  E' = E Q                    writers  o, down              W' = Qᵀ W, b' = b Q
    norms      n' = 1                      readers  q k v gate up router W' = W diag(n) Q
                                                    head, likewise

Q = D H: random signs D, then a Walsh–Hadamard transform H, block-diagonal where the hidden size is
no power of two. Experts and attention heads are unchanged inside. The result is a plain model of
the same architecture. Tied embeddings are untied: a norm is folded into the head, but not into the
embedding.

Sources: Ashkboos et al., SliceGPT (arXiv 2401.15024, §3: RMSNorm and rotations) and QuaRot
(arXiv 2404.00456); nothing is rotated at run time here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitknap.errors import ModelError
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.source_config import unquantized
from bitknap.quantization.transforms.rewritten_checkpoint import Rewritten, write

# Families of pre-norm decoders with plain RMSNorm (n x / rms(x)), each tested.
KNOWN = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "llama",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)
_INPUTS_FIRST = ("gpt_oss",)  # stores experts as [in, out]

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_LAYER = re.compile(r"(?P<layer>model\.layers\.\d+\.)(?P<rest>.+)")
_BEFORE_ATTENTION, _BEFORE_MLP = "input_layernorm.weight", "post_attention_layernorm.weight"
_MLP = r"(?:mlp|block_sparse_moe)\."
_EXPERT = _MLP + r"(?:experts\.(?:\d+\.)?|shared_experts?\.)?"

# Tensors that do not touch the stream: heads' norms, latent projections, biases after reading.
_BESIDE = re.compile(
    r"self_attn\.(?:[qk]_norm|q_a_layernorm|kv_a_layernorm|q_b_proj|kv_b_proj)\.weight"
    r"|self_attn\.(?:(?:q|k|v|q_a)_proj\.bias|kv_a_proj_with_mqa\.bias|sinks|rotary_emb\.inv_freq)"
    r"|" + _MLP + r"(?:gate\.e_score_correction_bias|router\.bias|experts\.gate_up_proj_bias)"
)
_READ_BY_ATTENTION = re.compile(r"self_attn\.(?:(?:q|k|v|q_a)_proj|kv_a_proj_with_mqa)\.weight")
_READ_BY_MLP = re.compile(
    _MLP + r"(?:gate|router|shared_expert_gate)\.weight"
    r"|" + _EXPERT + r"(?:gate_proj|up_proj|w1|w3)\.weight"
)
_READ_BY_STACK = re.compile(_MLP + r"experts\.gate_up_proj")
_WRITTEN = re.compile(r"self_attn\.o_proj\.weight|" + _EXPERT + r"(?:down_proj|w2)\.weight")
_WRITTEN_BY_STACK = re.compile(_MLP + r"experts\.down_proj")
_WRITTEN_BIAS = re.compile(r"self_attn\.o_proj\.bias|" + _MLP + r"experts\.down_proj_bias")


def hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """Return x D H: flip signs, then transform the last dimension; lengths and angles stay.

    H is orthonormal. Its block size is the largest power of two that divides the size: 128 for
    1,408. It takes only additions, log2(block size) per number.

    Args:
        x: float [..., size].
        signs: ±1, [size].
    """
    return _walsh(x * signs)


def unhadamard(x: Tensor, signs: Tensor) -> Tensor:
    """Return the tensor that `hadamard` turned into `x`."""
    return _walsh(x) * signs


def _walsh(x: Tensor) -> Tensor:
    """Return x H; H is symmetric and its own inverse."""
    size = x.shape[-1]
    block = size & -size
    step = 1
    result = x
    while step < block:
        pairs = result.reshape(-1, 2, step)
        result = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        step *= 2
    return result.reshape(x.shape) / math.sqrt(block)


def random_signs(size: int, seed: int) -> Tensor:
    """Return ±1 drawn by `seed`, float32 [size]."""
    generator = torch.Generator().manual_seed(seed)
    return 1.0 - 2.0 * torch.randint(0, 2, (size,), generator=generator)


class Turn(NamedTuple):
    """How one tensor that touches the residual stream changes.

    Attributes:
        axis: the axis along which the stream runs, from the end: -1 or -2.
        norm: name of the norm before the tensor, whose weights are folded in first; or None.
        is_norm: whether it is a norm itself, which becomes 1.
    """

    axis: int = -1
    norm: str | None = None
    is_norm: bool = False


def turns(model_type: str, names: Iterable[str]) -> dict[str, Turn]:
    """Return how every tensor that changes is changed.

    Args:
        model_type: model type of the language model's config.
        names: all tensors, of a live model or of a checkpoint.

    Raises:
        ModelError: the family is not known, or its rules do not name a tensor.
    """
    if model_type not in KNOWN:
        raise ModelError(
            f"{model_type}: models of this type cannot be rotated; those that can are "
            f"{', '.join(KNOWN)}"
        )
    everything = set(names)
    changes = {}
    for name in everything:
        turn = _turn(name, inputs_first=model_type in _INPUTS_FIRST)
        if turn is None:
            continue
        if turn.norm and turn.norm not in everything:
            raise ModelError(f"{name}: its norm {turn.norm} is missing; download the weights again")
        changes[name] = turn
    if missing := sorted({_EMBEDDING, _NORM} - set(changes)):
        raise ModelError(f"{missing[0]}: missing; rotate a whole causal language model")
    return changes


def _turn(name: str, *, inputs_first: bool) -> Turn | None:
    """Return how a tensor changes, None if it does not."""
    outside = {_EMBEDDING: Turn(), _NORM: Turn(is_norm=True), _HEAD: Turn(norm=_NORM)}
    if name in outside:
        return outside[name]
    match = _LAYER.fullmatch(name)
    layer, rest = (match["layer"], match["rest"]) if match else ("", "")
    last, other = (-2, -1) if inputs_first else (-1, -2)
    mlp_norm = f"{layer}{_BEFORE_MLP}"
    rules = (
        (_READ_BY_ATTENTION, Turn(-1, f"{layer}{_BEFORE_ATTENTION}")),
        (_READ_BY_MLP, Turn(-1, mlp_norm)),
        (_READ_BY_STACK, Turn(last, mlp_norm)),
        (_WRITTEN, Turn(-2)),
        (_WRITTEN_BY_STACK, Turn(other)),
        (_WRITTEN_BIAS, Turn(-1)),
        (_BESIDE, None),
    )
    if rest in (_BEFORE_ATTENTION, _BEFORE_MLP):
        return Turn(is_norm=True)
    for regex, turn in rules:
        if regex.fullmatch(rest):
            return turn
    raise ModelError(
        f"{name}: it is not known whether it reads or writes the residual stream, so this model "
        "cannot be rotated"
    )


@torch.no_grad()
def rotate_residual(model: nn.Module, seed: int = 0) -> None:
    """Rotate a live model's residual stream, in place; its logits stay the same up to rounding.

    Tied embeddings are untied. Rotate in float32: rounding to 16 bits adds errors of its own.

    Args:
        model: a transformers model with a language head.
        seed: random seed of the signs.

    Raises:
        ModelError: the family or one of its parameters is not known; nothing was changed.
    """
    config: Any = model.config
    known = dict(model.named_parameters())
    tied = _HEAD not in known
    plan = turns(config.model_type, [*known, *([_HEAD] if tied else [])])
    signs = _signs(known[_EMBEDDING].shape[-1], seed)
    if tied:
        embedding = known[_EMBEDDING]
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        head.weight = nn.Parameter(embedding.detach().clone(), embedding.requires_grad)
        config.tie_word_embeddings = False
    tensors = dict(model.named_parameters())
    norms = {name: tensors[name].clone() for name, turn in plan.items() if turn.is_norm}
    for name, turn in plan.items():
        _apply(tensors[name], turn, norms, signs)


def turned(source: Checkpoint, seed: int = 0) -> Rewritten:
    """Return a checkpoint whose residual stream is rotated as it is read, tensor by tensor.

    Raises:
        ModelError: the family or one of its tensors is not known, or the weights are quantized.
    """
    config = unquantized(source.config)
    tied = _HEAD not in source.headers
    plan = turns(str(config.get("model_type")), [*source.headers, *([_HEAD] if tied else [])])
    signs = _signs(source.headers[_EMBEDDING].shape[-1], seed)
    norms = {name: source.read(name) for name, turn in plan.items() if turn.is_norm}

    def change(name: str, tensor: Tensor) -> Tensor:
        if name in plan:
            _apply(tensor, plan[name], norms, signs)
        return tensor

    return Rewritten(
        source=source,
        change=change,
        mark=f"hadamard {seed}",
        config={**config, "tie_word_embeddings": False} if tied else config,
        copies={_HEAD: _EMBEDDING} if tied else {},
    )


def rotated(folder: Path, out: Path, seed: int = 0, *, overwrite: bool = False) -> None:
    """Write a rotated copy of a checkpoint: a plain transformers folder of the same architecture.

    One tensor is in memory at a time. Weights keep their dtype, so those in 16 bits are rounded
    once more.

    Args:
        folder: a plain checkpoint.
        out: where to write.
        seed: random seed of the signs.
        overwrite: whether `out` may exist.

    Raises:
        ModelError: the family or one of its tensors is not known, or the weights are quantized.
        InputError: `out` exists and `overwrite` is false.
        FileError: a file is damaged.
    """
    write(turned(Checkpoint.open(folder), seed), out, overwrite=overwrite)


def _signs(hidden: int, seed: int) -> Tensor:
    if hidden % 2:
        raise ModelError(
            f"hidden size {hidden} is odd, and a Hadamard transform needs an even size; do not "
            "rotate this model"
        )
    return random_signs(hidden, seed)


def _apply(tensor: Tensor, turn: Turn, norms: Mapping[str, Tensor], signs: Tensor) -> None:
    """Change one tensor in place, in float32 at least; stacked experts one by one."""
    if turn.is_norm:
        tensor.fill_(1)
        return
    exact = torch.promote_types(tensor.dtype, torch.float32)
    flips = signs.to(tensor.device, exact)
    norm = norms[turn.norm].to(tensor.device, exact) if turn.norm else None
    for one in tensor if tensor.ndim == 3 else (tensor,):
        along = one if turn.axis == -1 else one.transpose(-1, -2)
        x = along.to(exact)
        along.copy_(hadamard(x if norm is None else x * norm, flips))
