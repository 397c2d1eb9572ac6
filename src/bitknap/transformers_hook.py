"""Tells transformers about packed checkpoints, without importing it.

transformers finds quantizers in its own table and does not look for plug-ins, so they must be
written into that table between its import and the first `from_pretrained`. Importing transformers
with Bitknap would work, but would cost users who only solve seconds and torch. Hence a finder on
`sys.meta_path`: it answers for one module name, costs nothing until transformers imports that
module, and registers the plug-in right after the module has run. If transformers is already
imported, the plug-in is registered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.quantizers.auto"


class _Finder(MetaPathFinder):
    """Finds `TABLE` through the other finders, and registers the plug-in once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        for other in sys.meta_path:
            find = None if isinstance(other, _Finder) else getattr(other, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                _register_after(spec)
                return spec
        return None


def _register_after(spec: ModuleSpec) -> None:
    """Make the loader of `spec` register the plug-in when it has run the module."""
    loader: Any = spec.loader
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        _register()

    loader.exec_module = exec_module


def install() -> None:
    """Make transformers recognize packed checkpoints, now or as soon as it is imported."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    if TABLE in sys.modules:
        _register()


def _register() -> None:
    from bitknap.quantization.runtime.transformers_plugin import register

    register()
