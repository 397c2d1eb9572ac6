"""Damage sound files, drawn from a seed: a fault comes down to the few edits that cause it.

An edit is a kind and a seed of its own, so that each can be applied without the others.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_DEEP = 100_000
_LONG = 50_000
# Values that no key expects, or one key expects and another does not.
NASTY: tuple[Any, ...] = (
    *(None, True, False, "", " ", [], {}, [[]], [None], {"a": 1}, "text", "1", "NaN"),
    *(0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**53, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**30, 10**400, -(10**400), 10**4000, 0.5, -0.0, 1e-320, 1e308, -1e308, 1e15, 3.7),
    *(float("nan"), float("inf"), float("-inf")),
    *("../../outside", "/", "/outside", "..", ".", "a/b", "a\x00b", "\n", "a\nb\tc", "\x1b[31m"),
    *("\ud800", "é", "\u202e", "\U0001d7da", "x" * _LONG, "%s", "{}", "{0}", "${HOME}", "~", "CON"),
    *(
        "int4-g64-sym",
        "int0-g8-sym",
        "int99-g8",
        "int2-g0",
        "keep-bf16",
        "layer=0",
        "[bold]",
        "[/]",
    ),
    *(list(range(300)), [1, "a", None], [1.5, 2], {"weight_map": {}}, [[1, 2], [3]], {"": ""}),
    *(
        "1e999",
        "99999999999999999999GiB",
        "-1bpw",
        "nanbpw",
        "infGiB",
        "40%",
        "2.5bpw",
        "1.0",
        "2.0",
    ),
)

# Names that lead out of the folder they are written in; `link` is made a link to one above it.
PATHS = (
    *("../beside.txt", "../../beside.txt", "a/../../beside.txt", "/proc/self/cwd/../beside.txt"),
    *("link/beside.txt", "link", "..", "/", "/outside", "../outside", "../../outside", "./", ""),
    *("a/b", "../model/config.json", "../plan.json", "../../beside.safetensors", "~/outside"),
)


class Edit(NamedTuple):
    """One damage: what is done, and the seed that says where and with what."""

    kind: str
    seed: int


def draw(kinds: Sequence[str], seed: int) -> list[Edit]:
    """Return one to three edits; one is the usual number, since most readers stop at the first."""
    chance = random.Random(seed)
    count = chance.choice((1, 1, 1, 2, 3))
    return [Edit(chance.choice(list(kinds)), chance.randrange(1 << 32)) for _ in range(count)]


def shrunk(edits: Sequence[Edit], fails: Callable[[Sequence[Edit]], bool]) -> list[Edit]:
    """Return the fewest of the edits that still fail, leaving out one after another."""
    left = list(edits)
    for edit in edits:
        fewer = [other for other in left if other is not edit]
        if fewer and fails(fewer):
            left = fewer
    return left


def damaged_json(content: bytes, edits: Sequence[Edit]) -> bytes:
    """Return a JSON text after edits of its values ("value", "path") and of its bytes."""
    document = json.loads(content)
    for edit in edits:
        if edit.kind in ("value", "path"):
            damage = damaged_value if edit.kind == "value" else _other_path
            document = damage(document, random.Random(edit.seed))
    found = json.dumps(document, indent=1).encode()
    return damaged_bytes(found, [edit for edit in edits if edit.kind not in ("value", "path")])


def damaged_lines(content: bytes, edits: Sequence[Edit]) -> bytes:
    """Return JSON lines after edits of values ("value", "path"), of lines, and of bytes."""
    lines = content.splitlines()
    for kind, seed in edits:
        chance = random.Random(seed)
        at = chance.randrange(len(lines)) if lines else 0
        if kind in ("value", "path") and lines:
            damage = damaged_value if kind == "value" else _other_path
            lines[at] = json.dumps(damage(_parsed(lines[at]), chance)).encode()
        elif kind == "line" and lines:
            how = chance.randrange(4)
            if how == 0:
                del lines[at]
            elif how == 1:
                lines.insert(at, lines[chance.randrange(len(lines))])
            elif how == 2:
                lines[at] = lines[at][: chance.randrange(len(lines[at]) + 1)]
            else:
                lines.insert(at, b"")
    found = b"".join(line + b"\n" for line in lines)
    values = ("value", "path", "line")
    return damaged_bytes(found, [edit for edit in edits if edit.kind not in values])


def damaged_value(document: Any, chance: random.Random) -> Any:
    """Return a copy of a JSON value with one value in it replaced, removed, renamed or swapped."""
    found = copy.deepcopy(document)
    places = list(_places(found))
    if not places:
        return chance.choice(NASTY)
    inside, key = chance.choice(places)
    how = chance.randrange(10)
    if how < 6:
        inside[key] = chance.choice(NASTY)
    elif how == 6:
        del inside[key]
    elif how == 7:
        inside[key] = _retyped(inside[key], chance)
    elif how == 8 and isinstance(inside, dict):
        name = chance.choice(("", "../x", "\ud800", key.upper(), f"{key} ", "x" * _LONG))
        inside[name] = inside.pop(key)
    else:
        other, place = chance.choice(places)
        # Never a list in itself.
        inside[key] = copy.deepcopy(other[place]) if _is_in(other, place) else None
    return found


def _other_path(document: Any, chance: random.Random) -> Any:
    """Return a copy of a JSON value with one text or one key in it replaced by a path."""
    found = copy.deepcopy(document)
    texts = [
        (inside, key)
        for inside, key in _places(found)
        if isinstance(inside[key], str) or isinstance(inside, dict)
    ]
    if not texts:
        return chance.choice(PATHS)
    inside, key = chance.choice(texts)
    if isinstance(inside[key], str):
        inside[key] = chance.choice(PATHS)
    else:
        inside[chance.choice(PATHS)] = inside.pop(key)
    return found


def damaged_bytes(content: bytes, edits: Sequence[Edit]) -> bytes:
    """Return bytes after edits that know nothing of what they mean."""
    for kind, seed in edits:
        content = _BYTES[kind](content, random.Random(seed))
    return content


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if _is_list(value) else ()
    found = []
    for key in keys:
        found.append((value, key))
        if depth < 12:
            found += _places(value[key], depth + 1)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_in(inside: Any, key: Any) -> bool:
    return key in inside if isinstance(inside, dict) else key < len(inside)


def _retyped(value: Any, chance: random.Random) -> Any:
    """Return nearly the same: a number as text, one off, negative, in a list; a list cut."""
    if isinstance(value, list) and value:
        at = chance.randrange(len(value))
        return chance.choice((value[:at], value + value, value[::-1], [value], value[at]))
    if isinstance(value, int | float):
        real = float(value) if abs(value) < 2**1000 else 1e300
        return chance.choice((str(value), value + 1, value - 1, -value, real, [value]))
    if isinstance(value, dict):
        return chance.choice((list(value.items()), [value], {"": value}, str(value)))
    return chance.choice(([value], {str(value): value}, f"{value}{value}", f" {value}"))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _flip(content: bytes, chance: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 8)) if found else 0):
        found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    return bytes(found)


def _inserted(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    what = (b"\x00", b"\xff\xfe", b'"', b"{", b"]", b",", b"1e999", b"-", b"\xed\xa0\x80", b"NaN")
    return content[:at] + chance.choice(what) + content[at:]


def _removed(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + content[at + chance.choice((1, 4, 8, 100)) :]


def _repeated(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    size = chance.choice((1, 8, 64, 1000))
    return content[: at + size] + content[at:]


def _whole(content: bytes, chance: random.Random) -> bytes:
    """Return another file: an empty one, one of zeros, of another coding, or nested too deep."""
    nested = b"[" * _DEEP + b"]" * _DEEP, b'{"a":' * _DEEP + b"1" + b"}" * _DEEP
    text = content.decode("utf-8", "replace")
    others = (text.encode("utf-16"), b"\xef\xbb\xbf" + content, content + content)
    plain = (b"", b"\x00" * 4096, b"null", b"[]", b"{}", b'"text"', b"1", b"\xff" * 64, b"\n")
    return chance.choice((*nested, *others, *plain))


_BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": _cut,
    "flip": _flip,
    "insert": _inserted,
    "remove": _removed,
    "repeat": _repeated,
    "whole": _whole,
}
BYTES = tuple(_BYTES)
