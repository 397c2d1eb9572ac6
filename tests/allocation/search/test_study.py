"""Studies: shared, resumed, repeatable, and refused in one line."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import optuna
import pytest

from bitknap.allocation import BitPlan, Budget
from bitknap.allocation.search.attempts import attempts
from bitknap.allocation.search.best_trials import best, front, records
from bitknap.allocation.search.optuna_trials import make_sampler
from bitknap.allocation.search.optuna_trials import worker as worker_name
from bitknap.allocation.search.search_space import Knobs
from bitknap.allocation.search.study import create, load, plan_of, run
from bitknap.allocation.search.study_design import Design, Sampler
from bitknap.allocation.search.trial_record import Record
from bitknap.errors import (
    BitknapError,
    FileError,
    InfeasibleError,
    MismatchError,
)

TILTS = Knobs(tilts=("layer", "proj"))
AT = Budget.bits(4.5)


def losses(rows):
    return np.array([row.loss for row in rows])


def sizes(rows):
    return np.array([row.nbytes for row in rows])


@pytest.fixture(params=["sqlite", "journal"])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path}/s.db" if request.param == "sqlite" else f"{tmp_path}/s.log"


# What a study is, and that it comes back the same


@pytest.mark.slow
def test_a_study_is_made_run_and_read(table, journal, design, loss):
    made = create("s", journal, table, design(knobs=TILTS, sampler=Sampler("tpe", seed=1)))
    assert [record.state for record in records(made)] == ["waiting"]
    told: list[Record] = []
    run(made, loss, 4, measured={"text": "a"}, watch=told.append)
    study = load("s", journal)
    assert [record.number for record in told] == [0, 1, 2, 3]
    assert [r.state for r in records(study)] == ["complete"] * 4
    first, winner = records(study)[0], best(study)
    assert set(first.params.values()) == {0.0}
    assert winner.loss == losses(records(study)).min() <= losses([first])[0]
    assert study.measured == {"text": "a"}
    assert study.about["model"] == "abc"
    assert study.about["table"]["sha256"] == hashlib.sha256(table.read_bytes()).hexdigest()
    # What the trial stored is what its parameters give again.
    plan = plan_of(study, winner.params, winner)
    assert loss(plan) == winner.loss
    assert (plan.total_bytes, plan.bpw) == (winner.nbytes, winner.bpw)
    assert plan.header["objective"] == winner.predicted
    assert plan.bpw <= 4.5
    assert plan.model == "abc"
    kept = {key: plan.header[key] for key in ("study", "trial", "measured", "profile")}
    assert kept == {
        "study": "s",
        "trial": winner.number,
        "measured": {"loss": winner.loss, "text": "a"},
        "profile": "gate_eq_up",
    }


def test_the_header_can_be_saved(table, journal, tmp_path, design, loss):
    made = create("s", journal, table, design())
    run(made, loss, 1)
    plan_of(made, best(made).params, best(made)).save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json").header["trial"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_one_worker_is_repeatable_and_may_stop_in_between(table, tmp_path, sampler, design, loss):
    params = []
    for name, parts in (("a", (12,)), ("b", (5, 7))):
        url = f"journal:{tmp_path}/{name}.log"
        made = create("s", url, table, design(knobs=TILTS, sampler=Sampler(sampler, seed=7)))
        run(made, loss, parts[0])
        for part in parts[1:]:
            run(load("s", url), loss, part)
        params.append([dict(record.params) for record in records(made)])
    assert params[0] == params[1]
    assert len({json.dumps(p) for p in params[0]}) == 12


def test_a_seed_matters(table, tmp_path, design, loss):
    found = []
    for seed in (0, 1):
        made = create(
            "s",
            f"{tmp_path}/{seed}.log",
            table,
            design(knobs=TILTS, sampler=Sampler("tpe", seed=seed)),
        )
        run(made, loss, 2)
        found.append(records(made)[1].params)
    assert found[0] != found[1]


def test_equal_plans_are_measured_once(table, journal, design, loss):
    seen = []

    def count(plan):
        seen.append(plan.choice.tobytes())
        return loss(plan)

    made = create("s", journal, table, design(knobs=Knobs(tilts=("layer",), width=0.01)))
    run(made, count, 8)
    assert len(seen) == len(set(seen)) < 8
    assert len({record.loss for record in records(made)}) == len(seen)


def test_features_turn_costs(table, journal, tmp_path, design, save, loss):
    other = save(tmp_path / "other.safetensors", seed=5)
    knobs = Knobs(exponents=("other",), risk=True, formats=True, floor=True, cap=True)
    made = create("s", journal, table, design(knobs=knobs), features=[other])
    run(made, loss, 6)
    study = load("s", journal, table=table, features=[other])
    assert set(records(study)[1].params) == {
        "exponent:other", "risk", "allow:g8", "allow:row", "floor", "cap"
    }  # fmt: skip
    assert study.knobs == knobs
    for record in records(study):
        if record.state == "complete":
            assert plan_of(study, record.params).total_bytes == record.nbytes


def test_size_against_loss_gives_a_front(table, journal, loss):
    knobs = Knobs(tilts=("layer",), budget=(4.5, 8.0))
    made = create("s", journal, table, Design(knobs=knobs, sampler=Sampler("nsga2")))
    run(made, loss, 23)
    assert [record.params["bits"] for record in records(made)[:3]] == [6.25, 4.5, 8.0]
    ends = front(made)
    assert len(ends) > 1
    assert (np.diff(sizes(ends)) > 0).all()
    assert (np.diff(losses(ends)) < 0).all()
    for size, lost in zip(sizes(records(made)), losses(records(made)), strict=True):
        assert ((sizes(ends) <= size) & (losses(ends) <= lost)).any()
    small = best(made, "5bpw")
    assert small in ends
    assert sizes([small])[0] <= 5 / 8 * made.table.weights
    assert best(made) == ends[-1]
    with pytest.raises(InfeasibleError, match="budget 1bpw: the smallest measured plan takes"):
        best(made, "1bpw")


# Trials that fail


def test_failures_are_reported_and_the_study_goes_on(table, journal, design):
    values = iter([float("nan"), 1.0, float("inf"), 2.0])
    made = create("s", journal, table, design(knobs=Knobs(tilts=("layer",), width=9)))
    run(made, lambda plan: next(values), 2)
    assert [(r.state, r.reason, r.loss) for r in records(made)] == [
        ("failed", "the objective is nan", None),
        ("complete", "", 1.0),
        ("failed", "the objective is inf", None),
        ("complete", "", 2.0),
    ]


def test_parameters_without_a_plan_are_pruned(table, journal, design, loss):
    # 3 bits and a zero point a row of 16 do not fit 4.5 bpw: half of the floors have no plan.
    made = create("s", journal, table, design(knobs=Knobs(floor=True, formats=True)))
    run(made, loss, 12)
    pruned = [record for record in records(made) if record.state == "pruned"]
    assert pruned
    for record in pruned:
        assert record.reason.startswith(("memory: smallest plan needs", "knobs: the allowed"))
    assert sum(record.state == "complete" for record in records(made)) == 12


def test_failing_without_end_is_an_error(table):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="s")
    with pytest.raises(BitknapError) as error:
        list(attempts(study, lambda trial: [float("nan")], list, 1, patience=5))
    assert str(error.value) == (
        "study 's': 5 trials in a row failed, the last with 'the objective is nan'; "
        "widen the budget or the knobs"
    )
    assert len(study.trials) == 5


def test_an_error_of_the_measurement_comes_through(table, journal, design):
    made = create("s", journal, table, design(knobs=TILTS))

    def broken(plan):
        raise ZeroDivisionError("by the user")

    with pytest.raises(ZeroDivisionError):
        run(made, broken, 1)

    def stopped(plan):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(made, stopped, 1)
    assert [record.reason for record in records(made)[:2]] == [
        "ZeroDivisionError: by the user",
        "KeyboardInterrupt",
    ]


# Workers

WORKER = """
import sys, time
from bitknap.allocation.search.study import load, run
name, url, trials, seconds = sys.argv[1:]
def measure(plan):
    print("measuring", flush=True)
    time.sleep(float(seconds))
    return float(plan.choice.sum())
run(load(name, url), measure, int(trials))
"""


def worker(url, trials, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, "s", url, str(trials), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.slow
def test_two_workers_share_a_study(table, url, design):
    knobs = Knobs(tilts=("layer",), width=3)
    made = create("s", url, table, design(knobs=knobs))
    processes = [worker(url, 2, 0.1) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    found = records(load("s", url))
    assert [record.number for record in found] == list(range(4))
    assert {record.state for record in found} == {"complete"}
    assert len({json.dumps(dict(record.params)) for record in found}) == 4
    assert len({t.user_attrs["worker"] for t in made.trials.trials}) == 2


def test_a_trial_that_another_worker_reported_first_is_made_up_for(table, journal, design, loss):
    study = create("s", journal, table, design(knobs=TILTS))

    def told(plan):
        if len(study.trials.trials) == 1:
            study.trials.tell(0, 0.5)  # by the other worker, meanwhile
        return loss(plan)

    run(study, told, 1)
    assert [record.state for record in records(study)] == ["complete", "complete"]
    assert records(study)[0].loss == 0.5


@pytest.mark.slow
def test_a_killed_worker_loses_its_running_trial_alone(table, journal, design, loss):
    create("s", journal, table, design(knobs=TILTS))
    process = worker(journal, 5, 60)
    assert process.stdout.readline() == "measuring\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    study = load("s", journal)
    assert [record.state for record in records(study)] == ["running"]
    run(study, loss, 2)
    assert [(r.state, r.reason) for r in records(study)] == [
        ("failed", "its worker was killed"),
        ("complete", ""),
        ("complete", ""),
    ]
    # It was the trial that turns nothing: it came back.
    assert set(records(study)[1].params.values()) == {0.0}


@pytest.mark.parametrize(
    "name", [worker_name(), "elsewhere/0:1", ""], ids=["live", "foreign", "unsigned"]
)
def test_a_live_or_foreign_workers_trial_is_left_alone(table, journal, name, design, loss):
    study = create("s", journal, table, design(knobs=TILTS))
    study.trials.ask().set_user_attr("worker", name)
    run(study, loss, 1)
    assert [record.state for record in records(study)] == ["running", "complete"]


def test_draws_depend_on_the_seed_and_the_number_alone():
    def drawn(seed, count):
        study = optuna.create_study(sampler=make_sampler("tpe", seed))
        return [study.ask().suggest_float("x", 0, 1) for _ in range(count)]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    assert drawn(0, 5) == drawn(0, 5)
    assert len({*drawn(0, 5), *drawn(1, 5)}) == 10


# What is refused


def test_another_table_is_refused(table, journal, tmp_path, design, save):
    create("s", journal, table, design())
    other = save(tmp_path / "other.safetensors", seed=9)
    with pytest.raises(MismatchError, match=r"other\.safetensors: not the table that study 's'"):
        load("s", journal, table=other)
    moved = table.rename(tmp_path / "moved.safetensors")
    with pytest.raises(FileError, match=r"table\.safetensors: cannot be read"):
        load("s", journal)
    assert load("s", journal, table=moved).about["table"]["name"] == "table"


def test_another_measurement_is_refused(table, journal, design, loss):
    made = create("s", journal, table, design())
    run(made, loss, 1, measured={"model": "a", "tokens": 10})
    with pytest.raises(MismatchError) as error:
        run(made, loss, 1, measured={"model": "a", "tokens": 20})
    assert str(error.value) == (
        "study 's': tokens was 10, now 20, so losses would not be comparable; create a new study"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either a budget or a range of budgets"),
        (
            {"budget": Budget.bits(4.5), "sampler": "grid"},
            "sampler 'grid' is unknown; one of tpe, cmaes",
        ),
        ({"budget": AT, "sampler": "nsga2"}, "nsga2 trades bytes against loss"),
        ({"knobs": Knobs(budget=(3, 4))}, "nsga2 trades bytes against loss"),
        ({"budget": Budget.bits(0.5)}, "memory: smallest plan needs"),
        (
            {"budget": AT, "knobs": Knobs(exponents=("x",))},
            "exponent:x: no such feature",
        ),
    ],
)
def test_nothing_is_created_of_bad_values(table, tmp_path, options, message):
    with pytest.raises(BitknapError, match=message):
        if "sampler" in options:
            options = {**options, "sampler": Sampler(options["sampler"])}
        create("s", f"{tmp_path}/s.log", table, Design(**options))
    assert list(tmp_path.iterdir()) == [table]


def test_importing_is_light():
    code = (
        "import sys, bitknap.allocation.search.solver, bitknap.allocation.search.study;"
        "print([m for m in ('optuna', 'sqlalchemy', 'torch') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert out.stdout.strip() == "[]"
