"""What a shell completes: names that options and arguments take, without loading torch.

Importing the estimators takes seconds, so their names are written here; a test compares them with
the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem

MODELS = ("reference:mixtral", "reference:qwen3moe")
ESTIMATORS = (
    "calibrated",
    "fuzzy",
    "alphaq",
    "autoround",
    "channel",
    "data-free",
    "exl2",
    "fisher",
    "fisher-output",
    "frequency",
    "hessian-trace",
    "kurtosis",
    "max-var",
    "mc-moe",
    "measured-block",
    "measured-kl",
    "measured-layer",
    "moments",
    "outlier-ratio",
    "owq",
    "random",
    "router-norm",
    "routing-weight",
    "row-variance",
    "uniform",
    "weight-error",
)
STRATEGIES = ("quick", "all", "published", "uniform")
KNOBS = ("tilts", "risk", "formats", "floor", "cap", "exponents")
PROFILES = ("free", "gate_eq_up", "expert", "layer_proj", "layer_gateup_down", "layer")

_Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _listed(names: Sequence[str]) -> _Complete:
    """Return what completes the last name of a list with commas."""

    def complete(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
        before, comma, last = typed.rpartition(",")
        used = before.split(",")
        left = [name for name in names if name.startswith(last) and name not in used]
        return [CompletionItem(f"{before}{comma}{name}") for name in left]

    return complete


def _or_path(names: Sequence[str], kind: str) -> _Complete:
    """Return what completes one of the names, or a path of a kind: "file" or "dir"."""

    def complete(ctx: click.Context, param: click.Parameter, typed: str) -> list[CompletionItem]:
        # bash forgets what stands before a path, so the names come last.
        named = [CompletionItem(name) for name in names if name.startswith(typed)]
        return [CompletionItem(typed, type=kind), *named]

    return complete


models = _or_path(MODELS, "dir")
texts = _or_path(("builtin",), "file")
estimators = _listed(ESTIMATORS)
profiles = _listed(PROFILES)
roles = _listed(("attention", "shared", "dense"))
widths = _listed(tuple("12345678"))
group_sizes = _listed(("32", "64", "128", "256", "row"))
metadata = _listed(("fp16", "compact", "compact6"))
strategies = _listed(STRATEGIES)
knobs = _listed(KNOBS)
