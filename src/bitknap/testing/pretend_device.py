"""A device that is not there: tensors on it refuse tensors elsewhere, and compute on the CPU.

Every operation really runs, so that a whole job goes through with the values of the CPU, and fails
where it forgot a tensor on another device, as it would on a GPU. Call `install` once, in a process
of its own: torch has room for one such device, and other tests must not see it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_ATEN = torch.ops.aten
# These alone move values between devices.
_MOVES = (_ATEN.copy_.default, _ATEN._to_copy.default)
# Places in a tensor on a GPU may be on the CPU; they are the second argument.
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default)


class There(Tensor):
    """A tensor on the device, which wraps one on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        """Return a tensor that looks like `held` from outside, but for its device."""
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        return made

    def __init__(self, held: Tensor) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the tensors that are wrapped."""
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Return the values; like `item`, this works from any device."""
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Raise the error that a tensor on a GPU raises."""
        raise TypeError(f"{NAME}: cannot be converted to numpy; use Tensor.cpu() first")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{NAME}({self.held!r})"


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = list(_leaves((*args, *kwargs.values())))
    there = any(isinstance(one, There) for one in leaves)
    target = next((one for one in leaves if isinstance(one, torch.device)), None)
    if not there and (target is None or target.type != NAME):
        return func(*args, **kwargs)  # nothing to do with the device
    if there and func not in _MOVES:
        _check_together(func, (args[0], *args[2:]) if func in _INDEXING else leaves)
    held = _held(args)
    options = {name: _held(value) for name, value in kwargs.items()}
    if func is _ATEN.histc.default and not held[0].is_floating_point():
        held = (held[0].float(), *held[1:])  # a GPU counts whole numbers, too
    out = func(*held, **options)
    if func is _ATEN.copy_.default:
        return args[0]
    if not (there if target is None else target.type == NAME):
        return out
    out = tree_map_only(Tensor, There, out)
    return out if target is not None else return_and_correct_aliasing(func, args, kwargs, out)


def _check_together(func: Any, values: Any) -> None:
    """Refuse tensors on the CPU beside those on the device; a number may meet tensors anywhere."""
    for one in _leaves(values):
        if isinstance(one, Tensor) and not isinstance(one, There) and one.dim():
            raise RuntimeError(
                f"{func.name()}: expected all tensors to be on the same device, found {NAME} and "
                "cpu"
            )


def _leaves(values: Any) -> Iterator[Any]:
    """Yield what operations are given, tensors in lists too."""
    for one in values:
        if isinstance(one, list | tuple):
            yield from _leaves(one)
        else:
            yield one


def _held(value: Any) -> Any:
    """Return what operations are given, with what is on the device on the CPU."""
    if isinstance(value, There):
        return value.held
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == NAME else value
    return type(value)(map(_held, value)) if isinstance(value, list | tuple) else value


class _Dispatching(TorchDispatchMode):
    """Sends what makes tensors, which has none to dispatch on, to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Making(TorchFunctionMode):
    """Makes tensors of Python numbers on the CPU first; torch dispatches nothing for these."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        target = options.get("device")
        makes = target is not None and func in (torch.tensor, torch.as_tensor)
        if target is not None and makes and torch.device(target).type == NAME:
            del options["device"]
            return func(*args, **options).to(target)
        return func(*args, **options)


def install() -> None:
    """Tell torch that the device exists."""
    _setup_privateuseone_for_python_backend(NAME)


@contextlib.contextmanager
def pretending() -> Iterator[torch.device]:
    """Let the device compute while the block runs."""
    modes = _Dispatching(), _Making()  # type: ignore[no-untyped-call]
    with modes[0], modes[1], patch.object(torch.inference_mode, "__enter__", _no_grad):
        yield torch.device(NAME, 0)


def _no_grad(mode: Any) -> None:
    """Enter `torch.no_grad`: in inference mode wrapped tensors cannot share memory."""
    mode._inference_mode_context = torch.no_grad()
    mode._inference_mode_context.__enter__()
