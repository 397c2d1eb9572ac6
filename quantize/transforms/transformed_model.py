"""A transformed copy of a checkpoint: the same function, but weights that round better.

    rotated    its residual stream is turned by random Hadamard transforms   see `rotation`
    sorted     neurons of similar sensitivity share a block of rows          see `permute`

The copy is on disk while it is used. A plan for it says in its header, under "rewritten", how the
copy was made, so that it can be made again from the original. The copy's `config.json` says it too;
it is part of its fingerprint.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.disk.atomic import beside as hidden
from bitknap.disk.atomic import check_space, folders_above, read_json, write_whole
from bitknap.disk.manifest import check_ours, remove
from bitknap.disk.outputs import check_only, drop
from bitknap.errors import FileError, MismatchError
from bitknap.quantization.source.checkpoint import REWRITTEN, Checkpoint
from bitknap.quantization.transforms.permute import Permutation, permuted
from bitknap.quantization.transforms.rewritten_checkpoint import Rewritten, write
from bitknap.quantization.transforms.rotation import turned

# The key under which tables and plans describe a transformed copy.
KEY = "rewritten"
_NAMES = r"(rotated|sorted)(\.json)?"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sorting:
    """Which block of rows each neuron goes to; within a block neurons keep their order.

    Attributes:
        blocks: number of blocks of each matrix.
        block: by layer number, the block of each neuron, uint8 [experts, neurons].
    """

    blocks: int
    block: Mapping[int, npt.NDArray[np.uint8]]

    @classmethod
    def by_score(cls, scores: Mapping[int, npt.ArrayLike], blocks: int) -> Sorting:
        """Return the sorting by decreasing score, into blocks as in `row_blocks.block_units`.

        Args:
            scores: by layer number, the score of each neuron, [experts, neurons].
            blocks: at most 256.
        """
        block_of = {}
        for layer, score in scores.items():
            values = np.asarray(score, dtype=np.float64)
            neurons = values.shape[1]
            count = min(blocks, neurons)
            sizes = np.full(count, neurons // count) + (np.arange(count) < neurons % count)
            order = np.argsort(-values, axis=1, kind="stable")
            number = np.empty(values.shape, dtype=np.uint8)
            places = np.broadcast_to(np.repeat(np.arange(count), sizes), values.shape)
            np.put_along_axis(number, order, places.astype(np.uint8), axis=1)
            block_of[layer] = number
        return cls(blocks=blocks, block=block_of)

    @property
    def permutation(self) -> Permutation:
        """The order of neurons."""
        order = {n: np.argsort(block, axis=1, kind="stable") for n, block in self.block.items()}
        return Permutation(order=order)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: the fewest bits per neuron that tell blocks apart, in base 64."""
        layers = {
            str(layer): [*block.shape, base64.b64encode(_packed(block, self.blocks)).decode()]
            for layer, block in sorted(self.block.items())
        }
        return {"blocks": self.blocks, "layers": layers}

    @classmethod
    def from_dict(cls, said: Any) -> Sorting:
        """Read what `to_dict` returned.

        Raises:
            FileError: the value has another form.
        """
        try:
            blocks = int(said["blocks"])
            block = {
                int(layer): _unpacked(base64.b64decode(text), int(experts), int(neurons), blocks)
                for layer, (experts, neurons, text) in said["layers"].items()
            }
        except (TypeError, ValueError, KeyError, AttributeError):
            raise FileError(f"{KEY}.order: damaged; make the plan again") from None
        return cls(blocks=blocks, block=block)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """How a transformed copy is made from its original.

    Attributes:
        rotation: seed of the signs; None does not rotate.
        order: how neurons are sorted, after rotating; None leaves them.
    """

    rotation: int | None = None
    order: Sorting | None = None

    def to_dict(self, origin: Checkpoint) -> dict[str, Any]:
        """Return the JSON values that a table holds."""
        order = None if self.order is None else self.order.to_dict()
        return {"of": origin.fingerprint, "rotation": self.rotation, "order": order}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Recipe:
        """Read what `to_dict` returned.

        Raises:
            FileError: the value has another form.
        """
        rotation, order = said.get("rotation"), said.get("order")
        if not (rotation is None or isinstance(rotation, int)):
            raise FileError(f"{KEY}.rotation: {rotation!r} is not a seed; make the plan again")
        return cls(rotation=rotation, order=None if order is None else Sorting.from_dict(order))


def recipe_of(header: Mapping[str, Any]) -> Recipe:
    """Return how a plan's transformed copy is made; for other plans, a recipe without changes.

    Raises:
        FileError: the plan does not say how its transformed copy is made.
    """
    said = header.get(KEY)
    return Recipe.from_dict(said) if isinstance(said, Mapping) else Recipe()


def beside(out: Path) -> Path:
    """Return the folder for the transformed copy of a run that writes `out`.

    Raises:
        InputError: something else is there.
    """
    folder = hidden(out, "twin")
    check_only(folder, _NAMES)
    return folder


def forget(out: Path) -> None:
    """Delete the transformed copy of a run that wrote `out`, if there is one."""
    drop(hidden(out, "twin"), _NAMES)


def make(origin: Checkpoint, recipe: Recipe, folder: Path) -> Checkpoint:
    """Return the transformed copy in a folder, written there unless an earlier run left it.

    Raises:
        ModelError: the model cannot be rotated or its neurons not sorted.
        InputError: the disk has no room for it, or something else is in its place.
    """
    checkpoint = origin
    if recipe.rotation is not None:
        checkpoint = _written(turned(checkpoint, recipe.rotation), checkpoint, folder / "rotated")
    if recipe.order is not None:
        checkpoint = _written(
            permuted(checkpoint, recipe.order.permutation), checkpoint, folder / "sorted"
        )
    return checkpoint


def planned(origin: Checkpoint, header: Mapping[str, Any], model: str, folder: Path) -> Checkpoint:
    """Return the checkpoint that a plan is for: the given one, or its transformed copy.

    Args:
        origin: the given one.
        header: header of the plan.
        model: fingerprint that the plan is for.
        folder: where the transformed copy is made, if one is needed.

    Raises:
        MismatchError: the plan is for a transformed copy of another model.
        FileError: the plan does not say how its transformed copy is made.
    """
    said = header.get(KEY)
    if said is None or model == origin.fingerprint:
        return origin
    if not isinstance(said, Mapping) or said.get("of") != origin.fingerprint:
        of = said.get("of") if isinstance(said, Mapping) else "unknown"
        raise MismatchError(
            f"the plan is for a rotated or sorted copy of model {of}, this one is "
            f"{origin.fingerprint}; give the model that the table was estimated on"
        )
    copy = make(origin, recipe_of(header), folder)
    if copy.fingerprint != model:
        raise MismatchError(
            f"the plan is for model {model}, but its {KEY} turns this model into "
            f"{copy.fingerprint}; make the plan again"
        )
    return copy


def _written(change: Rewritten, origin: Checkpoint, folder: Path) -> Checkpoint:
    """Write a changed checkpoint to a folder, unless one made from the same files is there."""
    mark = {"of": origin.fingerprint, "by": change.mark}
    stamp = {"mark": mark, "files": _stamps(origin)}
    note = folder.with_suffix(".json")
    with folders_above(folder):
        if not (note.is_file() and folder.is_dir() and read_json(note) == stamp):
            note.unlink(missing_ok=True)
            if folder.exists():
                check_ours(folder)
                remove(folder)
            check_space(folder, origin.nbytes)
            write(replace(change, config={**change.config, REWRITTEN: mark}), folder)
            write_whole(note, json.dumps(stamp, sort_keys=True).encode())
    return Checkpoint.open(folder)


def _stamps(source: Checkpoint) -> list[list[Any]]:
    files = sorted({info.file for info in source.stored(source.headers).values()})
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _packed(block: npt.NDArray[np.uint8], blocks: int) -> bytes:
    bits = max(1, (blocks - 1).bit_length())
    return np.packbits(np.unpackbits(block.reshape(-1, 1), axis=1)[:, -bits:]).tobytes()


def _unpacked(data: bytes, experts: int, neurons: int, blocks: int) -> npt.NDArray[np.uint8]:
    bits = max(1, (blocks - 1).bit_length())
    flat = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=experts * neurons * bits)
    wide = np.zeros((experts * neurons, 8), dtype=np.uint8)
    wide[:, -bits:] = flat.reshape(-1, bits)
    return np.packbits(wide, axis=1).reshape(experts, neurons)
