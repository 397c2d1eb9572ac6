"""Commands in processes of their own, with the time and the memory that each takes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitknap.errors import BitknapError

_POLL = 0.05  # seconds


@dataclass(slots=True)
class _Seen:
    """What was seen of a process: its peak of resident memory, in bytes."""

    peak: int = 0


def watched(arguments: Sequence[str]) -> dict[str, float]:
    """Run a command of Bitknap to its end.

    Args:
        arguments: the words after `bitknap`.

    Returns:
        Its "seconds", its "processor_seconds" over all cores, and "peak_bytes" of resident memory.

    Raises:
        BitknapError: the command failed.
    """
    before, start = _processor_seconds(), time.perf_counter()
    seen = _Seen()
    with _started(arguments) as child:
        while child.poll() is None:
            _look(child.pid, seen)
            time.sleep(_POLL)
        errors = child.stderr.read() if child.stderr else ""
    if child.returncode:
        last = (errors.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise BitknapError(f"bitknap {arguments[0]}: {last}")
    if not seen.peak:  # no /proc: use the largest child so far
        usage = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        seen.peak = usage * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": _processor_seconds() - before,
        "peak_bytes": seen.peak,
    }


def killed_after(arguments: Sequence[str], seconds: float) -> dict[str, float] | None:
    """Run a command of Bitknap, and kill it after some seconds.

    Args:
        arguments: the words after `bitknap`.
        seconds: when it is killed.

    Returns:
        The "seconds" it ran and "peak_bytes" of resident memory; None if it ended by itself.
    """
    start, seen = time.perf_counter(), _Seen()
    with _started(arguments) as child:
        while time.perf_counter() - start < seconds:
            if child.poll() is not None:
                return None
            _look(child.pid, seen)
            time.sleep(_POLL)
        child.send_signal(signal.SIGKILL)
    return {"seconds": time.perf_counter() - start, "peak_bytes": seen.peak}


def _started(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bitknap", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _look(process: int, seen: _Seen) -> None:
    """Update the peak memory of a process; nothing if the system does not report it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    if lines:
        seen.peak = max(seen.peak, int(lines[0].split()[1]) * 1024)


def _processor_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system
