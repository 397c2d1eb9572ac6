"""From weights and a plan to a packed checkpoint and back.

The module itself can be called: `bitknap.quantize(model, plan, out)` is `bitknap.api.quantize`.
It has to be, because the public function and this room share their name.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallableRoom(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from bitknap.api import quantize

        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableRoom
