"""Turn transformers' errors on a model that it cannot read, build or run into Bitknap's.

It is not documented which exceptions transformers, its validators and torch below them raise, so
all are converted, but only if they come out of that code. Exceptions of Bitknap's own code, or of a
user's hook on a model, pass through: they are defects there, whoever called it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import TracebackType

from bitknap.errors import BitknapError, ModelError

_MOST = 300
# Packages that transformers calls, beside the standard library.
_BELOW = frozenset(
    (
        *(
            "torch",
            "torchvision",
            "torchaudio",
            "numpy",
            "PIL",
            "timm",
            "accelerate",
            "safetensors",
        ),
        *("huggingface_hub", "httpx", "packaging", "yaml", "regex", "jinja2"),
        *("tokenizers", "sentencepiece", "mamba_ssm", "causal_conv1d", "flash_attn"),
    )
)


@contextlib.contextmanager
def calling_transformers(
    what: str, remedy: str = "", kind: type[BitknapError] = ModelError
) -> Iterator[None]:
    """Turn errors that come out of transformers' code into one line, while the block runs.

    Args:
        what: the part of the message before the reason, such as "out: cannot read config.json".
        remedy: the part after it.
        kind: class of the error to raise.

    Raises:
        BitknapError: transformers refused; of the class `kind`, with the cause chained.
    """
    try:
        yield
    except (BitknapError, MemoryError):
        raise
    except Exception as error:
        if not _raised_by_transformers(error.__traceback__):
            raise
        after = f"; {remedy}" if remedy else ""
        raise kind(f"{what} ({_reason(error)}){after}") from error


def _raised_by_transformers(trace: TracebackType | None) -> bool:
    """Return whether the innermost frame is one of transformers, or of what it calls itself."""
    inside = False
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        below = package in _BELOW or package in sys.stdlib_module_names
        inside = package == "transformers" or (inside and below)
        trace = trace.tb_next
    return inside


def _reason(error: Exception) -> str:
    """Return what an exception says, in one line of bounded length."""
    kind, words = type(error).__name__, " ".join(str(error).split())
    if len(words) > _MOST:
        words = f"{words[:_MOST]} …"
    return f"{kind}: {words}" if words else kind
