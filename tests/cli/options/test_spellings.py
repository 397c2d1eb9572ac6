"""Old and other spellings, names that do not exist, and what is said where words are missing."""

import click
import pytest
from click.testing import CliRunner

from bitknap.cli import main
from bitknap.cli.options.commands import Command
from bitknap.cli.options.declare import OneOf, option

NAME = option("-n", "--name", group="output", former=("--nom",), also=("--names",), help="A name.")
KIND = option(
    "--kind",
    group="output",
    type=OneOf(("apple", "pear")),
    default="pear",
    former_values={"appel": "apple"},
    help="A kind.",
)


@click.command(cls=Command)
@click.argument("rest", nargs=-1)
@NAME
@KIND
def command(name, kind, rest):
    """Say what is given."""
    print(name, kind, *rest)


def said(*words):
    result = CliRunner().invoke(command, list(words))
    return result.stdout, result.stderr


def test_an_old_spelling_works_and_warns_in_one_line():
    out, err = said("--nom", "a", "--kind=appel")
    assert out == "a apple\n"
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        "bitknap: the option --nom is deprecated and goes away in the next version: use --name"
    )
    assert "--kind appel" in lines[1]
    assert "--kind apple" in lines[1]
    assert said("--nom=a")[0] == "a pear\n"


def test_other_spellings_do_not_warn_and_words_after_two_dashes_are_left_alone():
    assert said("--names", "a", "--name=b") == ("b pear\n", "")
    assert said("-n", "a", "--", "--nom") == ("a pear --nom\n", "")


def test_a_wrong_name_is_answered_with_all_and_the_nearest(refused):
    line = said("--kind", "aple")[1]
    assert "'aple' is unknown; one of apple, pear; did you mean apple?" in line
    line = refused("solve", "t", "--solver", "knapsak", "-o", "x")
    assert "one of knapsack, ilp, greedy, search; did you mean knapsack?" in line
    assert "; did you mean quantize?" in refused("quantise")
    assert "--budget" in refused("quantize", "m", "--budgt", "3bpw", "-o", "x")
    assert "create, run, show, best" in refused("study", "nothing")


def test_a_missing_word_is_asked_for_with_an_example(refused):
    line = refused("quantize")
    assert line.startswith("bitknap: MODEL is missing (folder, Hugging Face id, or bundled")
    assert line.endswith("example: bitknap quantize reference:mixtral --budget 2.5bpw -o out")
    assert "-o/--output PLAN is missing (plan or frontier to write" in refused("solve", "t")
    assert "--storage URL is missing" in refused("study", "show", "s")


@pytest.mark.parametrize("group", ["", "study"])
def test_a_group_alone_says_what_to_do(group, capsys):
    with pytest.raises(SystemExit) as exit:
        main(group.split())
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) <= 4
    assert "name a command" in lines[0]
    assert lines[1].startswith("  bitknap ")
    assert lines[-1].endswith("--help lists all commands.")


def test_an_old_driver_of_refining_becomes_the_new_one(refused, capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "nowhere", "--budget", "3bpw", "--refine-driver", "belief", "-o", "x"])
    first, last = capsys.readouterr().err.splitlines()
    assert "use --refine-driver posterior" in first
    assert "only --refine N takes it" in last


def test_compare_takes_sizes_of_both_grammars():
    from bitknap.cli.compare_command import _budgets
    from bitknap.errors import InputError

    assert _budgets(("2,2.5", "3bpw")) == _budgets(("2bpw,2.5bpw,3BPW",)) == (2.0, 2.5, 3.0)
    for wrong in (("12GiB",), ("40%",), ("2bpw,2",), ("",), ("0bpw",), ("infbpw",), ("nan",)):
        with pytest.raises(InputError, match="bits per weight"):
            _budgets(wrong)


@pytest.mark.parametrize("flag", ["--budget", "--budgets"])
def test_a_study_takes_a_range_of_sizes(flag, refused):
    storage = ("--storage", "journal:s.log", "--table", "nowhere.safetensors", "--sampler", "tpe")
    line = refused("study", "create", "s", *storage, flag, "2bpw-4bpw")
    assert "--sampler tpe: searches at one size" in line
