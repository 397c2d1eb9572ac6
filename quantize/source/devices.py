"""Devices by name: where a computation runs, and how much memory is there."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from bitknap.allocation.problem.budget import human
from bitknap.errors import InputError

AUTO = "auto"
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Computing:
    """Where and how a model computes.

    Attributes:
        device: where it computes.
        dtype: of matrix products, float32 or bfloat16.
        host: bytes of this machine's memory that decoder layers may take while they wait for
            another device; None for half of it.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    host: int | None = None

    def keeps(self, nbytes: int) -> bool:
        """Return whether layers of a number of bytes wait in this machine's memory."""
        room = _physical() // 2 if self.host is None else self.host
        return self.device != CPU and nbytes <= room


# On the CPU, in float32.
HERE = Computing()


def device_of(name: str | torch.device) -> torch.device:
    """Return the device with a name.

    Args:
        name: "auto" is the first CUDA device, or the CPU if there is none; "cpu"; "cuda"; "cuda:1";
            or another device that torch knows.

    Raises:
        InputError: the name is none of these, or the device is not there.
    """
    if name == AUTO:
        return torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: {name!r} is no device; give auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = device.index or 0
    if number >= count:
        there = [f"cuda:{at} with {human(_total(at))}" for at in range(count)]
        raise InputError(f"device: {name} is not there; this machine has cpu{_listed(there)}")
    return torch.device("cuda", number)


def dtype_of(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which matrix products are computed on a device.

    Args:
        name: "auto" is bfloat16 on a CUDA device that computes in it, float32 elsewhere; or
            "float32" or "bfloat16", also as torch's own dtype.
        device: where they are computed.

    Raises:
        InputError: the name is none of these.
    """
    if name == AUTO:
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        if name in (dtype, dtype_name(dtype)):
            return dtype
    raise InputError(f"dtype: {name!r} is none of auto, float32 and bfloat16; give one of these")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def memory_limit(device: torch.device, host: int | None, own: int | None) -> int | None:
    """Return how many bytes a computation may take on its device; None for any number.

    Args:
        device: where it runs.
        host: limit on the memory of this machine, which holds for the CPU.
        own: limit on the memory of another device; what is free on a GPU is one, too.
    """
    if device.type == "cpu":
        return host
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return min((limit for limit in (own, free) if limit is not None), default=None)


def _physical() -> int:
    """Return this machine's memory in bytes; 0 if the system does not say."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    known = all(name in getattr(os, "sysconf_names", {}) for name in names)
    return os.sysconf(names[0]) * os.sysconf(names[1]) if known else 0


def _total(number: int) -> int:
    return int(torch.cuda.get_device_properties(number).total_memory)


def _listed(names: list[str]) -> str:
    return "".join(f", {name}" for name in names)
