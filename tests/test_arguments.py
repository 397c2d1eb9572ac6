"""Arguments that benchmarks share."""

import argparse
from pathlib import Path

import pytest

from bitknap.arguments import add_output


def parsed(*words, required=True):
    parser = argparse.ArgumentParser(prog="program")
    add_output(parser, "Folder to write.", required=required)
    return parser.parse_args(words).out


def test_the_new_spellings(capsys):
    assert parsed("-o", "a") == parsed("--output", "a") == parsed("--output=a") == Path("a")
    assert parsed(required=False) is None
    assert capsys.readouterr().err == ""


def test_the_old_spelling_works_and_warns(capsys):
    assert parsed("--out", "a") == Path("a")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "program: the option --out is deprecated and goes away in the next version: use --output"
    ]


def test_one_of_them_is_needed(capsys):
    with pytest.raises(SystemExit):
        parsed()
    with pytest.raises(SystemExit):
        parsed("-o", "a", "--out", "b")
    assert "--output" in capsys.readouterr().err
