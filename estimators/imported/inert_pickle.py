"""Read a file that torch saved without running anything that it names.

Only Python's own containers are made. An object of any other package becomes an `Inert`: a record
of its attributes, or of nothing.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from bitknap.errors import FileError

_CONTAINERS = {"set", "frozenset", "list", "dict", "tuple", "slice", "bytearray", "complex"}


class Inert:
    """An object that a pickle describes, of which only the attributes are kept.

    Attributes:
        attributes: its attributes, as far as the pickle has them by name.
    """

    attributes: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Make an empty record; a pickle need not call `__init__`."""
        self = super().__new__(cls)
        self.attributes = {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Forget the arguments."""

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.attributes |= {str(key): value for key, value in part.items()}

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget an entry."""

    def append(self, value: Any) -> None:
        """Forget an entry."""

    def extend(self, values: Any) -> None:
        """Forget entries."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _CONTAINERS:
            return getattr(__import__("builtins"), name)
        if module == "collections" and name in ("OrderedDict", "defaultdict"):
            return getattr(collections, name)
        return _inert(module, name)

    def persistent_load(self, pid: Any) -> None:
        """Leave a tensor's values where they are."""


@cache
def _inert(module: str, name: str) -> type[Inert]:
    return type(name, (Inert,), {"__module__": module})


def load(path: Path) -> Any:
    """Return what torch saved in a file, with everything of other packages inert.

    Raises:
        FileError: it cannot be read, or is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(inside) != 1:
                raise FileError(f"{path}: not a file that torch saved")
            with archive.open(inside[0]) as file:
                return _Reader(file).load()
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever a damaged pickle may lead to
        raise FileError(f"{path}: not a file that torch saved ({error})") from None
