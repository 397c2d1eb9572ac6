"""The table of published methods, and what their files share."""

import dataclasses
import subprocess
import sys
from importlib import import_module

import pytest

from bitknap.allocation import profile
from bitknap.allocation.published import evopress
from bitknap.errors import InputError
from bitknap.estimators import catalog
from bitknap.estimators.named import estimator_of
from bitknap.estimators.published import COMMON, RULES
from bitknap.estimators.published.rule import largest, rule_of


def module_of(name):
    return import_module(f"bitknap.estimators.published.{name.replace('-', '_')}")


@pytest.mark.parametrize("name", RULES)
def test_an_entry_says_all_of_its_method(name):
    entry = RULES[name]
    assert entry.title and entry.source and entry.citation and entry.cost
    assert entry.numbers.endswith(".") and entry.cites == f"{entry.citation}. {entry.numbers}"
    assert 2019 < entry.year < 2027
    assert entry.missing
    assert bool(entry.ties) == bool(entry.allocator) == (entry.plans or name == "evopress")
    if entry.ties:
        profile(entry.ties)
    assert all(line.endswith(".") for line in (*entry.missing, *COMMON))


@pytest.mark.parametrize("name", RULES)
def test_the_file_of_an_entry_repeats_its_numbers_and_says_what_is_not_reproduced(name):
    module = evopress if name == "evopress" else module_of(name)
    text = " ".join((module.__doc__ or "").split())
    assert RULES[name].numbers in text
    assert "Not reproduced" in text and "Source: " in text


@pytest.mark.parametrize("name", [name for name in RULES if name != "evopress"])
def test_the_file_of_an_entry_has_what_it_says(name):
    module, entry = module_of(name), RULES[name]
    assert hasattr(module, "rule") == entry.plans
    for word, title in entry.signals.items():
        assert getattr(module, title).name == word or isinstance(
            getattr(module, title).name, property
        )


def test_every_signal_of_a_paper_is_an_estimator():
    words = {word for entry in RULES.values() for word in entry.signals}
    assert words <= set(catalog.names())
    for word in words - {catalog.ROUTER}:
        assert catalog.SIGNALS[word]().name == word


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(
        InputError, match="rule 'owq' makes no plans; those that do are chowdhury, mc-moe"
    ):
        rule_of("owq", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"estimator 'alphaqq' is unknown; .*did you mean alphaq"):
        estimator_of("alphaqq")


def test_the_table_needs_no_torch():
    code = "import sys, bitknap.estimators.published; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_largest_that_fits():
    plans = {k: dataclasses.make_dataclass("P", ["total_bytes"])(10 * k) for k in range(1, 9)}
    found = largest(plans.__getitem__, range(1, 9), 47, "{} bits")
    assert (found[0].plan.total_bytes, found[0].setting) == (40, "4 bits")
    assert largest(plans.__getitem__, range(1, 9), 9, "{}") == []
