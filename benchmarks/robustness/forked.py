"""Run an action in a forked child: libraries are imported once, and a kill costs nobody else.

The parent never computes, so that it has one thread and a fork copies all of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

# What a child ends with when an exception left its action; no command uses it.
CRASHED = 70
# What commands import where they need it. The plug-in of transformers cannot be imported before it.
_LIBRARIES = (
    *("torch", "transformers", "transformers.quantizers", "transformers.modeling_utils"),
    *("transformers.models.mixtral.modeling_mixtral", "transformers.models.auto"),
    *("optuna", "highspy", "matplotlib.backends.backend_svg", "scipy.optimize", "rich.console"),
    *("tokenizers", "safetensors.torch", "sqlalchemy", "matplotlib.pyplot"),
)
# Bitknap's own, with all that lies in them.
_PACKAGES = (
    *("bitknap.api", "bitknap.allocation", "bitknap.cli", "bitknap.disk", "bitknap.estimators"),
    *("bitknap.quantization", "bitknap.report", "bitknap.benchmarks.compare"),
)
# Modules that vLLM imports, in its own environment.
_OF_VLLM = "bitknap.quantization.vllm."
# Output beyond this is of no use in a report.
_MOST_OUTPUT = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a child may take.

    Attributes:
        seconds: until it is stopped and counted as hanging.
        processor_seconds: likewise, of the processor's time; None for any number.
        address_bytes: of addresses beyond those that the parent has; None for any number.
        file_bytes: in any one file; None for any number.
    """

    seconds: float = 600.0
    processor_seconds: int | None = None
    address_bytes: int | None = None
    file_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a child ended.

    Attributes:
        status: its exit status; None if a signal ended it.
        late: whether it was stopped because its time was over.
        out: what it wrote to standard output.
        err: what it wrote to standard error.
        seconds: that it took.
        memory: most bytes that were resident, beyond those that a fork begins with.
    """

    status: int | None
    late: bool
    out: str
    err: str
    seconds: float
    memory: int


def prepare() -> None:
    """Import what commands import, so that children share it."""
    import importlib
    import pkgutil

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    for name in _LIBRARIES:
        importlib.import_module(name)
    for package in _PACKAGES:
        paths = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(paths, f"{package}."):
            if not module.name.startswith(_OF_VLLM):
                importlib.import_module(module.name)


def command(*words: str | Path) -> Callable[[], None]:
    """Return the action that runs a command of `bitknap`."""

    def run() -> None:
        import torch

        from bitknap.cli import main

        torch.set_num_threads(1)
        main([str(word) for word in words])

    return run


def fork(
    action: Callable[[], None],
    limits: Limits | None = None,
    *,
    kill_after: float | None = None,
    folder: Path | None = None,
) -> Ended:
    """Run `action` in a child and return how that ended.

    Args:
        action: what the child does; SystemExit gives its exit status.
        limits: what it may take.
        kill_after: seconds until SIGKILL; never when not given.
        folder: that it works in; the parent's when not given.
    """
    allowed = limits or Limits()
    with _output() as out, _output() as err, _output() as begun:
        sys.stdout.flush()
        sys.stderr.flush()
        begin = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(action, allowed, folder, (out.fileno(), err.fileno(), begun.fileno()))
        with contextlib.suppress(OSError):  # the child does so too: whoever is first
            os.setpgid(pid, pid)
        ended = _wait(pid, allowed.seconds if kill_after is None else kill_after)
        _, status, usage = os.wait4(pid, 0)
        with contextlib.suppress(ProcessLookupError):  # whatever the child has started
            os.killpg(pid, signal.SIGKILL)
        return Ended(
            status=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            late=(not ended and kill_after is None) or _stopped(status),
            out=_text(out),
            err=_text(err),
            seconds=time.monotonic() - begin,
            memory=max(0, usage.ru_maxrss * 1024 - int(_text(begun) or 0)),
        )


def _child(
    action: Callable[[], None], limits: Limits, folder: Path | None, files: tuple[int, int, int]
) -> NoReturn:
    status = CRASHED
    try:
        os.setpgid(0, 0)
        _redirect(files[0], files[1])
        if folder is not None:
            os.chdir(folder)
        _limit(limits)
        os.write(files[2], str(_pages(1)).encode())
        action()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(status)


def _redirect(out: int, err: int) -> None:
    """Send both outputs to files, also where a test's capture has replaced the streams."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(descriptor, place)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _limit(limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.address_bytes is not None:
        most = _pages(0) + limits.address_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if limits.processor_seconds is not None:
        now = sum(os.times()[:2])
        most = int(now) + limits.processor_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    if limits.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))


def _wait(pid: int, seconds: float) -> bool:
    """Return whether the child has ended by itself; end it if not."""
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if poll.poll(seconds * 1000):
            return True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return False
    finally:
        os.close(handle)


def _stopped(status: int) -> bool:
    """Return whether a child took more of the processor's time than it may."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU


def _output() -> BinaryIO:
    return os.fdopen(os.memfd_create("output"), "w+b")


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(_MOST_OUTPUT).decode("utf-8", "replace")


def _pages(column: int) -> int:
    """Return bytes of addresses (0) or resident bytes (1) of this process."""
    numbers = Path("/proc/self/statm").read_text().split()
    return int(numbers[column]) * resource.getpagesize()


def small_disk(folder: Path, nbytes: int) -> None:
    """Put an empty disk of so many bytes over a folder; only this process sees it.

    Raises:
        OSError: this machine does not let us mount one.
    """
    libc = _own_mounts()
    options = f"size={nbytes}".encode()
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), "cannot mount")


def read_only(path: Path) -> None:
    """Let a file or folder be one that cannot be written; only this process sees it so.

    Raises:
        OSError: this machine does not let us mount it anew.
    """
    libc, place = _own_mounts(), os.fsencode(path.absolute())
    fixed, again, bound = 1, 1 << 5, 1 << 12  # MS_RDONLY, MS_REMOUNT, MS_BIND
    for flags in (bound, bound | again | fixed):
        if libc.mount(place, place, None, flags, None):
            raise OSError(ctypes.get_errno(), "cannot mount")


def _own_mounts() -> ctypes.CDLL:
    """Give this process mounts of its own, of which no other one sees anything.

    Raises:
        OSError: this machine does not let us.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, mounts = 0x10000000, 0x00020000
    owner, group = os.getuid(), os.getgid()
    if libc.unshare(user | mounts):
        raise OSError(ctypes.get_errno(), "no namespace of our own")
    own = Path("/proc/self")
    for name, text in (("uid_map", owner), ("setgroups", "deny"), ("gid_map", group)):
        (own / name).write_text(f"0 {text} 1" if text != "deny" else "deny")
    private = (1 << 18) | (1 << 14)  # MS_PRIVATE | MS_REC: nothing spreads to other processes
    libc.mount(b"none", b"/", None, private, None)
    return libc
