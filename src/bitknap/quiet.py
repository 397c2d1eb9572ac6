"""Keep transformers quiet: what matters on the terminal is ours."""

from __future__ import annotations


def silence_transformers() -> None:
    """Keep transformers from drawing bars and telling what it loads."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
