"""The memory of a device that generates with a model, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitknap.allocation.problem.arrays import Longs
from bitknap.allocation.problem.byte_sizes import human
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.serving import CacheLayers, Serving
from bitknap.allocation.problem.units import Units
from bitknap.errors import InfeasibleError, InputError

# Tokens of each sequence that one pass takes of a prompt (transformers' `prefill_chunk_size`).
CHUNK = 2048
# The runtime's own share of a GPU: the CUDA context, the libraries' modules and workspaces, and
# what the allocator cannot use. Stated, not measured in this project.
_CONTEXT = 1 << 30
# The same of a process on a CPU: the interpreter with torch and transformers, measured; and
# matrices that are dequantized and kept, at most this many bytes (`load(cache_bytes=…)`).
_LIBRARIES, _KEPT = 1 << 29, 1 << 28
# Where the CPU has bf16 instructions, oneDNN compiles a product for every number of rows and keeps
# up to 1,024 of them: 150 to 190 MB measured, whatever the model.
_COMPILED = 192 << 20
# Numbers that one pass holds for each token, in widths of the residual stream, of a query, and of
# the middle; float32 copies of the logits.
_STREAM, _QUERY, _MIDDLE, _LOGITS = 8, 4, 3, 2
# Matrices in float32 that are alive while one is dequantized on a CPU.
_DEQUANTIZED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device, and what it has to hold.

    Attributes:
        size: bytes of its memory.
        context: tokens of each sequence, prompt and answer together.
        batch: number of sequences at once.
        kind: "gpu", where kernels run packed experts, or "cpu", where a process dequantizes the
            matrices that it uses.
        chunk: tokens of each sequence that one pass takes of a prompt (`prefill_chunk_size` of
            transformers' `generate`).
    """

    size: int
    context: int
    batch: int = 1
    kind: str = "gpu"
    chunk: int = CHUNK

    def entries(
        self, serving: Serving, kept: int, units: Units, context: int | None = None
    ) -> dict[str, int]:
        """Return the bytes of everything but the units' weights, by name.

        Args:
            serving: what the model needs.
            kept: bytes of the weights that are no units.
            units: the units.
            context: tokens of each sequence, in place of the device's.

        Raises:
            InputError: the context is beyond the model's, or the size of its cache is not known.
        """
        tokens = self.context if context is None else context
        _check(serving, tokens)
        once = min(tokens, self.chunk)
        chunk, size = self.batch * once, serving.itemsize
        pairs = chunk * serving.topk
        attention = max((self._attention(serving, one, tokens) for one in serving.cache), default=0)
        scores = serving.scores * once * tokens * (size + 4)
        mask = once * tokens * (1 + size)
        stream = _STREAM * serving.hidden + _QUERY * serving.heads + _MIDDLE * serving.middle
        entries = {
            "weights kept": kept,
            "cache": serving.cache_bytes(tokens, self.batch),
            "attention": self.batch * (attention + scores + mask),
            "activations": chunk * stream * size,
            "logits": self.batch * serving.vocabulary * (size + 4 * _LOGITS),
        }
        if self.kind == "cpu":
            largest, every = int(units.numel.max()), int(units.numel.sum())
            entries["experts"] = 4 * (pairs * serving.hidden + 2 * chunk * serving.routed)
            entries["dequantized matrices"] = min(_KEPT, size * every) + 4 * _DEQUANTIZED * largest
            entries["compiled products"] = _COMPILED
            return {**entries, "runtime": _LIBRARIES}
        scratch = pairs * serving.hidden * size + chunk * serving.routed * size
        if serving.dense_from and pairs >= serving.dense_from:
            scratch += serving.expert_weights * size + 12 * pairs * serving.hidden
        entries["kernels"] = scratch
        return {**entries, "runtime": _CONTEXT}

    def _attention(self, serving: Serving, layer: CacheLayers, tokens: int) -> int:
        """Return the bytes that attention in one layer holds of one sequence, beside the cache.

        A layer's cache grows by a copy, and keys and values may be expanded to all heads.
        """
        if not layer.per_token:
            return 0
        seen = tokens if layer.window is None else min(tokens, layer.window + self.chunk)
        return serving.itemsize * seen * (layer.per_token + serving.expanded)

    def unit_bytes(
        self, serving: Serving, units: Units, formats: tuple[Format, ...], nbytes: Longs
    ) -> Longs:
        """Return what the units take in the device's memory, int64[U,F].

        Args:
            serving: what the model needs.
            units: the units.
            formats: the formats.
            nbytes: bytes on disk, int64[U,F].
        """
        if self.kind == "cpu" or not serving.tiles:
            return nbytes
        more = np.zeros_like(nbytes)
        for shape, by_format in serving.tiles.items():
            rows, _, cols = shape.partition("x")
            which = (units.rows == int(rows)) & (units.cols == int(cols))
            more[which] = [int(by_format.get(item.name, 0)) for item in formats]
        return nbytes + more

    def room(self, serving: Serving, kept: int, units: Units, least: int) -> int:
        """Return the bytes that the device leaves for the units' weights.

        Args:
            serving: what the model needs.
            kept: bytes of the weights that are no units.
            units: the units.
            least: bytes of the units in the smallest plan.

        Raises:
            InputError: the context is beyond the model's, or the size of its cache is not known.
            InfeasibleError: that is less than `least`; the message says what would do.
        """
        rest = sum(self.entries(serving, kept, units).values())
        if least + rest <= self.size:
            return self.size - rest
        context = self.longest(serving, kept, units, least)
        shorter = f", or a context of at most {context:,} tokens" if context else ""
        raise InfeasibleError(
            f"memory: the smallest plan takes {human(least)} and the rest {human(rest)} at a "
            f"context of {self.context:,} tokens, the device has {human(self.size)}; take one of "
            f"at least {human(least + rest)} ({least + rest:,} bytes){shorter}"
        )

    def longest(self, serving: Serving, kept: int, units: Units, least: int) -> int:
        """Return the longest context that leaves `least` bytes for the units; 0 if none does."""
        low, high = 0, serving.longest or self.context
        while low < high:
            middle = (low + high + 1) // 2
            taken = sum(self.entries(serving, kept, units, middle).values())
            if taken + least <= self.size:
                low = middle
            else:
                high = middle - 1
        return low


def _check(serving: Serving, tokens: int) -> None:
    if serving.unknown:
        raise InputError(
            f"device: the size of the cache of {serving.family} is not known ({serving.unknown}); "
            "subtract it yourself and give the rest as a budget"
        )
    if serving.longest is not None and tokens > serving.longest:
        raise InputError(
            f"context: {tokens:,} tokens are more than the {serving.longest:,} that the model "
            "takes; give fewer"
        )
