"""A study as one HTML page: Optuna's own plots, readable offline, in light and in dark."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from bitknap.allocation.problem.budget import human
from bitknap.allocation.search.best_trials import front, records
from bitknap.allocation.search.optuna_trials import quietly, shown
from bitknap.allocation.search.study import Study
from bitknap.allocation.search.trial_record import Record
from bitknap.report.html import drawn, section, shell, table

if TYPE_CHECKING:
    import optuna

# Plots of all parameters are readable up to about this many parameters.
_MOST = 12


def page(study: Study) -> str:
    """Return the page: facts about the study, its best trials, plots, and commands to repeat it.

    Raises:
        InputError: plotly is not installed.
    """
    with quietly(), warnings.catch_warnings():
        # Optuna warns about studies with few trials; that is not a problem here.
        warnings.simplefilter("ignore")
        plots = [
            section(heading, note, drawn(figure, heading))
            for heading, note, figure in _plots(study)
        ]
    repeat = f"<pre>{escape(_commands(study))}</pre>"
    nothing = "<p>No trial is complete yet: nothing to plot.</p>"
    body = [_facts(study), _leaders(study), *(plots or [nothing]), section("Repeat it", "", repeat)]
    return shell(f"Study {study.name}", body)


def _plots(study: Study) -> Iterator[tuple[str, str, Any]]:
    """Yield heading, explanation and figure of every plot that the trials so far allow."""
    from optuna import visualization as draw

    every = records(study)
    complete = [record for record in every if record.loss is not None]
    if not complete:
        return
    trials, both = study.trials, bool(study.knobs.budget)
    value: Callable[[optuna.trial.FrozenTrial], float] = _loss_of
    of: dict[str, Any] = {"target": value, "target_name": "measured loss"}
    if both:
        yield (
            "Size against loss",
            "The front holds the plans that no other plan beats in both size and loss.",
            draw.plot_pareto_front(trials, target_names=["bytes of the units", "measured loss"]),
        )
    else:
        # Given no target, Optuna also draws the best value so far.
        history = draw.plot_optimization_history(trials, target_name="measured loss")
        yield "History", "Trial 0 is the plan of the unchanged table.", history
    yield (
        "Predicted and measured",
        "Sum of the table's costs against the measured loss. If they lay on a straight line, no "
        "study would be needed.",
        _predicted(complete),
    )
    if len({record.loss for record in complete}) < 2:
        return
    importances = _importances(trials, of)
    names = list(importances)[:_MOST] or sorted(complete[0].params)[:_MOST]
    some = f"The {len(names)} most important of {len(complete[0].params)} parameters."
    if importances:
        figure = draw.plot_param_importances(trials, params=names, **of)
        yield "Importance of parameters", f"PED-ANOVA. {some}", figure
    if names:
        yield "Parameters one by one", some, draw.plot_slice(trials, params=names, **of)
        figure = draw.plot_parallel_coordinate(trials, params=names, **of)
        yield "Parameters together", some, figure
    yield "Distribution", "Share of trials whose loss is at most x.", draw.plot_edf(trials, **of)


def _loss_of(trial: optuna.trial.FrozenTrial) -> float:
    return float(trial.values[-1])


def _importances(trials: optuna.Study, of: dict[str, Any]) -> dict[str, float]:
    """Return parameters by importance; empty if there are too few trials."""
    from optuna.importance import get_param_importances

    try:
        return dict(get_param_importances(trials, target=of["target"]))
    except (ValueError, RuntimeError):
        return {}


def _predicted(complete: list[Record]) -> Any:
    from plotly import graph_objects

    figure = graph_objects.Figure(
        graph_objects.Scatter(
            x=[record.predicted for record in complete],
            y=[record.loss for record in complete],
            text=[f"trial {record.number}" for record in complete],
            mode="markers",
        )
    )
    figure.update_layout(xaxis_title="predicted loss", yaxis_title="measured loss")
    return figure


def _facts(study: Study) -> str:
    about, measured = study.about, study.measured
    low, high = study.knobs.budget or (0, 0)
    states = [record.state for record in records(study)]
    turned = [name for name, on in about["knobs"].items() if on and name not in ("width", "budget")]
    source = about["table"]
    rows = {
        "table": f"{source['name']} (SHA-256 {source['sha256'][:16]}…)",
        "features": ", ".join(entry["name"] for entry in about["features"]) or "none",
        "budget": about["budget"] or f"{low:g} to {high:g} bpw",
        "profile": about["profile"],
        "knobs": ", ".join(turned) or "none",
        "sampler": f"{about['sampler']}, seed {about['seed']}",
        "measured": measured.get("what", "nothing yet"),
        "tokens": f"{measured['tokens']:,}" if "tokens" in measured else "–",
        "text": measured.get("text", "–"),
        "model": about["model"] or "unknown",
        "trials": ", ".join(f"{states.count(s)} {s}" for s in sorted(set(states))),
    }
    return table([[name, value] for name, value in rows.items()])


def _leaders(study: Study) -> str:
    """Return the front, or the first trial and the best one, as a table."""
    every = records(study)
    complete = [record for record in every if record.loss is not None]
    if study.knobs.budget:
        rows, heading = front(study), "Front"
    else:
        best = sorted(complete, key=lambda record: (record.loss, record.number))[:1]
        first = [record for record in complete[:1] if record not in best]
        rows, heading = [*best, *first], "Best and first trial"
    if not rows:
        return ""
    cells = [
        [
            str(r.number),
            f"{r.loss:.6g}",
            f"{r.predicted:.6g}",
            f"{r.bpw or 0:.4g}",
            human(r.nbytes or 0),
        ]
        for r in rows
    ]
    head = ["trial", "measured loss", "predicted loss", "bits per weight", "bytes"]
    return section(heading, "", table(cells, head))


def _commands(study: Study) -> str:
    """Return the commands that create and run this study again; the password must be filled in."""
    about, measured = study.about, study.measured
    where = ["--storage", shown(study.storage)]
    make = ["bitknap", "study", "create", study.name, *where, "--table", about["table"]["path"]]
    for entry in about["features"]:
        make += ["--feature", entry["path"]]
    low, high = study.knobs.budget or (0, 0)
    size = ["--budget", about["budget"]] if about["budget"] else ["--budgets", f"{low}-{high}bpw"]
    names = ("tilts", "risk", "formats", "floor", "cap", "exponents")
    knobs = ",".join(name for name in names if about["knobs"][name])
    make += [*size, "--profile", about["profile"], "--sampler", about["sampler"]]
    make += ["--knobs", knobs, "--seed", str(about["seed"])]
    count = sum(record.state == "complete" for record in records(study))
    go = ["bitknap", "study", "run", study.name, *where, "--model", "MODEL"]
    go += ["--trials", str(max(1, count))]
    if "tokens" in measured:
        go += ["--tokens", str(measured["tokens"])]
    return f"{shlex.join(make)}\n{shlex.join(go)}"
