"""The table of options: each is declared once here, and used by every command that has it.

So a word has one spelling, one default and one help text everywhere. A default that is made later
is shown with `usual`; tests compare it with the constant of the library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitknap.cli.options import completing
from bitknap.cli.options.declare import Declared, OneOf, argument, option

# Names of solvers at the command line, and where their classes are; imported when asked for.
SOLVERS = {
    "knapsack": "bitknap.allocation.solvers.knapsack:Knapsack",
    "ilp": "bitknap.allocation.solvers.ilp:Ilp",
    "greedy": "bitknap.allocation.solvers.greedy:Greedy",
    "search": "bitknap.allocation.search.solver:Search",
}
_PATH: Any = click.Path(path_type=Path)

# model
model = argument(
    "model",
    "Folder, Hugging Face id, or bundled: reference:mixtral.",
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

# measuring
estimator = option(
    "--estimator",
    group="measuring",
    default="calibrated",
    metavar="NAMES",
    help="How costs are measured.",
    more="Names are calibrated[,BASE[,SIGNAL…]], fuzzy[,BASE] or BASE alone: "
    "moments, fisher, fisher-output, weight-error, data-free, measured-kl or a signal.",
    shell_complete=completing.estimators,
)
text = option(
    "--text",
    group="measuring",
    default="builtin",
    usual="builtin",
    metavar="FILE",
    help="Calibration text: file or builtin.",
    shell_complete=completing.texts,
)
texts = text.but(
    multiple=True,
    default=("builtin",),
    help="Calibration text: file or builtin.",
    more="Repeat the option to measure on several texts.",
)
tokens = option(
    "--tokens",
    group="measuring",
    type=int,
    default=None,
    usual="8192",
    metavar="N",
    help="Number of calibration tokens.",
)
max_memory = option(
    "--max-memory",
    group="measuring",
    default=None,
    usual="no limit",
    metavar="SIZE",
    help="Memory to use, such as 12GiB.",
    more="Larger models are measured layer by layer.",
)
seed = option("--seed", group="measuring", default=0, metavar="N", help="Random seed.")
calibrate = option(
    "--calibrate",
    group="measuring",
    type=int,
    default=None,
    usual="a few bit widths of each group",
    metavar="N",
    help="Take at most N measurements to calibrate the costs of groups.",
)
check = option(
    "--check",
    group="measuring",
    type=int,
    default=0,
    metavar="N",
    help="Estimator calibrated: measure N held-out plans as well, and report how well they were "
    "predicted.",
)
journal = option(
    "--journal",
    group="measuring",
    type=_PATH,
    default=None,
    usual="beside the output, deleted at the end",
    metavar="FILE",
    help="Estimators measured-…: keep the measurements in FILE, also when the table is done.",
)
samples = option(
    "--samples",
    group="measuring",
    type=_PATH,
    default=None,
    metavar="FILE",
    help="Estimator fuzzy: file of measured cells, .safetensors; written if it does not exist.",
)
measurements = option(
    "--measurements",
    group="measuring",
    type=int,
    default=None,
    usual="one cell in fifteen",
    metavar="N",
    help="Estimator fuzzy: measure at most N cells.",
)
initial_router = option(
    "--initial-router",
    group="measuring",
    default=None,
    usual="trained routers alone",
    metavar="MODEL",
    help="Estimator router-norm: the model before training, whose routers are compared.",
    shell_complete=completing.models,
)
protect_bits = option(
    "--protect-bits",
    group="measuring",
    type=int,
    default=4,
    metavar="N",
    help="Give super experts at least N bits: experts whose outputs are far larger than those of "
    "their layer. 0 protects none.",
)
robust = option(
    "--robust",
    group="measuring",
    type=OneOf(("mean", "worst", "mean+sd")),
    default=None,
    usual="mean",
    metavar="RULE",
    help="How the costs of several texts become one cost: mean, worst or mean+sd.",
)
risk = option(
    "--risk",
    group="measuring",
    type=float,
    default=None,
    usual="1",
    metavar="K",
    help="Rule mean+sd: add K standard deviations to the mean.",
)

# formats
formats = option(
    "--formats",
    "bits",
    group="formats",
    default="",
    usual="1,2,3,4,5,6,7,8",
    metavar="BITS",
    help="Bit widths to offer.",
    shell_complete=completing.widths,
)
group_size = option(
    "--group-size",
    group="formats",
    default="",
    usual="32,64,128,256,row",
    metavar="SIZES",
    help="Numbers of weights that share a scale; row is a whole row.",
    shell_complete=completing.group_sizes,
)
metadata = option(
    "--metadata",
    group="formats",
    default="",
    usual="fp16,compact",
    metavar="KINDS",
    help="How scales and zero points are stored: fp16, compact, compact6 or several.",
    shell_complete=completing.metadata,
)
keep = option(
    "--keep",
    group="formats",
    is_flag=True,
    help="Also allow leaving a matrix unquantized.",
)
row_blocks = option(
    "--row-blocks",
    group="formats",
    type=int,
    default=1,
    metavar="N",
    help="Cut each matrix into N blocks of rows, each with its own format.",
)
permute = option(
    "--permute",
    group="formats",
    is_flag=True,
    help="Sort the neurons of experts by sensitivity first, so that row blocks differ. Needs "
    "--row-blocks and a temporary copy of the model next to the output.",
)
rotate = option(
    "--rotate",
    group="formats",
    is_flag=True,
    help="Rotate the residual stream by random Hadamard transforms first. Needs a temporary copy "
    "of the model next to the output.",
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

# solving
solver = option(
    "--solver",
    group="solving",
    type=OneOf(tuple(SOLVERS)),
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
    type=OneOf(("rtn", "hqq", "gptq")),
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
    """Return the option -o/--output of a command: what it writes, and what that is called."""
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
