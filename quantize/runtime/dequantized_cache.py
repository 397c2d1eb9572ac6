"""A cache of a model's most used dequantized matrices, limited in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from heapq import heappop, heappush, heapreplace

from torch import Tensor

CACHE_BYTES = 1 << 28


class Cache:
    """Matrices by key, at most `limit` bytes of them.

    The most requested matrices stay. Layers run in turn, so the least recently used matrix is the
    next one needed: evicting it, as most caches do, would give no hits from one token to the next.
    But routers prefer some of a layer's experts.

    Attributes:
        limit: maximum size in bytes; may be changed at any time.
        used: bytes of the matrices kept now.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self.used = 0
        self._kept: dict[Hashable, Tensor] = {}
        self._asked: Counter[Hashable] = Counter()
        # A heap of (number of requests when last checked, tie breaker, key).
        self._coldest: list[tuple[int, int, Hashable]] = []
        self._serial = 0
        self._logged: set[str] = set()

    def get(self, key: Hashable) -> Tensor | None:
        """Return a matrix if it is kept; callers must not write to it."""
        self._asked[key] += 1
        return self._kept.get(key)

    def offer(self, key: Hashable, matrix: Tensor) -> bool:
        """Keep a matrix, dropping only less requested ones; return whether it was kept."""
        if matrix.nbytes > self.limit:
            return False
        while self.used + matrix.nbytes > self.limit:
            if not self._drop_below(self._asked[key]):
                return False
        self._kept[key] = matrix
        self.used += matrix.nbytes
        heappush(self._coldest, (self._asked[key], self._serial, key))
        self._serial += 1
        return True

    def _drop_below(self, asked: int) -> bool:
        """Drop the least requested matrix if it has fewer requests than `asked`."""
        while self._coldest:
            known, serial, key = self._coldest[0]
            now = self._asked[key]
            if known < now:
                heapreplace(self._coldest, (now, serial, key))
            elif now < asked:
                heappop(self._coldest)
                self.used -= self._kept.pop(key).nbytes
                return True
            else:
                return False
        return False

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._asked.clear()
        self._coldest.clear()
        self.used = 0

    def tell(self, what: str) -> bool:
        """Return whether a message is new: modules that share a cache log each message once."""
        news = what not in self._logged
        self._logged.add(what)
        return news
