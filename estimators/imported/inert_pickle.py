"""Read a file that torch saved without running anything that it names.

A pickle is a list of instructions that build values on a stack. Here they are followed one by one,
and only Python's own values are built: what another package would build becomes an `Inert`, a
record of its attributes. Nothing is imported and nothing is called.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitknap.errors import FileError

_MOST = 1 << 28  # bytes of a pickle; scores of a large model take some megabytes
_MARK = object()


class Inert:
    """An object that a pickle describes, of which only the attributes are kept.

    Attributes:
        attributes: its attributes, as far as the pickle has them by name.
        entries: its entries, if it is a mapping or a list.
    """

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}
        self.entries: dict[Any, Any] = {}


def load(path: Path) -> Any:
    """Return what torch saved in a file, with everything of other packages inert.

    Mappings of other classes become dicts.

    Raises:
        FileError: it cannot be read, or is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(inside) != 1:
                raise FileError(f"{path}: not a file that torch saved")
            if (size := archive.getinfo(inside[0]).file_size) > _MOST:
                raise FileError(f"{path}: holds a pickle of {size:,} bytes, more than {_MOST:,}")
            return _Machine().run(archive.read(inside[0]))
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever a damaged pickle may lead to
        raise FileError(f"{path}: not a file that torch saved ({error})") from None


class _Machine:
    """The stack and the memory of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Return the value that the instructions build."""
        for step, argument, _ in pickletools.genops(data):
            name = step.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _STEPS:
                _STEPS[name](self, argument)
            else:
                raise ValueError(f"instruction {name} is not known")
        raise ValueError("it has no end")

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """Take the values above the last mark off the stack, and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def taken(self, count: int) -> list[Any]:
        """Take values off the stack."""
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def built(self, parts: int) -> None:
        """Replace a class and its arguments by an object."""
        kind, *arguments = self.taken(parts)
        self.push(_made(kind, arguments[0] if arguments else ()))

    def set_state(self, _: Any) -> None:
        """Give an object its attributes."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    target.attributes |= {str(key): value for key, value in part.items()}

    def fill(self, values: list[Any]) -> None:
        """Give a mapping its entries."""
        target = self.stack[-1]
        held = target.entries if isinstance(target, Inert) else target
        held.update(zip(values[::2], values[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        """Give a list or a set its entries."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(values)


def _made(kind: Any, arguments: Any) -> Any:
    """Return what a class of the pickle makes of its arguments."""
    name = kind if isinstance(kind, str) else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else ()
    if name in ("collections OrderedDict", "collections defaultdict", "builtins dict"):
        return {}
    if name in ("builtins set", "__builtin__ set") and isinstance(first, list | tuple):
        return set(first)
    return Inert()


def _global(machine: _Machine, argument: Any) -> None:
    machine.push(argument if argument is not None else " ".join(map(str, machine.taken(2))))


def _remember(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


def _no_tensor(machine: _Machine, _: Any) -> None:
    """Leave a tensor's values where they are."""
    machine.stack[-1] = None


_Step = Callable[[_Machine, Any], Any]
# Instructions whose argument is the value.
_PUSHED = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "STRING"),
}
_STEPS: dict[str, _Step] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.push(_MARK),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.push(tuple(m.taken(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.taken(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.taken(3))),
    "LIST": lambda m, _: m.push(m.marked()),
    "FROZENSET": lambda m, _: m.push(frozenset(m.marked())),
    "SETITEM": lambda m, _: m.fill(m.taken(2)),
    "SETITEMS": lambda m, _: m.fill(m.marked()),
    "APPEND": lambda m, _: m.extend(m.taken(1)),
    "APPENDS": lambda m, _: m.extend(m.marked()),
    "ADDITEMS": lambda m, _: m.extend(m.marked()),
    "GLOBAL": _global,
    "STACK_GLOBAL": _global,
    "REDUCE": lambda m, _: m.built(2),
    "NEWOBJ": lambda m, _: m.built(2),
    "NEWOBJ_EX": lambda m, _: m.built(3),
    "BUILD": _Machine.set_state,
    "BINPERSID": _no_tensor,
    "POP": lambda m, _: m.taken(1),
    "POP_MARK": lambda m, _: m.marked(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "PUT": _remember,
    "BINPUT": _remember,
    "LONG_BINPUT": _remember,
    "MEMOIZE": _remember,
    "GET": lambda m, at: m.push(m.memo[at]),
    "BINGET": lambda m, at: m.push(m.memo[at]),
    "LONG_BINGET": lambda m, at: m.push(m.memo[at]),
}
