"""What shells complete, and the scripts that make them."""

import pytest
from click.shell_completion import ShellComplete

from bitknap.cli import main
from bitknap.cli.command import bitknap
from bitknap.cli.options import completing


def completed(*words):
    shell = ShellComplete(bitknap, {}, "bitknap", "_BITKNAP_COMPLETE")
    return [one.value for one in shell.get_completions(list(words[:-1]), words[-1])]


def test_names_are_those_that_exist():
    from bitknap.allocation.problem.profiles import PROFILES
    from bitknap.allocation.search.search_space import Knobs
    from bitknap.benchmarks.compare.strategies import names as strategies
    from bitknap.estimators import catalog
    from bitknap.quantization.source.checkpoint import resolve

    every = {*catalog.names(), catalog.CALIBRATED, catalog.FUZZY}
    assert set(completed("estimate", "m", "--estimator", "")) == every
    assert set(completed("solve", "--profile", "")) == set(PROFILES)
    models = completed("inspect", "reference:")[1:]
    assert models and all(resolve(name).is_dir() for name in models)
    assert strategies(completing.STRATEGIES)
    assert set(completing.KNOBS) >= {"tilts", "exponents"}
    assert Knobs.__dataclass_fields__.keys() >= set(completing.KNOBS)


def test_words_are_completed():
    assert "quantize" in completed("q")
    assert completed("study", "") == ["create", "run", "show", "best"]
    assert completed("quantize", "reference:m")[-1] == "reference:mixtral"
    assert "--profile" in completed("quantize", "m", "--prof")
    assert completed("quantize", "m", "--profile", "layer_p") == ["layer_proj"]
    assert completed("solve", "--solver", "k") == ["knapsack"]
    assert completed("estimate", "m", "--estimator", "calibrated,mo") == ["calibrated,moments"]
    assert completed("estimate", "m", "--formats", "2,8,")[:2] == ["2,8,1", "2,8,3"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell, capsys):
    main(["completion", shell])
    script = capsys.readouterr().out
    assert "_BITKNAP_COMPLETE" in script
    assert ("COMP_WORDBREAKS" in script) == (shell == "bash")


def test_an_unknown_shell(refused):
    assert "one of bash, zsh, fish" in refused("completion", "csh")
