"""A model of which one decoder layer is loaded: what is read, and what is read ahead."""

import os
from pathlib import Path

import pytest
import torch

import bitknap
from bitknap.allocation import BitPlan, Format
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.quantization.packed.opened import open_packed
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.devices import Computing
from bitknap.testing import tiny_model


@pytest.fixture
def asked(monkeypatch):
    """What the system was told to read: (file, first byte, number of bytes)."""
    told = []

    def advise(descriptor, start, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        told.append((Path(f"/proc/self/fd/{descriptor}").readlink(), start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    return told


def in_layer(source, place):
    return {
        (info.file.resolve(), info.start, info.stop - info.start)
        for name, info in source.headers.items()
        if f".layers.{place}." in name
    }


def test_the_next_layer_is_read_ahead_in_both_directions(tmp_path, asked):
    tiny_model("mixtral", num_hidden_layers=3).save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    skeleton = Skeleton(source)
    for place, ahead in ((0, 1), (1, 2), (2, None), (1, 0)):
        asked.clear()
        with skeleton.loaded(place):
            pass
        assert set(asked) == (set() if ahead is None else in_layer(source, ahead))


@pytest.mark.parametrize("host", [None, 0])
def test_layers_wait_in_memory_if_they_fit(host, tmp_path, asked, monkeypatch):
    tiny_model("mixtral", num_hidden_layers=3).bfloat16().save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    # The CPU under another name is a device of its own.
    where = Computing(device=torch.device("cpu", 0), host=host)
    skeleton, plain, expected = Skeleton(source, where=where), Skeleton(source), []
    for place in range(3):
        with plain.loaded(place):
            expected.append(plain.layers[place].state_dict())
    read: list[object] = []
    for name in ("read", "read_matrix"):
        real = getattr(Checkpoint, name)

        def counted(self, what, real=real):
            read.append(what)
            return real(self, what)

        monkeypatch.setattr(Checkpoint, name, counted)

    def load(*places):
        for place in places:
            with skeleton.loaded(place):
                torch.testing.assert_close(
                    skeleton.layers[place].state_dict(), expected[place], rtol=0, atol=0
                )
        return len(read)

    once = load(0, 1, 2)
    asked.clear()
    again = load(1, 0)
    assert again == (once if host is None else once * 5 // 3)
    assert bool(asked) == (host == 0)  # the system need not read what waits in memory


def test_streams_of_a_packed_checkpoint_are_read_ahead(tmp_path, asked):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    table = bitknap.estimate(tmp_path / "model", bitknap.DataFree(), [Format.parse("int4-g8-sym")])
    plan = BitPlan.uniform(table.units, table.formats[0], str(table.provenance["model"]))
    bitknap.quantize(tmp_path / "model", plan, tmp_path / "out")
    source = open_packed(tmp_path / "out")
    skeleton = Skeleton(source)
    with skeleton.loaded(0):
        pass
    streams = {
        (info.file.resolve(), info.start, info.stop - info.start)
        for name, info in source.checkpoint.headers.items()
        if name.startswith("bitknap.1.")
    }
    assert streams
    assert streams <= set(asked)


def test_where_nothing_can_be_read_ahead_nothing_happens(tmp_path, monkeypatch):
    tiny_model("mixtral").save_pretrained(tmp_path)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with Skeleton(Checkpoint.open(tmp_path)).loaded(0):
        pass
