"""Environments of other runtimes for tests, which are skipped where one cannot be made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitknap.benchmarks.runtimes import environments
from bitknap.errors import InputError


def environment(name: str) -> Path:
    """Return the Python of a runtime's environment; skip the calling test if there is none."""
    try:
        return environments.environment(name)
    except InputError as error:
        pytest.skip(str(error))


def ask(name: str, script: str, question: Any, **how: Any) -> Any:
    """Run a script in a runtime's environment and return its answer; see `environments.ask`."""
    environment(name)
    return environments.ask(name, script, question, **how)
