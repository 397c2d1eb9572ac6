"""The table of options: each is declared once, here or in `measuring`, for every command.

So an option has the same spelling, default and help text everywhere. A default that is computed
later is shown with `usual`; tests compare it with the constant of the library.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import click

from bitknap.cli.options import completing
from bitknap.cli.options.declare import Declared, OneOf, argument, option, options_of
from bitknap.errors import InputError

_PATH: Any = click.Path(path_type=Path)

# model
model = argument(
    "model",
    "Folder, Hugging Face id, or bundled: reference:mixtral.",
    shell_complete=completing.models,
)
of_model = option(
    "--model",
    group="model",
    default=None,
    metavar="MODEL",
    help="The model that the input was made from.",
    shell_complete=completing.models,
)
include = option(
    "--include",
    group="model",
    default="",
    usual="none",
    metavar="ROLES",
    help="Further roles to quantize: attention,shared,dense.",
    more="Routed experts always are.",
    shell_complete=completing.roles,
)

# limits
budget = option(
    "--budget",
    group="limits",
    default=None,
    metavar="SIZE",
    help="Size limit: 2.5bpw, 12GiB or 40%.",
    more="bpw counts bits per weight of the quantized matrices; a size, and a share of the source "
    "checkpoint, count the whole checkpoint.",
)
fit = option(
    "--fit",
    group="limits",
    default=None,
    metavar="SIZE",
    help="Fit a GPU of this memory instead, such as 24GiB.",
    more="Cache, activations, the kernels' scratch and the runtime's own share are left room for.",
)
context = option(
    "--context",
    group="limits",
    type=int,
    default=None,
    metavar="N",
    help="Tokens of a sequence that --fit leaves room for, prompt and answer.",
)
batch = option(
    "--batch",
    group="limits",
    type=int,
    default=None,
    usual="1",
    metavar="N",
    help="Sequences at once that --fit leaves room for.",
)
profile = option(
    "--profile",
    group="limits",
    default="gate_eq_up",
    metavar="NAME",
    help="Which matrices share a format.",
    more="It is the rule of the target runtime: free, gate_eq_up, expert, layer_proj, "
    "layer_gateup_down or layer.",
    shell_complete=completing.profiles,
)
target = option(
    "--target",
    group="limits",
    type=OneOf(completing.targets, also={"llama.cpp": "gguf"}),
    default=None,
    usual="any formats",
    metavar="NAME",
    help="Plan for a runtime, such as gguf.",
    more="Only its formats are offered, rounded as it rounds, and --profile is its rule. "
    "bitknap list targets prints all.",
)
pin = option(
    "--pin",
    group="limits",
    multiple=True,
    metavar="PATTERN=BITS",
    help="Fix formats, such as layer=0,proj=down=8.",
    more="A format can stand in place of bits: proj=down=int4-g64-sym. Can be repeated.",
)
limit = option(
    "--limit",
    "limits",
    group="limits",
    multiple=True,
    type=_PATH,
    metavar="FILE",
    help="JSON file with further limits.",
    more="Can be repeated.",
)


def fitted(function: Any) -> Any:
    """Add --fit with --context and --batch; the command gets them as `budget`, a text or None."""

    @wraps(function)
    def with_budget(*words: Any, **values: Any) -> Any:
        asked = [values.pop(name) for name in ("fit", "context", "batch")]
        values["budget"] = _budget_of(values.get("budget"), *asked)
        # Rules on options ask whether there is a budget.
        click.get_current_context().params["budget"] = values["budget"]
        return function(*words, **values)

    return options_of(fit, context, batch)(with_budget)


def sized(function: Any) -> Any:
    """Add --budget, and --fit as another way to say it; the command gets `budget`, or None."""
    return budget(fitted(function))


def _budget_of(
    given: str | None, size: str | None, tokens: int | None, sequences: int | None
) -> str | None:
    if size is None:
        for name, value in (("context", tokens), ("batch", sequences)):
            if value is not None:
                raise InputError(f"--{name} {value}: only --fit takes it; give one, such as 24GiB")
        return given
    if given is not None:
        raise InputError(f"--fit {size}: --budget {given} is a limit too; give one of the two")
    if tokens is None:
        raise InputError(f"--fit {size}: say for how many tokens with --context, such as 32768")
    from bitknap.allocation import Budget

    return str(Budget.device(size, tokens, 1 if sequences is None else sequences))


# solving
solver = option(
    "--solver",
    group="solving",
    type=OneOf(completing.solvers),
    default=None,
    usual="knapsack",
    metavar="NAME",
    help="knapsack, ilp, greedy or search.",
)
gap = option(
    "--gap",
    group="solving",
    type=float,
    default=None,
    usual="0",
    metavar="SHARE",
    help="Stop when a plan is proven to cost at most this share above the optimum, such as 1e-4.",
)
time_limit = option(
    "--time-limit",
    group="solving",
    type=float,
    default=None,
    usual="10 for knapsack, 60 for ilp",
    metavar="SECONDS",
    help="Stop the integer program of HiGHS or CBC after this time.",
)
price = option(
    "--price",
    group="solving",
    is_flag=True,
    help="Show what every profile would cost within the same limits as well.",
)
refine = option(
    "--refine",
    group="solving",
    type=int,
    default=0,
    metavar="N",
    help="Measure N plans around the solution and keep the best; never worse than the best "
    "uniform recipe.",
)
refine_driver = option(
    "--refine-driver",
    group="solving",
    type=OneOf(("posterior", "tpe", "cmaes")),
    default="posterior",
    metavar="NAME",
    former_values={"belief": "posterior"},
    help="How plans to measure are chosen: from a Bayesian model of the costs (posterior), or by a "
    "sampler of Optuna (tpe or cmaes).",
)
refine_tokens = option(
    "--refine-tokens",
    group="solving",
    type=int,
    default=None,
    usual="16384",
    metavar="N",
    help="Number of calibration tokens that plans are measured on.",
)

# rounding
method = option(
    "--method",
    group="rounding",
    type=OneOf(completing.methods),
    default=None,
    usual="rtn",
    metavar="NAME",
    help="rtn, hqq or gptq.",
    more="Costs are measured for this method.",
)
force = option(
    "--force",
    group="rounding",
    is_flag=True,
    help="Allow another --method than the one that the plan was made for.",
)


# output
def output(metavar: str, about: str, *, required: bool = True) -> Declared:
    """Return the option -o/--output of a command, with its metavar and its help text."""
    return option(
        "-o",
        "--output",
        "out",
        group="output",
        required=required,
        default=None,
        metavar=metavar,
        help=about,
        type=click.Path(),
    )


max_shard_size = option(
    "--max-shard-size",
    group="output",
    default="5GB",
    metavar="SIZE",
    help="Maximum size of each safetensors file.",
)
report = option(
    "--report",
    group="output",
    default=None,
    type=click.Path(),
    metavar="FILE",
    help="Write an HTML report to FILE as well.",
)
overwrite = option(
    "--overwrite",
    group="output",
    is_flag=True,
    help="Replace an output that Bitknap wrote.",
)
as_json = option(
    "--json",
    "as_json",
    group="output",
    is_flag=True,
    help="Print one JSON document.",
)
