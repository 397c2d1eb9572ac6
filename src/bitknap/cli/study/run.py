"""`bitknap study run`: measured plans; as many processes as there are workers may run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from bitknap.cli.options import common, completing, measuring
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import option
from bitknap.cli.options.solving import given
from bitknap.cli.study import stored
from bitknap.errors import InputError, MismatchError
from bitknap.quiet import silence_transformers

if TYPE_CHECKING:
    from bitknap.allocation import BitPlan
    from bitknap.allocation.search.study import Study, Together

# What `run` measures, as the study and its plans say.
_WHAT = "KL, nats/token"


@click.command(
    cls=Command,
    examples=(
        "bitknap study run s --storage sqlite:///s.db \\\n"
        "             --model reference:mixtral --trials 20",
    ),
    usual=("name", "storage", "model", "trials", "text", "tokens", "max_memory", "as_json"),
)
@stored.name
@stored.storage
@option(
    "--model",
    group="model",
    required=True,
    metavar="MODEL",
    help="Model that the table was made on.",
    shell_complete=completing.models,
)
@option(
    "--trials",
    group="study",
    type=int,
    default=20,
    metavar="N",
    help="Number of trials to complete.",
)
@measuring.text.but(default=None, usual="builtin")
@measuring.tokens.but(usual="8192, or as before")
@measuring.max_memory
@measuring.device
@measuring.device_memory
@measuring.dtype
@stored.moved
@stored.features
@common.as_json
def run(
    name: str,
    storage: str,
    model: str,
    trials: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the KL of plans to the unquantized model, until trials are complete.

    Start it once for each worker; workers share the study through its storage.
    """
    from bitknap.allocation.search.study import load
    from bitknap.allocation.search.study import run as go
    from bitknap.cli.views.study_view import present_study, watching

    study = load(name, storage, table=options["table"], features=options["features"])
    measure, measured = _measurement(study, model, options)
    with watching(trials, as_json) as watch:
        go(study, measure, trials, measured=measured, watch=watch)
    present_study(study, as_json)


def _measurement(
    study: Study, model: str, options: dict[str, Any]
) -> tuple[Together, dict[str, Any]]:
    """Return how plans are measured on the model, and what identifies the measurement."""
    from bitknap.allocation.search.study import Together
    from bitknap.api import calibration, plan_measures, quantizing
    from bitknap.api.requests import Calibration
    from bitknap.cli.options.estimating import size_of
    from bitknap.estimators.measuring.text import BUILTIN, read_text
    from bitknap.estimators.sweep.in_memory import digest_of
    from bitknap.quantization.packed import writer
    from bitknap.quantization.packed.buildable import check
    from bitknap.quantization.packed.folder import roles_of
    from bitknap.quantization.source.architecture import config_of
    from bitknap.quantization.source.checkpoint import Checkpoint, resolve
    from bitknap.quantization.source.devices import dtype_name

    text = options["text"]
    asked = Calibration(
        include=roles_of(study.table.units),
        device=options["device"],
        dtype=options["dtype"],
        max_memory=size_of(options["max_memory"]),
        device_memory=size_of(options["device_memory"], "--device-memory"),
    )
    silence_transformers()
    source = Checkpoint.open(resolve(model))
    if source.fingerprint != study.about["model"]:
        raise MismatchError(
            f"{model}: not the model that the table of study {study.name!r} was made on; "
            "pass that model, or make a table of this one"
        )
    words = read_text(text or BUILTIN, "calibration")
    if words == read_text(BUILTIN, "evaluation"):
        raise InputError(f"--text {text}: the evaluation text; a study must not see it")
    count = given(options["tokens"], study.measured.get("tokens", quantizing.CALIBRATION_TOKENS))
    check(source.folder, reads_text=True)
    writer.check_finite(source)
    config = config_of(source.folder)
    document = calibration.encoded(source.folder, words, config)
    windows = document.windows(count, calibration.longest_of(config))
    evidence, sample = plan_measures.on_text(source, windows, asked)

    def measure(plans: Sequence[BitPlan]) -> list[float]:
        losses = plan_measures.losses_of(evidence, sample, plans)
        return [float(one.kl.mean()) for one in losses]

    dtype = dtype_name(asked.products)
    return Together(measure=measure, count=plan_measures.together(sample)), {
        "what": _WHAT,
        "model": source.fingerprint,
        "tokens": windows.ids.numel(),
        "text": digest_of(windows.ids),
        # Studies from before there was a choice computed in float32.
        **({} if dtype == "float32" else {"dtype": dtype}),
    }
