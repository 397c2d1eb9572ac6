"""What a contributor runs beside `make`: other Pythons, least versions, style, docs, a release.

`nox -l` lists the sessions, `nox -s NAME` runs one. An interpreter that is not there is skipped.
"""

import tempfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = False
PYTEST = ("python", "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
QUICK = ("-m", "not slow and not runtime and not campaign")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Run the quick part of the tests with the newest versions; all of them with `-- --all`."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    whole = "--all" in session.posargs
    rest = [word for word in session.posargs if word != "--all"]
    session.run(*PYTEST, *(() if whole else QUICK), *rest, env=ONE_THREAD)


@nox.session(python="3.11")
def minimum(session: nox.Session) -> None:
    """Run the quick part of the tests with the least versions that pyproject.toml allows."""
    session.install("-c", "constraints-minimum.txt", "-e", ".[test]")
    session.run(*PYTEST, *QUICK, *session.posargs, env=ONE_THREAD)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Run ruff, mypy and codespell."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("codespell")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """Build the documentation; any warning fails."""
    session.install("-c", "constraints.txt", "-e", ".[docs]")
    session.run("mkdocs", "build", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python="3.11")
def release(session: nox.Session) -> None:
    """Build the wheel and the source distribution into dist/ and check what an index shows."""
    session.install("build", "twine")
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder)
        made = sorted(str(file) for file in Path(folder).iterdir())
        session.run("twine", "check", "--strict", *made)
        Path("dist").mkdir(exist_ok=True)
        for file in map(Path, made):
            (Path("dist") / file.name).write_bytes(file.read_bytes())
