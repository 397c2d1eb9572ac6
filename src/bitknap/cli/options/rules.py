"""Options that cannot be combined: one table, checked before anything is read.

A rule names the commands, a condition, and a message that says which options exclude each other
and which ones work. `estimators.named` knows which options a named estimator takes, solvers know
which ones they take, and values are checked where they are parsed; all of that happens before
anything is read as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from bitknap.cli.options.solving import listed
from bitknap.errors import InputError

_WRAPPERS = ("calibrated", "fuzzy")
_ROUTED_ONLY = ("fisher", "fisher-output", "autoround", "measured-layer", "measured-block")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The parameters of a command.

    Attributes:
        values: values of all parameters, by name.
        given: names of the parameters given at the command line.
    """

    values: Mapping[str, Any]
    given: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        """Return the value of a parameter; None if the command has no such parameter."""
        return self.values.get(name)

    @property
    def estimator(self) -> tuple[str, ...]:
        """The comma-separated words of --estimator."""
        return tuple(listed(self["estimator"] or ""))

    @property
    def base(self) -> str:
        """The base estimator of calibration or of fuzzy rules."""
        plain = [word for word in self.estimator if word not in _WRAPPERS]
        usual = "fisher-output" if self.estimator == ("fuzzy",) else "moments"
        return plain[0] if plain else usual


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Options that cannot be combined.

    Attributes:
        commands: commands that have them, such as "estimate" or "study create".
        broken: whether they are used together.
        message: the error message; {name} stands for the value of a parameter.
    """

    commands: tuple[str, ...]
    broken: Callable[[Asked], bool]
    message: str

    def says(self, asked: Asked) -> str:
        """Return the message with the given values filled in."""
        return self.message.format_map(dict(asked.values))


def check_options(command: str) -> None:
    """Refuse options of the running command that cannot be combined.

    Args:
        command: its name, preceded by the name of its group if any: "study create".

    Raises:
        InputError: a rule is broken.
    """
    context = click.get_current_context()
    line = ParameterSource.COMMANDLINE
    names = [name for name in context.params if context.get_parameter_source(name) is line]
    check(command, Asked(values=context.params, given=frozenset(names)))


def check(command: str, asked: Asked) -> None:
    """Refuse options that cannot be combined.

    Raises:
        InputError: a rule is broken.
    """
    for rule in RULES:
        if command in rule.commands and rule.broken(asked):
            raise InputError(rule.says(asked))


def _rounds_to_nearest(asked: Asked) -> bool:
    """Return whether costs are measured for rounding to nearest, whatever --method says."""
    from bitknap.estimators.catalog import rounds_to_nearest

    return rounds_to_nearest(asked.base)


def _one_text(asked: Asked) -> bool:
    return len(asked["text"]) == 1


def _planned(asked: Asked) -> bool:
    return asked["plan"] is not None


def _flag(name: str) -> str:
    """Return the option that sets a parameter, without its dashes."""
    return {"bits": "formats", "limits": "limit"}.get(name, name).replace("_", "-")


_ESTIMATING = ("estimate", "quantize")
_COSTS_OF_ONE_METHOD = (
    "--method {method}: the costs of --estimator {estimator} are those of rounding to nearest; "
    "use --method rtn, or an estimator that charges {method}, such as calibrated, moments, fisher, "
    "weight-error or measured-kl"
)


def _rounds_otherwise(asked: Asked) -> bool:
    """Return whether costs of rounding to nearest would be for files that are rounded otherwise."""
    if asked["target"] is None or not _rounds_to_nearest(asked):
        return False
    from bitknap.quantization.targets.catalog import target_of

    target = target_of(asked["target"])
    return target.reads_weights and target.rounding not in ("", "rtn")


_ESTIMATES = (
    Rule(
        commands=_ESTIMATING,
        broken=lambda a: not _planned(a) and _rounds_otherwise(a),
        message="--target {target}: it rounds otherwise, and the costs of --estimator {estimator} "
        "are those of rounding to nearest; use one that charges the rounding, such as calibrated, "
        "moments, fisher, weight-error or measured-kl",
    ),
    Rule(
        commands=("estimate",),
        broken=lambda a: a["method"] in ("hqq", "gptq") and _rounds_to_nearest(a),
        message=_COSTS_OF_ONE_METHOD,
    ),
    Rule(
        commands=("quantize",),
        broken=lambda a: (
            not (_planned(a) or a["force"])
            and a["method"] in ("hqq", "gptq")
            and _rounds_to_nearest(a)
        ),
        message=f"{_COSTS_OF_ONE_METHOD}, or round in another way than they say with --force",
    ),
    Rule(
        commands=_ESTIMATING,
        broken=lambda a: a["risk"] is not None and a["robust"] != "mean+sd",
        message="--risk: only --robust mean+sd takes it",
    ),
    Rule(
        commands=_ESTIMATING,
        broken=lambda a: a["samples"] is not None and not _one_text(a),
        message="--samples: they are measured on one text; give one --text",
    ),
    Rule(
        commands=_ESTIMATING,
        broken=lambda a: a["initial_router"] is not None and "router-norm" not in a.estimator,
        message="--initial-router: only --estimator router-norm reads it",
    ),
    Rule(
        commands=_ESTIMATING,
        broken=lambda a: a["permute"] and a["row_blocks"] == 1,
        message="--permute: sorts neurons for row blocks; ask for at least 2 row blocks with "
        "--row-blocks",
    ),
    Rule(
        commands=_ESTIMATING,
        broken=lambda a: bool(listed(a["include"])) and a.base in _ROUTED_ONLY,
        message="--include: --estimator {estimator} covers routed experts only; use moments, "
        "weight-error, measured-kl or data-free with --include",
    ),
)


def _not_with_plan(name: str, why: str) -> Rule:
    return Rule(
        commands=("quantize",),
        broken=lambda a: _planned(a) and name in a.given,
        message=f"--{_flag(name)}: {why}",
    )


def _not_with_refine(name: str) -> Rule:
    return Rule(
        commands=("quantize",),
        broken=lambda a: bool(a["refine"]) and bool(a[name]),
        message=f"--refine: measures the live model as it is; leave out --{_flag(name)}",
    )


def _only_with_refine(name: str) -> Rule:
    return Rule(
        commands=("quantize",),
        broken=lambda a: not a["refine"] and name in a.given,
        message=f"--{_flag(name)}: only --refine N takes it",
    )


_SAID = "the plan says what is done; leave it out, or give --budget in place of --plan"
_UNUSED = "with --plan nothing is {}; leave it out, or give --budget in place of --plan"
# Options of `quantize` that have no effect with a plan, by parameter.
_NOT_WITH_PLAN = {
    **dict.fromkeys(("row_blocks", "permute", "rotate", "keep", "include"), _SAID),
    **dict.fromkeys(("bits", "group_size", "metadata"), _SAID),
    **dict.fromkeys(("profile", "pin", "limits", "protect_bits"), _SAID),
    **dict.fromkeys(("solver", "gap", "time_limit", "price"), _UNUSED.format("solved")),
    **dict.fromkeys(("estimator", "calibrate", "check"), _UNUSED.format("estimated")),
    **dict.fromkeys(("initial_router", "robust", "risk"), _UNUSED.format("estimated")),
    **dict.fromkeys(
        ("journal", "samples", "measurements", "thorough", "measure_time"),
        _UNUSED.format("measured"),
    ),
}
_QUANTIZES = (
    Rule(
        commands=("quantize",),
        broken=lambda a: (a["plan"] is None) == (a["budget"] is None),
        message="give one of --plan, --budget and --fit",
    ),
    Rule(
        commands=("quantize",),
        broken=lambda a: bool(a["refine"]) and _planned(a),
        message="--refine: improves on what a budget gives; give --budget, not --plan",
    ),
    *(_not_with_plan(name, why) for name, why in _NOT_WITH_PLAN.items()),
    Rule(
        commands=("quantize",),
        broken=lambda a: a["method"] == "midtread" and a["target"] != "compressed-tensors",
        message="--method midtread: packed checkpoints have no grids with a code for zero; give "
        "--target compressed-tensors",
    ),
    *map(_not_with_refine, ("permute", "rotate")),
    *map(_only_with_refine, ("refine_driver", "refine_tokens")),
    Rule(
        commands=("quantize",),
        broken=lambda a: bool(a["refine"]) and not _one_text(a),
        message="--refine: plans are measured on one text; give one --text",
    ),
    Rule(
        commands=("quantize",),
        broken=lambda a: a["method"] == "gptq" and not _one_text(a),
        message="--text: gptq calibrates on one text; give one",
    ),
    Rule(
        commands=("quantize",),
        broken=lambda a: a["force"] and a["method"] is None,
        message="--force: rounds in another way than the plan says; say which with --method",
    ),
)


def _not_with_frontier(name: str) -> Rule:
    return Rule(
        commands=("solve",),
        broken=lambda a: a["frontier"] and name in a.given,
        message=f"--frontier does not take --{_flag(name)}; give --budget for that",
    )


_SOLVES = (
    Rule(
        commands=("solve",),
        broken=lambda a: a["frontier"] == (a["budget"] is not None),
        message="give one of --budget, --fit and --frontier",
    ),
    *map(_not_with_frontier, ("solver", "gap", "time_limit", "limits", "price")),
)


def _judged_on_its_own(asked: Asked) -> bool:
    """Return whether one file is to be calibrated and judged on; the bundled texts are two."""
    files = [name for name in asked["evaluation_text"] if name != "builtin"]
    text = asked["text"]
    return text != "builtin" and Path(text).resolve() in [Path(file).resolve() for file in files]


def _only_with_tasks(name: str) -> Rule:
    return Rule(
        commands=("compare",),
        broken=lambda a: a[name] is not None and not listed(a["tasks"]),
        message=f"--{_flag(name)}: only --tasks takes it; name some, such as --tasks piqa",
    )


_JUDGES = (
    Rule(
        commands=("evaluate",),
        broken=lambda a: a["uniform"] and a["reference"] is None,
        message="--uniform needs --reference, the model that recipes are applied to",
    ),
    *map(_only_with_tasks, ("task_path", "task_limit")),
    Rule(
        commands=("compare",),
        broken=_judged_on_its_own,
        message="--evaluation-text: {text} is the calibration text (--text) too; judge plans on "
        "text that no strategy saw",
    ),
    Rule(
        commands=("show",),
        broken=lambda a: a["other"] is not None and a["picture"] is not None,
        message="--picture draws a table and --diff compares two plans; pass only one",
    ),
)

_STUDIES = (
    Rule(
        commands=("study create",),
        broken=lambda a: (a["budget"] is None) == (a["budgets"] is None),
        message="give either a budget or a range of budgets",
    ),
    Rule(
        commands=("study create",),
        broken=lambda a: a["sampler"] == "nsga2" and a["budget"] is not None,
        message="--sampler nsga2: trades size against loss; give --budgets 2bpw-4bpw, or --sampler "
        "tpe or cmaes with --budget",
    ),
    Rule(
        commands=("study create",),
        broken=lambda a: a["sampler"] in ("tpe", "cmaes") and a["budgets"] is not None,
        message="--sampler {sampler}: searches at one size; give --budget, or --sampler nsga2 with "
        "--budgets",
    ),
    Rule(
        commands=("study create",),
        broken=lambda a: "exponents" in listed(a["knobs"] or "") and not a["features"],
        message="--knobs exponents: give at least one --feature TABLE",
    ),
    Rule(
        commands=("study create",),
        broken=lambda a: (
            bool(a["features"] and a["knobs"]) and "exponents" not in listed(a["knobs"])
        ),
        message="--feature: only --knobs exponents uses it; name that too, or leave out --knobs",
    ),
)

# Checked in this order, so that the most general of several broken rules is reported.
RULES = (*_QUANTIZES, *_ESTIMATES, *_SOLVES, *_JUDGES, *_STUDIES)
