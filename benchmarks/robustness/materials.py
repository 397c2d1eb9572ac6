"""A tiny model with all that is made from it: the sound files that a campaign damages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from bitknap.benchmarks.robustness.forked import command, fork
from bitknap.errors import BitknapError

# What keeps a command short: few formats, few tokens.
FAST = ("--formats", "2,4", "--group-size", "8,row", "--metadata", "compact", "--tokens", "128")
_TEXT = ("--text", "text.txt")
_CHARACTERS = 12_000
# A step after which such a command is stopped: its journal and its files of finished layers stay.
BY_LAYER = (
    *("estimate", "model", "--estimator", "moments", *FAST, *_TEXT, "--max-memory", "5600kB"),
    *("-o", "layered.safetensors"),
)
COMPARED = "out.compared"
# Where a comparison is until it is finished.
COMPARING = f".{COMPARED}.partial"
COMPARE = (
    *("compare", "model", "--budgets", "4", "--formats", "2,4", "--group-size", "8,row", *_TEXT),
    *("--tokens", "128", "--refine", "2", "--refine-tokens", "256", "--evaluation-tokens", "128"),
    *("--strategies", "uniform,fisher-output:knapsack", "-o", COMPARED),
)
_LIMITS = {
    "format": "bitknap.limits",
    "version": "1.0",
    "limits": [
        {"kind": "bits_per_layer", "at_most": 6.0, "name": "layers"},
        {"kind": "count_at_least", "count": 1, "bits": 2, "pattern": "layer=0", "name": "wide"},
        {"kind": "device_bytes", "ranks": 2, "balance": 1.5, "name": "devices"},
        {"kind": "share_at_most", "share": 0.9, "bits": 2, "pattern": "proj=down", "name": "few"},
        {"kind": "bytes_per_token", "at_most": "1GiB", "name": "read"},
        {"kind": "matrix", "name": "own", "file": "matrix.npy", "at_most": 1e9},
    ],
}


def materials(root: Path) -> Path:
    """Write the files below `root` and return it.

    Raises:
        BitknapError: a command that makes one of them fails.
    """
    root.mkdir(parents=True, exist_ok=True)
    _done(lambda: _model(root), root)
    shutil.copytree(root / "packed-from", root / "model")
    shutil.rmtree(root / "packed-from")
    for words in _commands():
        _done(command(*words), root)
    _done(lambda: _limits(root), root)
    for stopped in (_journal, _finished_layers, _partial):
        _done(stopped, root)
    for made in ("out.safetensors", "layered.safetensors", "out"):
        assert not (root / made).exists()
    return root


def stopped_comparison(root: Path) -> None:
    """Add what a killed comparison leaves to the files below `root`, unless it is there.

    Raises:
        BitknapError: the comparison fails.
    """
    if not (root / COMPARING).exists():
        _done(_compared, root)


def _commands() -> list[tuple[str, ...]]:
    text = _TEXT
    study, database = ("--storage", "journal:study.log"), ("--storage", "sqlite:///study.db")
    made = ("--table", "table.safetensors", "--budget", "4bpw")
    measured = ("--model", "model", "--trials", "2", "--tokens", "128", *text)
    return [
        ("estimate", "model", "--estimator", "moments", *FAST, *text, "-o", "table.safetensors"),
        ("solve", "table.safetensors", "--budget", "4bpw", "-o", "plan.json"),
        ("solve", "table.safetensors", "--budget", "3.5bpw", "-o", "other.json"),
        ("solve", "table.safetensors", "--frontier", "-o", "frontier.json"),
        ("quantize", "model", "--plan", "plan.json", "-o", "packed"),
        (
            *("quantize", "model", "--plan", "plan.json", "--max-shard-size", "300KB"),
            *("-o", "packed-shards"),
        ),
        (
            *("estimate", "model", "--estimator", "fuzzy", "--samples", "samples.safetensors"),
            *("--measurements", "20", *FAST, *text, "-o", "fuzzy.safetensors"),
        ),
        *(("study", "create", "s", *where, *made) for where in (study, database)),
        *(("study", "run", "s", *where, *measured) for where in (study, database)),
    ]


def _model(root: Path) -> None:
    """Save a tiny model with the tokenizer and some of the text of the bundled ones."""
    import torch

    from bitknap.estimators.measuring.text import BUILTIN, read_text
    from bitknap.testing import tiny_model

    torch.set_num_threads(1)
    model = tiny_model("mixtral", vocab_size=4096)
    model.save_pretrained(root / "packed-from")
    model.save_pretrained(root / "sharded", max_shard_size="300KB")
    bundled = Path(str(files("bitknap.benchmarks.reference"))) / "mixtral"
    for file in bundled.glob("tokenizer*.json"):
        for folder in ("packed-from", "sharded"):
            shutil.copy(file, root / folder / file.name)
    (root / "text.txt").write_text(
        read_text(BUILTIN, "calibration")[:_CHARACTERS], encoding="utf-8"
    )


def _limits(root: Path) -> None:
    """Write a file of limits and the array that one of them reads."""
    import numpy as np

    from bitknap.allocation import CostTable

    table = CostTable.load(root / "table.safetensors")
    np.save(root / "matrix.npy", np.ones(table.cost.shape))
    (root / "limits.json").write_text(json.dumps(_LIMITS, indent=1))


def _journal() -> None:
    """Leave the journal of a run that was killed before it wrote its table."""
    from bitknap.allocation import CostTable

    CostTable.save = _killed  # type: ignore[method-assign]
    command(
        *("estimate", "model", "--estimator", "measured-kl", *FAST, "--text", "text.txt"),
        *("-o", "out.safetensors"),
    )()


def _finished_layers() -> None:
    """Leave the journal and the layers of a run by layer that was killed before its table."""
    from bitknap.allocation import CostTable

    CostTable.save = _killed  # type: ignore[method-assign]
    command(*BY_LAYER)()


def _compared() -> None:
    """Leave what a comparison keeps for the next run when it is killed before its page."""
    from bitknap.benchmarks.compare import output

    output.write = _killed  # type: ignore[assignment]
    command(*COMPARE)()


def _partial() -> None:
    """Leave the hidden folder of a run that was killed before the rename."""
    _dying_at_the_rename()
    command("quantize", "model", "--plan", "plan.json", "-o", "out")()


def _dying_at_the_rename() -> None:
    """End this process where it would rename a folder."""

    def watched(real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: str | Path, *others: Any, **named: Any) -> None:
            if Path(source).is_dir():
                _killed()
            real(source, *others, **named)

        return rename

    for name in ("rename", "replace"):
        setattr(os, name, watched(getattr(os, name)))


def _killed(*arguments: object, **named: object) -> None:
    os._exit(0)


def _done(action: Callable[[], None], root: Path) -> None:
    ended = fork(action, folder=root)
    if ended.status != 0:
        said = ended.err.strip().splitlines()[-1:] or [f"status {ended.status}"]
        raise BitknapError(f"{root}: the materials cannot be made ({said[0]})")
