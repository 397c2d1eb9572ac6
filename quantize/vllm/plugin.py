"""The entry point that vLLM calls in each of its processes, before it reads a configuration.

It must not fail: it is called for every model, also those that Bitknap has nothing to do with.
"""

from __future__ import annotations

import logging

_LOG = logging.getLogger(__name__)
LEAST = "0.32"


def register() -> None:
    """Tell vLLM how packed checkpoints are read; may be called several times."""
    try:
        import bitknap.quantization.vllm.quantization  # noqa: F401 - importing it registers
    except ImportError as error:
        _LOG.warning(
            "Bitknap cannot serve packed checkpoints with this vLLM (%s): install vLLM %s or a "
            "newer Bitknap",
            error,
            LEAST,
        )
