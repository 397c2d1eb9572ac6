"""The closed loop on a live model: prefixes from memory, the gate, resuming, bad input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bitknap
from bitknap.allocation import BitPlan, Budget, Problem, formats, profile
from bitknap.allocation.solvers.solving import within
from bitknap.allocation.tradeoffs.profile_price import under
from bitknap.api.calibration import gather
from bitknap.api.plan_measures import losses_of, measures
from bitknap.api.refining import GATE_TOKENS, loop_windows, open_loop, refine, run_loop
from bitknap.api.requests import Calibration, Refinement
from bitknap.cli import main
from bitknap.errors import InputError, MismatchError
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.measuring.text import encode
from bitknap.estimators.sweep.peak_memory import layer_bytes
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint

TEXT = Path(__file__).parent.parent.parent / "LICENSE"
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "256", "--text", str(TEXT))

ASKED = Calibration(text=str(TEXT), tokens=256)


@pytest.fixture(scope="module")
def model(saved, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "mixtral")


@pytest.fixture(scope="module")
def table(model):
    every = replace(ASKED, thorough=True)
    return bitknap.estimate(model, SecondMoments(), formats((2, 4), (8, "row")), calibration=every)


@pytest.fixture(scope="module")
def loop(model):
    source = Checkpoint.open(model)
    return open_loop(source, gather(source, frozenset({"moments"}), ASKED), ASKED, 512)


def _kl(loop, sample, plan):
    """Return the KL of a plan on each window of a text."""
    return losses_of(loop.evidence, sample, [plan])[0].kl


def test_windows_of_the_gate_are_read_by_nothing_else(loop):
    read = torch.cat([*(part.windows for part in loop.parts), loop.evidence.replay.windows])
    known = {bytes(window.numpy()) for window in read}
    assert len(loop.gate.windows) >= 2
    assert not any(bytes(window.numpy()) in known for window in loop.gate.windows)


@pytest.mark.slow
def test_layers_answered_from_memory_change_nothing(loop, table):
    ours = measures(loop, table, Readings())
    draw = np.random.default_rng(0)
    base = draw.integers(0, len(table.formats), len(table.units)).astype(np.int32)
    plans = [base]
    for layer in (1, 0, 1):
        changed = base.copy()
        here = np.flatnonzero(table.units.layer == layer)
        changed[here[:3]] = (changed[here[:3]] + 1) % len(table.formats)
        plans.append(changed)
    for choice in plans:
        plan = BitPlan.from_choice(table.units, table.formats, choice)
        for part, replay in zip(ours, loop.parts, strict=True):
            np.testing.assert_array_equal(part(choice), _kl(loop, replay, plan))
    # Others that use the same replays in between are noticed.
    other = measures(loop, table, Readings())
    other[0](plans[2])
    again = BitPlan.from_choice(table.units, table.formats, plans[3])
    np.testing.assert_array_equal(
        measures(loop, table, Readings())[0](plans[3]), _kl(loop, loop.parts[0], again)
    )
    assert np.array_equal(ours[0](plans[1]), other[0](plans[1]))


@pytest.mark.slow
def test_the_loops_plan_is_within_limits_and_no_worse_where_it_was_measured(loop, table):
    tied = under(table, profile("expert"))
    outcome = run_loop(loop, tied, [Budget.bits(4)], Refinement(evaluations=6))
    problem = Problem(tied, [Budget.bits(4)])
    assert within(problem, outcome.plan)
    first, best = outcome.refined.steps[0], outcome.refined.best
    assert best.losses.mean() <= first.losses.mean()
    facts = outcome.facts()
    assert facts["evaluations"] == len(outcome.refined.steps) <= 6
    assert json.dumps(facts)


@pytest.mark.slow
def test_a_plan_that_loses_more_than_uniform_does_not_pass_the_gate(loop, table):
    # Costs turned round: what is dear gets fewest bits.
    wrong = replace(table, cost=table.cost.max() - table.cost + table.cost.min())
    outcome = run_loop(loop, wrong, [Budget.bits(5)], Refinement(evaluations=1))
    assert not outcome.passed
    assert outcome.recipe
    assert within(Problem(wrong, [Budget.bits(5)]), outcome.plan)
    assert outcome.uniform is not None
    assert _kl(loop, loop.gate, outcome.plan).mean() == outcome.uniform.kl.mean()
    assert outcome.uniform.kl.mean() <= outcome.ours.kl.mean()
    assert not outcome.facts()["gate_passed"]


def test_a_text_too_short_for_loop_and_gate_is_refused(loop, model):
    from bitknap.api.calibration import tokenizer_of

    taken = loop.evidence.replay.windows
    words = TEXT.read_text()
    with pytest.raises(InputError, match="the gate needs 2"):
        loop_windows(encode(tokenizer_of(model), words[:2100]), taken, 512)


def test_a_table_of_another_model_is_refused(model, table, saved, tmp_path):
    other = saved(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(MismatchError, match="the table belongs to another model"):
        refine(other, table, [Budget.bits(4)], calibration=ASKED)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--refine", "-1"], "a number of plans"),
        (["--refine", "2", "--permute", "--row-blocks", "2"], "leave out --permute"),
        (["--refine", "2", "--text", str(TEXT)], "one text"),
    ],
)
def test_words_that_do_not_go_together(model, refused, tmp_path, words, reason):
    out = tmp_path / "out"
    assert reason in refused("quantize", model, "--budget", "4bpw", *FAST, *words, "-o", out)


def _least(model, tokens=256 + 512 + GATE_TOKENS, needs=("kl",)):
    """Return a limit that plans of a model can just be measured in."""
    source = Checkpoint.open(model)
    return layer_bytes(source, walk_headers(source.config, source.shapes), tokens, needs)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_same_loop_layer_by_layer(model, table, method):
    given = replace(table, provenance={**table.provenance, "method": method})
    needs = ("kl", "full") if method == "gptq" else ("kl",)
    outcomes = [
        refine(
            model,
            given,
            [Budget.bits(4)],
            refinement=Refinement(evaluations=4, tokens=512),
            calibration=replace(ASKED, max_memory=most),
        )
        for most in (None, _least(model, needs=needs))
    ]
    whole, layers = outcomes
    assert len(layers.refined.steps) == len(whole.refined.steps) > 2
    for one, other in zip(whole.refined.steps, layers.refined.steps, strict=True):
        np.testing.assert_array_equal(other.choice, one.choice)
        np.testing.assert_allclose(other.losses, one.losses, rtol=1e-4, atol=1e-8)
    assert layers.recipe == whole.recipe
    np.testing.assert_array_equal(layers.plan.choice, whole.plan.choice)
    np.testing.assert_allclose(layers.ours.kl, whole.ours.kl, rtol=1e-4, atol=1e-8)
    assert layers.uniform is not None and whole.uniform is not None
    np.testing.assert_allclose(layers.uniform.kl, whole.uniform.kl, rtol=1e-4, atol=1e-8)


def test_a_limit_too_low_for_the_loop_names_the_least(model, table):
    with pytest.raises(InputError, match=r"^memory: measuring takes about .*; raise `max_memory`"):
        refine(
            model,
            table,
            [Budget.bits(4)],
            calibration=replace(ASKED, max_memory=_least(model) // 2),
        )


def test_refine_needs_a_budget(made, refused, tmp_path):
    said = refused(
        "quantize", made.model, "--plan", made.plan, "--refine", "2", "-o", tmp_path / "out"
    )
    assert "give --budget" in said


@pytest.mark.slow
def test_the_command_says_what_refining_and_the_gate_came_to(model, document, tmp_path):
    out = tmp_path / "out"
    found = document(
        "quantize", model, "--budget", "4bpw", *FAST, "--refine", "4", "--refine-tokens", "512",
        "--price", "--report", tmp_path / "page.html", "-o", out,
    )  # fmt: skip
    assert found["refine_evaluations"] == 4
    assert found["refine_gate_passed"] in (True, False)
    assert found["bytes_predicted"] == found["bytes_on_disk"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "page.html"]
    page = (tmp_path / "page.html").read_text()
    for heading in ("Plan", "Expert coverage", "Price of runtime profiles", "Refinement"):
        assert f"<h2>{heading}</h2>" in page


@pytest.mark.slow
@pytest.mark.parametrize("residency", ["whole", "layers"])
def test_a_killed_loop_goes_on_and_ends_the_same(model, tmp_path, background, residency):
    words = ["quantize", str(model), "--budget", "4bpw", *FAST]
    if residency == "layers":
        words += ["--max-memory", f"{_least(model)}B"]
    words += ["--refine", "8", "--refine-tokens", "512"]
    one, two = tmp_path / "one", tmp_path / "two"
    main([*words, "-o", str(one)])
    journal = tmp_path / "two.refine.journal"
    worker = background([*words, "-o", two], journal, 4)
    worker.kill()
    worker.wait()
    assert journal.exists()
    main([*words, "-o", str(two)])
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    assert not journal.exists()
