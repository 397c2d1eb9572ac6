"""Decoder layers in this machine's memory, as they are stored, on their way to another device.

A layer is read once and kept in the precision of its file. While one computes, the next is copied
to the device: on a GPU from memory that the system does not move, in a stream of its own. There it
is widened to the model's dtype when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# The tensors of a layer by name.
Tensors = Mapping[str, Tensor]


class HostLayers:
    """Keeps layers, and sends them to a device.

    Args:
        device: where they are sent; not the CPU.
        read: reads a layer by its place, in the dtypes it is stored in, to the CPU.
        keep: keep layers that were read; otherwise each is read whenever it is sent.
    """

    def __init__(self, device: torch.device, read: Callable[[int], Tensors], *, keep: bool) -> None:
        self._device, self._read, self._keep = device, read, keep
        self._kept: dict[int, Tensors] = {}
        self._sent: tuple[int, Tensors] | None = None
        self._largest = 0  # bytes of the largest layer that went ahead
        # A copy in the stream that computes would wait for what computes.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, place: int) -> Tensors:
        """Return a layer on the device, in the dtypes it is stored in.

        Raises:
            FileError: a tensor is missing or damaged.
        """
        sent, self._sent = self._sent, None
        there = sent[1] if sent is not None and sent[0] == place else self._copied(place)
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for tensor in there.values():
                tensor.record_stream(computing)  # its memory is not taken before it was used
        return there

    def send(self, place: int) -> bool:
        """Let a layer travel to the device while something else is computed, if it is kept here.

        Returns:
            Whether it is kept; without room on the device it goes when its turn comes.
        """
        if place not in self._kept:
            return False
        if self._has_room(sum(tensor.nbytes for tensor in self._kept[place].values())):
            self._sent = place, self._copied(place)
        return True

    def _has_room(self, nbytes: int) -> bool:
        """Return whether a layer may be on the device beside the one that computes.

        torch holds on to what earlier layers took at their peak, so what is free then was not
        needed by any of them. What a layer took on its way is there for the next one.
        """
        if self._stream is not None and nbytes > self._largest:
            if torch.cuda.mem_get_info(self._device)[0] < nbytes:
                return False
            self._largest = nbytes
        return True

    def _copied(self, place: int) -> Tensors:
        here = self._here(place)
        if self._stream is None:
            return {name: tensor.to(self._device) for name, tensor in here.items()}
        with torch.cuda.stream(self._stream):
            return {n: x.to(self._device, non_blocking=True) for n, x in here.items()}

    def _here(self, place: int) -> Tensors:
        if place in self._kept:
            return self._kept[place]
        layer = self._read(place)
        if self._keep:
            if self._stream is not None:
                layer = {name: tensor.pin_memory() for name, tensor in layer.items()}
            self._kept[place] = layer
        return layer
