"""`bitknap evaluate`: perplexity of a model, and KL to a reference."""

from __future__ import annotations

import click

from bitknap.cli.options.rules import check_options
from bitknap.cli.options.solving import as_json_option, given, seed_option, text_option
from bitknap.cli.terminal import present, progress_bars
from bitknap.quiet import silence_transformers


@click.command()
@click.argument("model")
@click.option("--reference", default=None, help="What KL and agreement refer to.")
@click.option("--uniform", is_flag=True, help="Also the best uniform recipe at the same bytes.")
@text_option("Evaluation")
@click.option("--tokens", type=int, default=None, help="Evaluation tokens. Default: 32768.")
@seed_option
@as_json_option
def evaluate(
    model: str,
    reference: str | None,
    uniform: bool,
    text: str,
    tokens: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure MODEL's perplexity; with a reference also KL, its standard error and agreement.

    Example: bitknap evaluate out --reference reference:mixtral
    """
    from bitknap.api import quantizing
    from bitknap.api.evaluation import rows_for
    from bitknap.cli.views.tables import losses_table

    check_options("evaluate")
    silence_transformers()
    with progress_bars() as progress:
        count = given(tokens, quantizing.EVALUATION_TOKENS)
        rows = rows_for(model, reference, text, count, uniform=uniform, progress=progress)
    present(as_json, rows, losses_table(rows))
