"""Modules whose weights stay packed: a matrix is dequantized when it is used, or never.

A module keeps its class's behaviour and loses some parameters. In their place is a `PackedWeight`,
which reads its matrices from streams: uint8 buffers with exactly the bytes of the checkpoint.
Reading the attribute (`linear.weight`) gives the whole dequantized tensor, so any forward works
unchanged. Experts that transformers' `@use_experts_implementation` decorates run

    on a CUDA device   by `kernels.moe`, straight from the streams, where kernels know the class's
                       activation and its formats; otherwise as below, and that is logged once
    elsewhere          by their own forward on `Matrices`: those that a batch does not hit are
                       never dequantized

Memory holds the streams and a cache of dequantized matrices, limited in bytes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bitknap.errors import InputError
from bitknap.kernels.experts import Experts
from bitknap.kernels.moe import moe
from bitknap.quantization.runtime.kernel_experts import kernel_experts
from bitknap.quantization.runtime.packed_weight import PackedWeight

_LOG = logging.getLogger(__name__)


class Packed(nn.Module):
    """Mixin for a module of any class some of whose parameters are packed."""

    packed: dict[str, PackedWeight]
    original: type[nn.Module]
    read: Callable[[PackedWeight], Tensor]

    def __getattr__(self, name: str) -> Any:
        packed: Mapping[str, PackedWeight] = self.__dict__.get("packed", {})
        return self.read(packed[name]) if name in packed else super().__getattr__(name)

    def prepare(self) -> None:
        """Warn once if these are experts on a GPU and kernels do not support their class."""
        weight = next(iter(self.packed.values()))
        if weight.stacked and weight.filled and weight.device.type == "cuda":
            self._tell(f"{self.original.__name__} does not go through transformers' interface")

    def _tell(self, reason: str) -> None:
        if next(iter(self.packed.values())).cache.tell(reason):
            _LOG.warning("%s; these experts are dequantized when they are used", reason)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for weight in self.packed.values():
            weight.dtype = fn(torch.empty(0, dtype=weight.dtype)).dtype
            weight.cache.clear()
        self.prepare()
        return self


class PackedExperts(Packed):
    """Mixin for decorated experts: kernels run them, or only experts with tokens are dequantized.

    Attributes:
        kernels: the weights as kernels read them; None if kernels do not run these experts.
        anywhere: run the kernels' reference implementation, which is slow, on other devices.
    """

    kernels: Experts | None = None
    anywhere: bool = False
    dequantizing: Callable[..., Any]

    def prepare(self) -> None:
        """Let kernels run these experts if they are on a CUDA device and kernels can."""
        weight = next(iter(self.packed.values()))
        self.kernels = None
        if not weight.filled or not (self.anywhere or weight.device.type == "cuda"):
            return
        try:
            self.kernels = kernel_experts(self, self.packed)
        except InputError as error:
            self._tell(str(error))
            return
        if weight.device.type == "cuda":
            # Without static addresses, a CUDA graph would copy all of them at each replay.
            for tensor in self.kernels.tensors:
                torch._dynamo.mark_static_address(tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts as their class does on activations, expert indices and weights."""
        if kwargs:
            args = inspect.signature(self.original.forward).bind(self, *args, **kwargs).args[1:]
        x = args[0]
        if self.kernels is None or (torch.is_grad_enabled() and x.requires_grad):
            return self.dequantizing(*args)
        dtype = next(iter(self.packed.values())).dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        return moe(rows, args[1], args[2], self.kernels).to(x.dtype).view_as(x)


def _dequantizing(module: PackedExperts, *args: Any) -> Any:
    """Run the class's own forward, which dequantizes only experts that tokens go to."""
    own: nn.Module = object.__new__(module.original)
    matrices = {name: weight.matrices() for name, weight in module.packed.items()}
    # torch types parameters more narrowly than a forward needs them.
    given: Any = module._parameters | matrices
    own.__dict__.update(module.__dict__ | {"_parameters": given})
    return module.original.forward(own, *args)


@cache
def _packed_class(original: type[nn.Module], experts: bool) -> type[nn.Module]:
    base = PackedExperts if experts else Packed
    # torch.compile breaks its graph there: which matrices are read is known only at run time.
    outside: Any = torch.compiler.disable
    own = {"original": original, "read": staticmethod(outside(PackedWeight.whole))}
    if experts:
        own["dequantizing"] = outside(_dequantizing)
    return type(f"Packed{original.__name__}", (base, original), own)


def pack(module: nn.Module, weights: Mapping[str, PackedWeight]) -> None:
    """Replace parameters of `module` by packed weights, in place."""
    for name in weights:
        del module._parameters[name]
    decorated = isinstance(getattr(module, "is_concatenated", None), bool)
    experts = decorated and all(weight.stacked for weight in weights.values())
    module.packed = dict(weights)  # type: ignore[assignment]
    module.__class__ = _packed_class(type(module), experts)  # type: ignore[arg-type]
    # transformers initializes modules whose parameters it did not load; these have none.
    module._is_hf_initialized = True  # type: ignore[assignment]


def packed_modules(model: nn.Module) -> Iterator[Packed]:
    """Yield the modules of a model some of whose parameters are packed."""
    yield from (module for module in model.modules() if isinstance(module, Packed))


def packed_weights(model: nn.Module) -> Iterator[PackedWeight]:
    """Yield all packed weights of a model."""
    for module in packed_modules(model):
        yield from module.packed.values()


def unpack(module: nn.Module) -> None:
    """Undo `pack`: dequantize into ordinary parameters. Streams stay where they are."""
    if not isinstance(module, Packed):
        return
    dequantized = {name: weight.whole().clone() for name, weight in module.packed.items()}
    module.__class__ = module.original  # type: ignore[assignment]
    vars(module).pop("packed")
    vars(module).pop("kernels", None)
    for name, tensor in dequantized.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
