"""Dense profiling against measurements taken by hand, and its journal."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitknap.allocation import Format
from bitknap.errors import FileError, InputError, MismatchError
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.evidence.super_experts import super_experts
from bitknap.estimators.evidence.variant_kl import square_changes
from bitknap.estimators.measuring.kl_replay import Replay
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.rounding.methods import round_trip
from bitknap.quantization.stacks.apply import replaced
from bitknap.quantization.stacks.grouping import stacks
from bitknap.testing import tiny_model
from bitknap.testing.evidence import UNSEEN, lopsided_case, random_windows

# Rows of 16 and 24 weights: the third format stores gate and up as the second does, not down.
FORMATS = (Format(2, 8), Format(3, 0), Format(3, 16), Format.keep("fp32"))
KINDS = (
    Measured(),
    Measured(kind="layer"),
    Measured(kind="layer", squared=True),
    Measured(kind="block"),
    Measured(kind="block", squared=True),
)


@pytest.fixture(scope="module")
def case():
    return lopsided_case(Recorded(traces=True))


def rounding(format):
    return lambda weights: round_trip(weights, format)


def same(one, other):
    return (
        np.array_equal(one.cost, other.cost)
        and np.array_equal(one.nbytes, other.nbytes)
        and dict(one.provenance) == dict(other.provenance)
    )


@pytest.mark.slow
@pytest.mark.parametrize("measured", KINDS, ids=repr)
def test_costs_are_sound(measured, case):
    table = measured.estimate(case.evidence, FORMATS)
    assert np.isfinite(table.cost).all()
    assert (table.cost[:, :3] > 0).all()
    assert not table.cost[:, 3].any()
    units = case.layout.units
    hit = (table.frequency > 0).sum() // 3 if measured.kind == "block" else table.frequency > 0
    # Gate and up: two formats that store differently; down: three. Blocks: three.
    down = units.projection == units.projections.index("down")
    count = 3 * hit if measured.kind == "block" else int((hit * np.where(down, 3, 2)).sum())
    assert table.provenance["measurements"] == count
    assert table.provenance["filled"] == 3 * int((table.frequency == 0).sum())
    ranks = measured.kind != "kl" and not measured.squared
    assert table.provenance["unit"] == ("score" if ranks else "nats/token")
    assert table.provenance["estimator"] == f"measured-{measured.kind}" == measured.name
    assert table.provenance["super_experts"] == []
    if measured.kind != "block":
        assert np.array_equal(table.cost[~down, 1], table.cost[~down, 2])
    assert case.evidence.replay.kl() == 0


def test_kl_is_that_of_the_model_with_one_unit_rounded(case):
    table = Measured().estimate(case.evidence, FORMATS)
    assert table.frequency is not None
    replay = Replay(case.model, case.layout, case.windows, cache=False)
    for unit in range(0, len(case.layout.units), 4):
        for column, format in enumerate(FORMATS[:3]):
            if table.frequency[unit] > 0:
                with replaced(case.model, case.layout, [unit], rounding(format)):
                    expected = replay.kl()
                assert table.cost[unit, column] == pytest.approx(expected, rel=1e-3, abs=1e-8)


def test_layer_is_the_norm_of_the_decoder_layers_change(case):
    table = Measured(kind="layer").estimate(case.evidence, FORMATS)
    assert table.frequency is not None
    squared = Measured(kind="layer", squared=True).estimate(case.evidence, FORMATS)
    units = case.layout.units
    outputs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(case.model.model.layers):
        layer.register_forward_hook(
            lambda module, args, output, number=number: outputs.__setitem__(number, output)
        )

    def run():
        with torch.no_grad():
            case.model(input_ids=case.windows[:, :-1], use_cache=False)
        return dict(outputs)

    before = run()
    for unit in np.flatnonzero(table.frequency > 0)[::3]:
        layer = int(units.layer[unit])
        with replaced(case.model, case.layout, [unit], rounding(FORMATS[0])):
            change = (run()[layer] - before[layer]).double()
        assert table.cost[unit, 0] == pytest.approx(float(change.norm()), rel=1e-3)
        # methods.md#conversions: the norm squared / (2T) × c_l, where the gain is c_l / 2.
        nats = case.evidence.layers[layer].gain * float(change.square().sum()) / (6 * 15)
        assert squared.cost[unit, 0] == pytest.approx(nats, rel=1e-3)
    for layer in case.model.model.layers:
        layer._forward_hooks.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "added"), [("gpt_oss", True), ("deepseek_v4", False)])
def test_a_trace_gives_the_same_where_the_layer_adds_what_its_experts_return(
    family, added, monkeypatch
):
    model = tiny_model(family)
    layout = walk(model)
    recorded = Recorded(traces=True)
    evidence = calibrate(model, layout, random_windows(), recorded)
    alone, measured = [], square_changes

    def counted(evidence, variants):
        alone.extend(variants)
        return measured(evidence, variants)

    monkeypatch.setattr("bitknap.estimators.costs.dense_profiling.square_changes", counted)
    by_trace = Measured(kind="layer").estimate(evidence, FORMATS[:2])
    layers = len(np.unique(layout.units.layer))
    assert (len(alone) == layers) == added
    one_by_one = Measured(kind="layer").estimate(replace(evidence, traces={}), FORMATS[:2])
    np.testing.assert_allclose(by_trace.cost, one_by_one.cost, rtol=1e-5)


def test_block_is_the_sum_of_norms_over_windows(case):
    table = Measured(kind="block").estimate(case.evidence, FORMATS)
    squared = Measured(kind="block", squared=True).estimate(case.evidence, FORMATS)
    units = case.layout.units
    for layer in case.layout.layers:
        trace = case.evidence.traces[layer.layer]
        experts = case.model.get_submodule(layer.module)
        call = (trace.hidden, trace.index, trace.weights)
        with torch.no_grad():
            before = experts(*call)
            for expert in range(4):
                its = np.flatnonzero((units.layer == layer.layer) & (units.expert == expert))
                with contextlib.ExitStack() as stack:
                    for unit in its.tolist():
                        change = rounding(FORMATS[0])
                        stack.enter_context(replaced(case.model, case.layout, [unit], change))
                    change = (experts(*call) - before).double().view(6, 15, -1)
                norms = change.square().sum((1, 2)).sqrt()
                assert table.cost[its, 0].sum() == pytest.approx(float(norms.sum()), rel=1e-3)
                np.testing.assert_allclose(table.cost[its, 0], table.cost[its, 0].mean())
                nats = case.evidence.layers[layer.layer].gain * norms.square().sum() / (6 * 15)
                assert squared.cost[its, 0].sum() == pytest.approx(float(nats), rel=1e-3)
    assert table.provenance["of"] == "whole experts"


def test_an_unseen_expert_costs_what_the_cheapest_does(case):
    table = Measured().estimate(case.evidence, FORMATS)
    units = case.layout.units
    for run in stacks(units):
        unseen = units.expert[run] == UNSEEN
        assert np.array_equal(table.cost[run][unseen][0], table.cost[run][~unseen].min(0))


@pytest.mark.parametrize("measured", KINDS[:2], ids=repr)
def test_where_nothing_was_measured_the_moments_answer(measured, case, monkeypatch):
    target = "bitknap.estimators.measuring.kl_replay.Replay.kl"
    if measured.kind == "layer":
        target = "bitknap.estimators.measuring.layer_output.LayerOutput.square_change"
    monkeypatch.setattr(target, lambda *args: 0.0)
    table = measured.estimate(case.evidence, FORMATS[:1])
    expected = SecondMoments().estimate(case.evidence, FORMATS[:1]).cost
    if measured.kind == "layer":
        gains = {n: layer.gain / 90 for n, layer in case.evidence.layers.items()}
        scale = np.array([gains[n] for n in case.layout.units.layer.tolist()])
        expected = np.sqrt(expected / scale[:, None])
    np.testing.assert_allclose(table.cost, expected)
    assert table.provenance["filled"] == len(table.units)


class Killed(Exception):
    pass


def killed_after(parts):
    def progress(what, done, of):
        if done == parts:
            raise Killed

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("measured", [KINDS[0], KINDS[4]], ids=repr)
def test_a_killed_run_continues_to_the_same_table(measured, case, tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = measured.estimate(case.evidence, FORMATS)
    for parts in (1, 4, 5):
        with pytest.raises(Killed):
            replace(measured, journal=path, progress=killed_after(parts)).estimate(
                case.evidence, FORMATS
            )
        assert len(path.read_text().splitlines()) == 1 + parts
        with path.open("a") as file:  # as if killed while writing
            file.write('{"key": "5 int2-g8-asym", "val')
    said = []
    last = replace(measured, journal=path, progress=lambda *args: said.append(args))
    assert same(last.estimate(case.evidence, FORMATS), whole)
    # 2 layers × 3 formats; or 4 experts that tokens reach × 2 layers × (2 + 2 + 3).
    count = 6 if measured.kind == "block" else 56
    assert whole.provenance["measurements"] == (24 if measured.kind == "block" else 56)
    assert said == [("measure units", i + 1, count) for i in range(count)]
    content = path.read_bytes()
    assert len(content.splitlines()) == 1 + count
    assert same(last.estimate(case.evidence, FORMATS), whole)
    assert path.read_bytes() == content


def test_a_full_journal_is_not_measured_again(case, tmp_path, monkeypatch):
    measured = Measured(journal=tmp_path / "journal.jsonl")
    table = measured.estimate(case.evidence, FORMATS)

    def never(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr("bitknap.estimators.measuring.kl_replay.Replay.kl", never)
    assert same(measured.estimate(case.evidence, FORMATS), table)


def test_a_journal_of_other_inputs_is_refused(case, tmp_path):
    path = tmp_path / "journal.jsonl"
    Measured(journal=path).estimate(case.evidence, FORMATS[:1])
    content = path.read_bytes()

    def refused(match, measured, evidence, formats):
        with pytest.raises(MismatchError, match=match) as error:
            measured.estimate(evidence, formats)
        assert "\n" not in str(error.value)
        assert path.read_bytes() == content

    refused("to another formats; give", Measured(journal=path), case.evidence, FORMATS)
    other = Measured(kind="layer", squared=True, journal=path)
    refused("to another kind, squared; give", other, case.evidence, FORMATS[:1])
    model = tiny_model("mixtral", num_local_experts=5, num_experts=5, seed=1)
    evidence = calibrate(model, walk(model), case.windows + 1 - case.windows // 63)
    refused("to another model, text; give", Measured(journal=path), evidence, FORMATS[:1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a journal; choose another file"),
        (b"some notes\n", "not a journal; choose another file"),
        (b"[1, 2]\n", "not a journal; choose another file"),
        (b'{"format": "bitknap.plan", "version": "1.0"}\n', "is not 'bitknap.journal'"),
        (b'{"format": "bitknap.journal", "version": "2.0"}\n', "2.0 cannot be read"),
    ],
)
def test_files_that_are_no_journal_are_kept(case, tmp_path, content, message):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        Measured(journal=path).estimate(case.evidence, FORMATS[:1])
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"nonsense",
        b'{"key": "KEY", "values": [1, 2]}',
        b'{"key": "a", "values": [1' + b"0" * 400 + b"]}",
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_named(case, tmp_path, line):
    path = tmp_path / "journal.jsonl"
    Measured(journal=path).estimate(case.evidence, FORMATS[:1])
    lines = path.read_bytes().splitlines()
    line = line.replace(b"KEY", json.loads(lines[2])["key"].encode())
    path.write_bytes(b"\n".join([lines[0], lines[1], line, *lines[3:]]) + b"\n")
    with pytest.raises(FileError, match="line 3 is damaged"):
        Measured(journal=path).estimate(case.evidence, FORMATS[:1])


def test_a_super_expert_is_seen_in_outputs_and_in_tables():
    model = tiny_model("mixtral", num_local_experts=8, num_experts=8)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] *= 60
    layout = walk(model)
    windows = random_windows(6)
    evidence = calibrate(model, layout, windows, Recorded(traces=True))
    assert [(layer, expert) for layer, expert, _ in super_experts(evidence)] == [(1, 3)]
    for measured in (Measured(kind="layer"), Measured(kind="block", squared=True)):
        table = measured.estimate(evidence, FORMATS[::3])
        ((layer, expert, ratio),) = super_experts(table)
        assert (layer, expert) == (1, 3)
        assert 10 < ratio < 600
        assert table.provenance["super_experts"] == [[1, 3, ratio]]
        assert super_experts(table, times=600) == []


def test_what_cannot_be_measured_is_said(case):
    bare = calibrate(case.model, case.layout, case.windows[:1])
    with pytest.raises(InputError, match="traces=True"):
        Measured(kind="block").estimate(bare, FORMATS)
    offline = replace(case.evidence, replay=None)
    with pytest.raises(InputError, match="live model"):
        Measured().estimate(offline, FORMATS)
    with pytest.raises(InputError, match="'mse' is unknown; one of kl, layer, block"):
        Measured(kind="mse")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a KL is not a norm"):
        Measured(squared=True)


def test_other_roles_have_a_kl():
    model = tiny_model("qwen2_moe")
    layout = walk(model, ("attention", "shared"))
    windows = random_windows(2)
    evidence = calibrate(model, layout, windows)
    assert (Measured().estimate(evidence, FORMATS[:1]).cost > 0).all()
    with pytest.raises(InputError, match=r"layer: layer=0 .* does not belong to a routed expert"):
        Measured(kind="layer").estimate(evidence, FORMATS[:1])
