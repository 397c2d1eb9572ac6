"""Variants measured layer by layer: the same losses as in memory, and none measured twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bitknap.allocation import formats
from bitknap.errors import InputError
from bitknap.estimators.evidence.variant_kl import kl_of
from bitknap.estimators.evidence.variants import Variant
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.group_kl.text_part import on_part
from bitknap.estimators.measuring import kl_replay
from bitknap.estimators.measuring import windows as windows_module
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.sweep import in_memory, layer_by_layer, variant_streams
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.estimators.sweep.variant_streams import VariantStreams
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.runtime import loading
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.stacks.grouping import stacks
from bitknap.testing import tiny_model

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "qwen3_next", "longcat_flash")
OPTIONS = formats((2, 3, 4), (16,), (False,), ("fp16",))


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    for module in (in_memory, layer_by_layer, kl_replay):
        monkeypatch.setattr(module, "BATCH_TOKENS", 70)
    monkeypatch.setattr(variant_streams, "TOGETHER", 3)


def stored(folder, family="mixtral", **changes):
    tiny_model(family, **changes).save_pretrained(folder)
    return Checkpoint.open(folder)


def windows():
    return torch.randint(3, 60, (5, 33), generator=torch.Generator().manual_seed(1))


def in_one_piece(source, include=()):
    model = loading.load(source.folder, torch.float32)
    return calibrate(model, walk(model, include), windows(), Recorded(full=True))


def by_layer(source, include=(), **more):
    recorded = Recorded(full=True, streams=True)
    return calibrate_by_layer(Skeleton(source, include), windows(), recorded, **more)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_table_in_both_ways(family, tmp_path):
    source = stored(tmp_path, family)
    ways = [
        calibrator.estimate(evidence, OPTIONS)
        for calibrator, evidence in (
            (Calibrated(check=3), in_one_piece(source, ("attention",))),
            (Calibrated(check=3), by_layer(source, ("attention",))),
        )
    ]
    np.testing.assert_allclose(ways[1].cost, ways[0].cost, rtol=1e-3)
    assert ways[1].provenance["measurements"] == ways[0].provenance["measurements"]
    told, known = (way.provenance["check"] for way in ways)
    assert told["plans"] == known["plans"] == 3
    assert told["slope"] == pytest.approx(known["slope"], rel=1e-2)


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])]
)
def test_a_part_of_the_text_says_the_same_in_both_ways(family, tmp_path, monkeypatch):
    monkeypatch.setattr(windows_module, "_SHORTEST", 16)
    source = stored(tmp_path, family)
    ways = [on_part(evidence, 64) for evidence in (in_one_piece(source), by_layer(source))]
    part = windows()[[0, 1, 3, 4], :16]
    assert ways[0].replay is not None
    assert ways[1].sweep is not None
    assert torch.equal(ways[0].replay.windows, part)
    assert torch.equal(ways[1].sweep.text_windows.ids, part)
    assert ways[0].mark == ways[1].mark != in_one_piece(source).mark
    units = ways[0].units
    variants = [Variant.group(run, OPTIONS[0]) for run in stacks(units)[::2]]
    exact, read = (dict(kl_of(way, variants)) for way in ways)
    for number, kl in exact.items():
        assert read[number] == pytest.approx(kl, rel=1e-3, abs=1e-9)


def test_variants_of_every_kind(tmp_path):
    source = stored(tmp_path)
    one, other = in_one_piece(source), by_layer(source)
    last = np.flatnonzero(one.units.layer == one.units.layer.max())
    variants = [
        Variant.group(last, OPTIONS[0]),
        Variant.group(np.array([1]), OPTIONS[1]),
        Variant(
            units=np.array([0, 3, last[0]]),
            choice=np.array([0, 1, 2]),
            formats=OPTIONS,
            key="three",
        ),
        Variant.group(np.arange(len(one.units)), OPTIONS[0]),
    ]
    exact = dict(kl_of(one, variants))
    read = dict(kl_of(other, variants))
    assert exact.keys() == read.keys() == set(range(len(variants)))
    for number, kl in exact.items():
        assert kl > 0
        assert read[number] == pytest.approx(kl, rel=1e-4, abs=1e-9)


@pytest.mark.slow
def test_what_the_journal_has_is_not_measured_again(tmp_path, monkeypatch):
    source = stored(tmp_path / "model")
    whole = Calibrated().estimate(by_layer(source), OPTIONS)
    real = VariantStreams._together
    together: list[int] = []

    def measured(self, variants, *others):
        if len(together) == 2:
            raise KeyboardInterrupt
        together.append(len(variants))
        return real(self, variants, *others)

    def table():
        readings = Readings.open(tmp_path / "journal", {"model": "this one"})
        evidence = replace(by_layer(source, readings=readings), readings=readings)
        return Calibrated().estimate(evidence, OPTIONS)

    with monkeypatch.context() as patched:
        patched.setattr(VariantStreams, "_together", measured)
        left = whole.provenance["measurements"]
        while left > 6:
            together.clear()
            with pytest.raises(KeyboardInterrupt):
                table()
            assert together == [3, 3]
            left -= 6
        together.clear()
        np.testing.assert_array_equal(table().cost, whole.cost)
    assert sum(together) == left


def test_without_streams_nothing_is_measured(tmp_path):
    evidence = calibrate_by_layer(Skeleton(stored(tmp_path)), windows())
    with pytest.raises(InputError, match="needs the live model"):
        Calibrated().estimate(evidence, OPTIONS)
