"""Result files: only files that a benchmark wrote are replaced, and files are complete or absent.

A JSON file has "format" "bitknap.results" and a version; a report begins with a comment that names
its generator; pictures name it in their metadata.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitknap.disk.atomic import check_version, read_json, write_whole
from bitknap.disk.manifest import REPORT_MARK
from bitknap.disk.outputs import check_output
from bitknap.errors import BitknapError, FileError

KIND, VERSION = "bitknap.results", "1.0"
HEADER: Mapping[str, str] = {"format": KIND, "version": VERSION}


def claim(parser: argparse.ArgumentParser, out: Path, *names: str) -> None:
    """Make the folder of results; end the program with one line if another tool wrote a file.

    Args:
        parser: parser of the program, which ends with status 2.
        out: the folder.
        names: names of the files that will be written there.
    """
    try:
        check_results(out, *names)
        out.mkdir(parents=True, exist_ok=True)
    except BitknapError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:
        parser.exit(2, f"{error.filename}: {error.strerror}; choose another folder\n")


def check_results(out: Path, *names: str) -> None:
    """Raise an error unless a benchmark may write all of its files.

    Raises:
        InputError: a file cannot be written, or no benchmark wrote it.
        FileError: existing results cannot be read, or have another version.
    """
    for name in names:
        path = out / name
        check_output(path, "file", overwrite=True)
        if path.suffix == ".json":
            read_results(path)


def read_results(path: Path) -> dict[str, Any]:
    """Return the results in a file without its format and version; none if there is no file.

    Raises:
        FileError: the file cannot be read, or does not hold results.
    """
    if not os.path.lexists(path) or not path.stat().st_size:
        return {}
    document = read_json(path)
    if not isinstance(document, dict):
        raise FileError(f"{path}: holds no results of a benchmark; move it away")
    check_version(document, KIND, VERSION, path)
    return {name: value for name, value in document.items() if name not in HEADER}


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON values as a results file, completely or not at all."""
    write_whole(path, (json.dumps({**HEADER, **document}, indent=1) + "\n").encode())


def write_report(path: Path, markdown: str) -> None:
    """Write a Markdown report that names its generator, completely or not at all."""
    write_whole(path, f"{REPORT_MARK}\n{markdown}".encode())
