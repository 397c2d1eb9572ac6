"""Matrix products of a running model in bfloat16; everything else stays float32.

The products with weights and those of attention take their inputs rounded to bfloat16, and hand on
float32. So streams of hidden states, norms, softmax and what is summed of them keep float32, which
`torch.autocast` does not promise: under it results stay bfloat16 until something widens them, and
grouped products of experts are not cast at all. Routers and the head stay exact: a router's product
is small and chooses experts, and KL is read off the head's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Functions whose tensors are factors; of an addend, such as a bias, little is lost either.
_WITH_WEIGHTS: frozenset[Callable[..., Any]] = frozenset((functional.linear,))
# These take only matrices whose rows begin at multiples of 16 bytes.
_ALIGNED: frozenset[Callable[..., Any]] = frozenset((functional.grouped_mm, torch._grouped_mm))
_BYTES = 16
_OF_ATTENTION: frozenset[Callable[..., Any]] = frozenset((functional.scaled_dot_product_attention,))
# Products with a weight only if one factor is one: they compute positions and states, too.
_PERHAPS: frozenset[Callable[..., Any]] = frozenset(
    (torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm)
)
# Parts of the names of classes of routers.
_ROUTERS = ("router", "gating")


class Products(TorchFunctionMode):
    """Computes matrix products in bfloat16 while it is entered, except in some modules.

    Args:
        model: a transformers model, whose routers and head stay exact.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._exact = 0  # modules in which products stay exact that are running
        for module in exact_modules(model):
            module.register_forward_pre_hook(self._begin, prepend=True)
            module.register_forward_hook(self._end, always_call=True)

    def __enter__(self) -> Products:
        self._exact = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, with its factors in bfloat16 if it is a product."""
        kwargs = kwargs or {}
        if self._exact or not _is_product(func, args):
            return func(*args, **kwargs)
        narrow = [_narrowed(one) for one in args]
        out = func(*narrow, **{name: _narrowed(one) for name, one in kwargs.items()})
        widened = any(old is not new for old, new in zip(args, narrow, strict=True))
        return out.float() if widened else out

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._exact += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._exact -= 1


def exact_modules(model: Any) -> list[nn.Module]:
    """Return a model's routers and its head."""
    routers = [
        module
        for module in model.modules()
        if any(part in type(module).__name__.lower() for part in _ROUTERS)
    ]
    head = model.get_output_embeddings()
    return routers if head is None else [*routers, head]


def _is_product(func: Any, args: Any) -> bool:
    if func in _WITH_WEIGHTS or func in _OF_ATTENTION:
        return True
    if func in _ALIGNED:
        return all(_aligned(one) for one in args if isinstance(one, Tensor) and one.ndim > 1)
    return func in _PERHAPS and any(isinstance(one, nn.Parameter) for one in args)


def _aligned(factor: Tensor) -> bool:
    """Return whether a factor's rows, in bfloat16, begin where a grouped product needs them to."""
    return all(
        step == 1 or step * torch.bfloat16.itemsize % _BYTES == 0 for step in factor.stride()
    )


def _narrowed(value: Any) -> Any:
    """Return a float32 tensor in bfloat16, and anything else as it is."""
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.bfloat16()
    return value
