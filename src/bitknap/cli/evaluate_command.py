"""`bitknap evaluate`: measures the perplexity of a model, and its KL to a reference."""

from __future__ import annotations

from typing import Any

import click

from bitknap.cli.options import common, completing, measuring
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import option
from bitknap.cli.options.estimating import computing_of
from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import given
from bitknap.cli.terminal import present, progress_bars
from bitknap.quiet import silence_transformers


@click.command(
    cls=Command, examples=("bitknap evaluate out --reference reference:mixtral --uniform",)
)
@common.model.but(about="Packed or plain model: folder or Hugging Face id.")
@option(
    "--reference",
    group="evaluation",
    default=None,
    metavar="MODEL",
    help="Model to compare with.",
    more="KL and the agreement of top tokens refer to it.",
    shell_complete=completing.models,
)
@option(
    "--uniform",
    group="evaluation",
    is_flag=True,
    help="Evaluate the best uniform recipe of that size too.",
)
@measuring.text.but(group="evaluation", help="Evaluation text: file or builtin.")
@measuring.tokens.but(group="evaluation", usual="32768", help="Number of evaluation tokens.")
@measuring.max_memory.but(group="evaluation")
@measuring.device.but(group="evaluation")
@measuring.dtype.but(group="evaluation")
@measuring.device_memory.but(group="evaluation")
@measuring.seed.but(group="evaluation")
@common.as_json
def evaluate(
    model: str, reference: str | None, uniform: bool, as_json: bool, **options: Any
) -> None:
    """Measure the perplexity of MODEL and, with --reference, its KL to that model."""
    from bitknap.api.evaluation import EVALUATION_TOKENS, Evaluation, rows_for
    from bitknap.cli.views.tables import losses_table

    check_options("evaluate")
    silence_transformers()
    with progress_bars() as progress:
        on = Evaluation(
            text=options["text"],
            tokens=given(options["tokens"], EVALUATION_TOKENS),
            **computing_of(options),
        )
        rows = rows_for(model, reference, on, uniform=uniform, progress=progress)
    present(as_json, rows, losses_table(rows))
