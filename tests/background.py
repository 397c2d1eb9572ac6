"""Commands that tests kill: each in a process of its own that has imported everything already.

A fresh interpreter imports for seconds before the command begins. Here one server per process of
tests imports once, and every command is forked from it.
"""

import functools
import importlib
import multiprocessing
import os
import signal
import sys
import time


class Command:
    """A running command of Bitknap, with the methods of `subprocess.Popen` that tests use.

    Attributes:
        returncode: its exit status, negative for a signal; None while it runs.
    """

    def __init__(self, words, folder, slowed=(), setup="", threads=1):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.background", "bitknap.api.quantizing"])
        self._files = folder / "stdout", folder / "stderr"
        self._process = context.Process(
            target=_run, args=(list(map(str, words)), self._files, slowed, setup, threads)
        )
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self):
        self._process.kill()

    def wait(self, timeout=None):
        self._process.join(timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(path.read_text() if path.exists() else "" for path in self._files)

    def runs_until(self, path, lines, seconds=120):
        """Wait until a file has more than so many lines, while the command runs."""
        deadline = time.monotonic() + seconds
        while not (path.exists() and path.read_bytes().count(b"\n") > lines):
            assert self.poll() is None, self.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)


def _run(words, files, slowed, setup, threads):
    """Run the command line, slowed down before calls of methods, so that kills fall anywhere."""
    import torch

    from bitknap.cli import main

    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    exec(setup)
    for name, seconds in slowed:
        _slow_down(name, seconds)
    sys.argv = ["bitknap", *words]
    try:
        main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _slow_down(name, seconds):
    module, kind, method = name.rsplit(".", 2)
    owner = getattr(importlib.import_module(module), kind)
    real = getattr(owner, method)

    @functools.wraps(real)
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return real(*args, **kwargs)

    setattr(owner, method, slow)
