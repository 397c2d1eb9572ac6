"""A model that is packed in pieces into several files, and how small the pieces are."""

from functools import partial
from types import SimpleNamespace

import pytest

import bitknap
from bitknap.allocation import Format, formats
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.packed import pipeline, work_pieces
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks import grouping
from bitknap.testing import random_plan, tiny_model

FILES = bitknap.Packing(max_shard_size="40kB")
GRIDS = formats(range(1, 9), (8, 32, "row"), (False, True), ("fp16", "compact"))
PARTIAL = ".out.partial"


@pytest.fixture(scope="session")
def case(tmp_path_factory, contents):
    """A model in several files, a plan, and what an undisturbed run writes.

    All is read only; `save` packs the model once more, into a folder of the test.
    """
    root = tmp_path_factory.mktemp("streaming")
    model = tiny_model("mixtral", hidden_size=64, intermediate_size=48)
    model.save_pretrained(root / "model", max_shard_size="100KB")
    source = Checkpoint.open(root / "model")
    units = walk_headers(source.config, source.shapes, ()).units
    options = (*GRIDS, Format.keep("fp32"))
    plan = random_plan(units, options, model=source.fingerprint)
    plan.save(root / "plan.json")
    save = partial(bitknap.quantize, root / "model", plan, packing=FILES)
    save(root / "out")
    return SimpleNamespace(
        root=root,
        folder=root / "model",
        source=source,
        plan=plan,
        whole=contents(root / "out"),
        save=save,
    )


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few rows, and a journal line for each at once."""
    monkeypatch.setattr(grouping, "PIECE", 4096)
    monkeypatch.setattr(work_pieces, "PIECE", 4096)
    monkeypatch.setattr(work_pieces, "COPY", 4096)
    monkeypatch.setattr(work_pieces, "_CODES", 512)
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 1)
