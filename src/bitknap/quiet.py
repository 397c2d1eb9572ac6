"""Keep transformers quiet: only Bitknap writes to the terminal."""

from __future__ import annotations


def silence_transformers() -> None:
    """Keep transformers from drawing progress bars and logging what it loads."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
