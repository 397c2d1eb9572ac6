"""Help texts: one screen for most people, all options on request, the same words everywhere."""

import re

import click
import pytest

from bitknap.cli import main
from bitknap.cli.command import bitknap
from bitknap.cli.options.declare import GROUPS, Argument, Option

# Options whose help or default differs between commands, because what they mean does.
_OF_ITS_OWN = {
    ("evaluate", "--text"),
    ("evaluate", "--tokens"),
    ("compare", "--group-size"),
    ("compare", "--metadata"),
    ("compare", "--refine"),
    ("compare", "--budget"),
    ("export", "--model"),
    ("import", "--model"),
    ("inspect", "--device-memory"),
    ("quantize", "--method"),
    ("study create", "--budget"),
    ("study create", "--table"),
    ("study best", "--budget"),
    ("study run", "--tokens"),
}
# Options that may be repeated in some commands only: their help says so.
_REPEATED = {"--text"}


def walk(group, path=()):
    """Yield each command with its words, groups too."""
    context = click.Context(group, info_name=" ".join(("bitknap", *path)))
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield " ".join((*path, name)), command
        if isinstance(command, click.Group):
            yield from walk(command, (*path, name))


COMMANDS = dict(walk(bitknap))
LEAVES = {name: one for name, one in COMMANDS.items() if not isinstance(one, click.Group)}


def options(command):
    return [one for one in command.params if isinstance(one, Option) and not one.hidden]


def text_of(capsys, words):
    main(words.split())
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_short_help_fits_a_screen(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    lines = text_of(capsys, f"{command} --help").splitlines()
    assert len(lines) <= 32, command
    # An example is one line to copy, however narrow the terminal is.
    assert all(len(line) <= int(columns) for line in lines if "Example:" not in line), command
    example = "eval" if command == "completion" else f"bitknap {command}"
    assert any(line.startswith(f"  Example: {example}") for line in lines)
    if command in LEAVES:
        assert lines[-1] == f"All options: bitknap {command} --help-all"


@pytest.mark.parametrize("command", LEAVES)
def test_help_all_has_every_option_in_a_group(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = (text_of(capsys, f"{command} {flag}") for flag in ("--help", "--help-all"))
    for one in options(LEAVES[command]):
        assert re.search(rf"^  (-\w, )?{one.opts[-1]}( |$)", whole, re.MULTILINE), one.opts
        assert one.group in GROUPS
    headings = re.findall(r"^(\w+):$", whole, re.MULTILINE)
    assert headings == [one.capitalize() for one in GROUPS if one.capitalize() in headings]
    assert "--help-all" in whole
    assert len(short.splitlines()) <= len(whole.splitlines())


@pytest.mark.parametrize("command", LEAVES)
def test_texts_are_plain_sentences(command):
    texts = [LEAVES[command].help]
    for one in LEAVES[command].params:
        assert isinstance(one, Option | Argument), one.name
        if isinstance(one, Argument):
            texts.append(one.about)
        elif not one.hidden:
            texts += [one.help, *([one.more] if one.more else [])]
    for text in texts:
        assert text.rstrip().endswith("."), text
        assert not text.startswith("Of "), text
        assert not re.search(r"\b(twin|belie[fv]|found|told|dearest|default)", text.lower()), text
        assert not re.search(r"\b(of|is of|are of)[.;,]", text), text


def test_an_option_is_the_same_in_every_command():
    seen: dict[str, dict[str, tuple[object, ...]]] = {}
    for name, command in LEAVES.items():
        for one in options(command):
            flag = one.opts[-1]
            if (name, flag) in _OF_ITS_OWN or flag == "--output":
                continue
            what = (one.opts, one.name, one.metavar, one.help, one.usual, one.type.name)
            what += () if flag in _REPEATED else (one.default, one.multiple, one.more)
            seen.setdefault(flag, {})[name] = what
    differing = {flag: rows for flag, rows in seen.items() if len(set(map(str, rows.values()))) > 1}
    assert differing == {}


def test_every_command_that_writes_says_output():
    for name, command in LEAVES.items():
        for one in options(command):
            if one.name == "out":
                assert one.opts == ["-o", "--output"], name
    writing = {name for name, one in LEAVES.items() if any(x.name == "out" for x in one.params)}
    assert writing >= {"estimate", "solve", "quantize", "compare", "convert", "study best"}


def test_shown_defaults_are_those_of_the_library():
    from typing import get_args

    from bitknap import Ilp, Knapsack
    from bitknap.api import evaluation, quantizing, requests
    from bitknap.benchmarks.compare import models
    from bitknap.cli.options import common, measuring
    from bitknap.estimators.tables.several_texts import Rule
    from bitknap.estimators.tables.super_expert_floor import FLOOR

    def shown(declared):
        return declared.settings["usual"]

    def compared(name):
        return next(one.usual for one in options(LEAVES["compare"]) if one.name == name)

    assert shown(measuring.tokens) == str(quantizing.CALIBRATION_TOKENS)
    assert shown(common.refine_tokens) == str(requests.REFINE_TOKENS)
    assert shown(measuring.group_size) == ",".join(map(str, quantizing.GROUP_SIZES))
    assert measuring.protect_bits.settings["default"] == FLOOR
    assert set(measuring.robust.settings["type"].names) == set(get_args(Rule))
    assert shown(common.gap) == f"{Knapsack().gap:g}"
    limits = f"{Knapsack().time_limit:g} for knapsack, {Ilp().time_limit:g} for ilp"
    assert shown(common.time_limit) == limits
    evaluated = next(one for one in options(LEAVES["evaluate"]) if one.name == "tokens")
    assert evaluated.usual == str(evaluation.EVALUATION_TOKENS)
    assert compared("group_size") == ",".join(map(str, models.SIZES))


def test_help_imports_no_numpy():
    import subprocess
    import sys

    code = (
        "import sys; from bitknap.cli import main\n"
        "for words in (['--help'], ['quantize', '--help']):\n"
        "    main(words)\n"
        "print([m for m in ('numpy', 'torch', 'rich', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
