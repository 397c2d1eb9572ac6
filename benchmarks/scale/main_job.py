"""The main job on a made-up checkpoint in a published model's shapes, within a limit of memory.

The checkpoint has matrices of unequal scales, so that routing is spread and layers matter. `bitknap
quantize` runs with the default estimator, is killed a few times on the way and started again, and
ends; then `bitknap evaluate --uniform` judges what it wrote, within the same memory.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitknap.api.inspection import inspect
from bitknap.benchmarks.models.random_checkpoint import generate
from bitknap.benchmarks.models.shapes import ModelShape
from bitknap.benchmarks.watched import killed_after, watched
from bitknap.errors import BitknapError
from bitknap.quantization.source.checkpoint import resolve

# A tokenizer of few tokens serves any larger vocabulary.
_TOKENIZER = "reference:mixtral"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run of the main job.

    Attributes:
        shape: name or sizes of the model.
        layers: number of layers; all when not given.
        budget: the budget of its plan.
        max_memory: the limit, such as "6GiB".
        tokens: number of calibration tokens; the default when not given.
        judged: number of tokens that the result is judged on.
        kills: seconds after which each of the first runs is killed, at most; drawn below that.
        seed: random seed of the weights and of the kills.
        options: further words for `bitknap quantize`.
    """

    shape: str | ModelShape
    layers: int | None = None
    budget: str = "3bpw"
    max_memory: str = "6GiB"
    tokens: int | None = None
    judged: int = 2048
    kills: Sequence[float] = ()
    seed: int = 0
    options: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.shape if isinstance(self.shape, str) else self.shape.name


def source_of(job: Job, folder: Path) -> Path:
    """Return the checkpoint of a job in a folder, made unless an earlier run left it there."""
    source = folder / "source"
    if not (source / "tokenizer.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        generate(job.shape, source, job.layers, job.seed, unequal=True)
        for file in resolve(_TOKENIZER).glob("tokenizer*.json"):
            shutil.copy(file, source / file.name)
    return source


def quantized(job: Job, source: Path, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run `bitknap quantize` to its end, killed on the way, as JSON values.

    Returns:
        The "words" of the command; the "runs", each with "seconds", "peak_bytes" and whether it was
        "killed"; and the "digest" of all files that it wrote.

    Raises:
        BitknapError: the command failed.
    """
    words = ["quantize", str(source), "--budget", job.budget, "--max-memory", job.max_memory]
    words += ["-o", str(out), *job.options]
    if job.tokens is not None:
        words += ["--tokens", str(job.tokens)]
    runs: list[dict[str, Any]] = []
    draw = random.Random(job.seed)
    for most in job.kills:
        killed = killed_after(words, draw.uniform(0, most))
        if killed is None:
            raise BitknapError("bitknap quantize: ended before it was killed; kill it earlier")
        runs.append({**killed, "killed": True})
        say(f"killed after {killed['seconds']:.0f} s")
    runs.append({**watched(words), "killed": False})
    said = [word if word not in (str(source), str(out)) else Path(word).name for word in words]
    return {"words": said, "runs": runs, "digest": digest(out)}


def judged(job: Job, source: Path, out: Path) -> dict[str, Any]:
    """Run `bitknap evaluate --uniform` within the same memory, as JSON values."""
    words = ["evaluate", str(out), "--reference", str(source), "--uniform"]
    words += ["--tokens", str(job.judged), "--max-memory", job.max_memory, "--json"]
    return watched(words)


def forecast(source: Path) -> list[dict[str, Any]]:
    """Return what `bitknap inspect` says that each step takes."""
    steps: list[dict[str, Any]] = inspect(str(source))["steps"]
    return steps


def digest(folder: Path) -> str:
    """Return 32 hex digits that name the files of a folder and what is in them."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            whole.update(json.dumps(str(path.relative_to(folder))).encode())
            for chunk in _chunks(path):
                whole.update(chunk)
    return whole.hexdigest()[:32]


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            yield chunk
