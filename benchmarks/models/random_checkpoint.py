"""Checkpoints of random weights in the shapes and sizes of published models.

python -m bitknap.benchmarks.models.random_checkpoint OLMoE-1B-7B build/olmoe
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bitknap.benchmarks.models.shapes import ModelShape, Shape, config, headers, shape_of, shapes
from bitknap.errors import InputError

_SHARD = 4 << 30
# Typical of trained weights of this size; norms are ones.
_SPREAD = 0.02
# Standard deviation of the logarithm of a matrix's scale, where scales are unequal.
_UNEQUAL = 0.5


def generate(
    model: str | ModelShape,
    folder: Path,
    layers: int | None = None,
    seed: int = 0,
    shard: int = _SHARD,
    *,
    unequal: bool = False,
) -> Path:
    """Write a checkpoint of random bf16 weights in a model's shapes, one tensor in memory at once.

    Args:
        model: name or sizes of the model.
        folder: folder to write; it must not exist.
        layers: number of decoder layers to keep; all when not given.
        seed: random seed of the weights.
        shard: maximum bytes of tensors per file, except for a single larger tensor.
        unequal: give each matrix a scale of its own, about that at which its output is as large as
            its input: then tokens are spread over the experts, and layers and experts matter
            unequally, as they do in trained models.

    Raises:
        InputError: there is no such model, or the folder exists.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; choose another folder")
    shape = shape_of(model) if isinstance(model, str) else model
    tensors = {n: size for n, (_, size) in headers(shape, layers).items()}
    parts = _parts(tensors, shard)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(shape, layers), indent=1) + "\n")
    generator = torch.Generator().manual_seed(seed)

    def random(size: Shape) -> Tensor:
        weight = torch.empty(size, dtype=torch.bfloat16)
        if len(size) < 2:
            return weight.fill_(1)
        if not unequal:
            return weight.normal_(0, _SPREAD, generator=generator)
        scales = torch.randn((*size[:-2], 1, 1), generator=generator)
        weight.normal_(0, size[-1] ** -0.5, generator=generator)
        return weight.mul_(scales.mul_(_UNEQUAL).exp_())

    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        where |= dict.fromkeys(part, file)
        with (folder / file).open("wb") as out:
            out.write(_header({name: tensors[name] for name in part}))
            for name in part:
                out.write(random(tensors[name]).view(torch.uint8).numpy().data)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    return folder


def without_weights(model: str, folder: Path) -> Path:
    """Write a checkpoint of a model's headers, whose weights are a hole in one sparse file.

    Args:
        model: name of the model.
        folder: folder to write; it must not exist.

    Raises:
        InputError: there is no such model.
        FileExistsError: the folder exists.
    """
    shape = shape_of(model)
    tensors = {name: size for name, (_, size) in headers(shape).items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1) + "\n")
    header = _header(tensors)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(header)
        out.truncate(len(header) + 2 * sum(map(math.prod, tensors.values())))
    return folder


def _header(tensors: Mapping[str, Shape]) -> bytes:
    entries, at = {}, 0
    for name, size in tensors.items():
        stop = at + 2 * math.prod(size)
        entries[name] = {"dtype": "BF16", "shape": size, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _parts(tensors: Mapping[str, Shape], shard: int) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in tensors.items():
        nbytes = 2 * math.prod(size)
        if parts[-1] and filled + nbytes > shard:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += nbytes
    return parts


def main() -> None:
    """Write a made-up checkpoint."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint in a model's shapes.")
    parser.add_argument("name", help=", ".join(shape.name for shape in shapes()))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unequal", action="store_true", help="matrices of unequal scales")
    given = parser.parse_args()
    generate(given.name, given.folder, given.layers, given.seed, unequal=given.unequal)


if __name__ == "__main__":
    main()
