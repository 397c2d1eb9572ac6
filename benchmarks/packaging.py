"""Size of the wheel and its contents, and the time of `import bitknap`.

    python -m bitknap.benchmarks.packaging -o benchmarks/results

Builds from the checkout that contains this module, with setuptools and without a network. Writes
`packaging.json` and `packaging.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from bitknap.arguments import add_output
from bitknap.benchmarks.result_files import claim, write_report, write_results
from bitknap.errors import InputError

_HERE = Path(__file__).resolve()
# Sources of the package; nothing else in a checkout affects a build.
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src")
_FOLDERS = ("allocation", "benchmarks", "estimators", "kernels", "quantize")
_IMPORTS = 10


def checkout() -> Path:
    """Return the root of the checkout that contains this module.

    Raises:
        InputError: the module is installed, so there is no checkout to build from.
    """
    root = _HERE.parent.parent
    if not (root / "pyproject.toml").is_file():
        raise InputError(f"{root}: no pyproject.toml; run this in a checkout of the sources")
    return root


def build(root: Path, out: Path, kind: str) -> Path:
    """Build a distribution from a copy of the sources, with the installed setuptools.

    Args:
        root: a checkout, or an unpacked source distribution.
        out: folder to write into.
        kind: "wheel" or "sdist".

    Returns:
        The file.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "sources"
        copy.mkdir()
        for name in (*_SOURCES, *_FOLDERS):
            source = root / name
            if source.is_dir():
                unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
                shutil.copytree(source, copy / name, symlinks=True, ignore=unwanted)
            else:
                shutil.copy(source, copy / name)
        script = f"from setuptools.build_meta import build_{kind} as b; print(b({str(out)!r}))"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise InputError(f"{kind}: {done.stderr.strip().splitlines()[-1]}")
    return out / done.stdout.split()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    """Return the files in a wheel, by name."""
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def unpacked(sdist: Path, folder: Path) -> Path:
    """Unpack a source distribution and return the folder of its sources."""
    with tarfile.open(sdist) as archive:
        # Python 3.11 has filters since 3.11.4.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    return next(path for path in folder.iterdir() if path.is_dir())


def import_seconds(times: int = _IMPORTS) -> list[float]:
    """Return the seconds of `import bitknap` in fresh interpreters, from `-X importtime`."""
    seconds = []
    for _ in range(times):
        words = [sys.executable, "-X", "importtime", "-c", "import bitknap"]
        lines = subprocess.run(words, capture_output=True, text=True, check=True).stderr
        total = next(x for x in lines.splitlines() if x.split("|")[-1].strip() == "bitknap")
        seconds.append(int(total.split("|")[1]) / 1e6)
    return seconds


def measured(root: Path) -> dict[str, Any]:
    """Return sizes and times, and the facts that they depend on."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        wheel, sdist = build(root, out, "wheel"), build(root, out, "sdist")
        inside = contents(wheel)
        sizes = {
            "wheel": wheel.stat().st_size,
            "sdist": sdist.stat().st_size,
            "installed": sum(map(len, inside.values())),
            "bundled models and texts": sum(
                len(value) for name, value in inside.items() if "/benchmarks/reference/" in name
            ),
        }
    seconds = import_seconds()
    return {
        "bytes": sizes,
        "files": len(inside),
        "import_seconds": {"least": min(seconds), "median": statistics.median(seconds)},
        "about": {
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("numpy", "setuptools")},
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the page of a measurement."""
    about, seconds = results["about"], results["import_seconds"]
    rows = [f"| {name} | {size:,} |" for name, size in results["bytes"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return "\n".join(
        [
            "# What is shipped, and what an import takes",
            "",
            "Repeat it with `python -m bitknap.benchmarks.packaging -o benchmarks/results`.",
            "",
            "| what | bytes |",
            "|---|---:|",
            *rows,
            "",
            f"The wheel has {results['files']} files.",
            "",
            f"`import bitknap` takes {seconds['median']:.3f} s, at least {seconds['least']:.3f} s "
            f"({_IMPORTS} fresh interpreters, `-X importtime`; {versions}; {about['cores']} cores "
            f"with a load of {about['load']:.1f}). It imports neither torch nor transformers.",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measure and write from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output(parser, "Folder to write.")
    out = parser.parse_args(argv).out
    claim(parser, out, "packaging.json", "packaging.md")
    results = measured(checkout())
    write_results(out / "packaging.json", results)
    write_report(out / "packaging.md", markdown(results))


if __name__ == "__main__":
    main()
