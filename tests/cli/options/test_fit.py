"""`--fit SIZE --context N [--batch N]`, a budget in every command that takes one."""

import pytest

from bitknap.allocation import BitPlan, Budget, CostTable
from bitknap.cli import main

FIT = ("--fit", "1100MiB", "--context", "32")
FAST = ("--formats", "2,4", "--group-size", "8,row", "--estimator", "data-free")


def test_solve_shows_what_the_device_holds(made, document, capsys, tmp_path):
    found = document("solve", made.table, *FIT, "-o", tmp_path / "a.json")
    ledger = found["device"]
    assert ledger["device"] == 1100 << 20
    assert sum(ledger.values()) == 2 * ledger["device"]  # all entries add up to the device
    plan, table = BitPlan.load(tmp_path / "a.json"), CostTable.load(made.table)
    budget = Budget.device("1100MiB", context=32)
    assert ledger == budget.ledger(table, plan.choice)
    assert found["limits"]["memory"]["used"] == ledger["weights of units"]
    main(["solve", str(made.table), *FIT, "--batch", "2", "-o", str(tmp_path / "b.json")])
    assert "memory of the device" in capsys.readouterr().out


@pytest.mark.slow
def test_quantize_fits_a_device_and_reports_it(made, document, tmp_path):
    page = tmp_path / "page.html"
    words = ("quantize", made.model, *FIT, *FAST, "--report", page, "-o", tmp_path / "out")
    found = document(*words)
    assert found["device"]["left"] > 0
    assert "Memory of the device" in page.read_text()


def test_inspect_says_what_a_device_leaves_for_the_units(made, document):
    found = document("inspect", made.model, *FIT)["device"]
    assert found["left for units"] > 1 << 20
    assert sum(found.values()) == 2 * found["device"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fit", "1GiB"), "--fit 1GiB: say for how many tokens with --context"),
        (("--context", "32"), "--context 32: only --fit takes it"),
        (("--budget", "3bpw", "--batch", "2"), "--batch 2: only --fit takes it"),
        (("--budget", "3bpw", *FIT), "--budget 3bpw is a limit too; give one of the two"),
        (("--fit", "lots", "--context", "8"), "'lots' is not a size"),
        (("--fit", "2GiB", "--context", "0"), "context: 0 is not a whole number of at least 1"),
        (("--fit", "2GiB", "--context", "65"), "65 tokens are more than the 64"),
        (("--fit", "1MiB", "--context", "32"), "take one of at least 1.0"),
        ((*FIT, "--frontier"), "give one of --budget, --fit and --frontier"),
        ((), "give one of --budget, --fit and --frontier"),
    ],
)
def test_bad_devices_are_refused(made, refused, tmp_path, words, said):
    assert said in refused("solve", made.table, *words, "-o", tmp_path / "plan.json")


def test_inspect_refuses_what_cannot_fit(made, refused):
    said = refused("inspect", made.model, "--fit", "1MiB", "--context", "32")
    assert "take one of at least 1.0" in said
