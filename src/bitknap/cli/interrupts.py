"""Ctrl-C and SIGTERM: long commands end with one line that says what they keep."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM; code that handles Ctrl-C handles it too."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM in the block into one line on stderr and exit status 130 or 143."""
    before: Any = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"bitknap: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(143 if isinstance(error, Terminated) else 130)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated
