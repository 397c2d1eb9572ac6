"""The table of options, second part: how costs are measured, and for which formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bitknap.cli.options import completing
from bitknap.cli.options.declare import OneOf, option

_PATH: Any = click.Path(path_type=Path)

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
    more="Larger models are run layer by layer.",
)
thorough = option(
    "--thorough",
    group="measuring",
    is_flag=True,
    help="Round all rows of every matrix, not a sample of them, and measure every group by itself.",
    more="It takes many times as long on large models.",
)
device = option(
    "--device",
    group="measuring",
    default="auto",
    usual="auto",
    metavar="NAME",
    help="Where to compute: auto, cpu, cuda or cuda:N.",
    more="auto is the first GPU, if there is one.",
)
dtype = option(
    "--dtype",
    group="measuring",
    default="auto",
    usual="auto",
    metavar="NAME",
    help="Dtype of matrix products in running models: auto, float32 or bfloat16.",
    more="auto is bfloat16 on a GPU and float32 on the CPU; all else is computed in float32.",
)
device_memory = option(
    "--device-memory",
    group="measuring",
    default=None,
    usual="what is free",
    metavar="SIZE",
    help="Memory of a GPU to use, such as 20GiB.",
    more="Larger models are run layer by layer.",
)
measure_time = option(
    "--measure-time",
    group="measuring",
    default=None,
    usual="no limit",
    metavar="TIME",
    help="Take no further measurement of groups after a time such as 30min.",
    more="Groups that were not measured by then share a gain, so the table depends on how fast the "
    "machine is. The most valuable measurements come first.",
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
