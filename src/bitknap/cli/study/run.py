"""`bitknap study run`: measured plans; as many processes as there are workers may run it."""

from __future__ import annotations

from collections.abc import Callable
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
    from bitknap.allocation.search.study import Study

# What `run` measures, as the study and its plans say.
_WHAT = "KL, nats/token"


@click.command(
    cls=Command,
    examples=(
        "bitknap study run s --storage sqlite:///s.db \\\n"
        "             --model reference:mixtral --trials 20",
    ),
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
@measuring.device
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
) -> tuple[Callable[[Any], float], dict[str, Any]]:
    """Return how a plan is measured on the model, and what identifies the measurement."""
    import torch

    from bitknap.api import calibration, quantizing
    from bitknap.estimators.measuring.kl_replay import Replay
    from bitknap.estimators.measuring.language_model import loaded
    from bitknap.estimators.measuring.text import BUILTIN, read_text
    from bitknap.estimators.sweep.in_memory import digest_of
    from bitknap.quantization.models.live_model import walk
    from bitknap.quantization.packed import writer
    from bitknap.quantization.packed.buildable import check
    from bitknap.quantization.packed.folder import roles_of
    from bitknap.quantization.source.checkpoint import Checkpoint, resolve
    from bitknap.quantization.source.devices import device_of, dtype_name, dtype_of
    from bitknap.quantization.stacks.apply import applied

    text, device = options["text"], device_of(options["device"])
    dtype = dtype_of(options["dtype"], device)
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
    live = loaded(source.folder, device, dtype)
    layout = walk(live, roles_of(study.table.units))
    document = calibration.encoded(source.folder, words, live.config)
    windows = document.windows(count, calibration.longest_of(live.config))
    replay = Replay(live, layout, windows, cache=False)

    def measure(plan: Any) -> float:
        with applied(live, layout, plan):
            return replay.kl()

    return measure, {
        "what": _WHAT,
        "model": source.fingerprint,
        "tokens": windows.ids.numel(),
        "text": digest_of(windows.ids),
        # Studies from before there was a choice computed in float32.
        **({} if dtype == torch.float32 else {"dtype": dtype_name(dtype)}),
    }
