import csv
import io

import pytest

from bitknap.report.comparison_rows import (
    at,
    budgets_of,
    geometric_mean,
    number,
    rows_csv,
    standing,
    verdicts,
)
from bitknap.report.strategy_table import plus_minus
from bitknap.report.summary import sentences, verdict_table


@pytest.mark.parametrize(
    ("difference", "error", "word"),
    [(0.3, 0.1, "higher"), (-0.3, 0.1, "lower"), (0.2, 0.1, "alike"), (0, 0, "alike")],
)
def test_two_standard_errors_tell_rows_apart(difference, error, word):
    row = {"status": "ok", "difference": difference, "difference_se": error}
    assert standing(row) == word
    assert standing(row | {"status": "failed"}) == ""
    assert standing({"difference": difference}) == ""


def test_only_finite_numbers_of_measured_rows_count():
    values = (1, 2.5, None, True, "3", float("nan"), float("inf"))
    found = [number({"status": "ok", "kl": value}, "kl") for value in values]
    assert found == [1.0, 2.5, None, None, None, None, None]
    assert number({"status": "unreachable", "kl": 1.0}, "kl") is None


def test_ours_comes_first_then_by_kl_then_what_was_not_measured(document):
    document["rows"][1]["kl"] = 0.01  # a variant of ours
    rows = at(document, "2bpw")
    assert [row["strategy"] for row in rows[:2]] == ["ours", "ours, unrefined"]
    costs = [row["kl"] for row in rows[2:-2]]
    assert costs == sorted(costs)
    assert [row["strategy"] for row in rows[-2:]] == ["AlphaQ", "MoQa"]


def test_the_best_of_each_kind_is_compared_with_ours(document):
    first = verdicts(document)[:3]
    assert [(one.role, one.row["strategy"], one.word) for one in first] == [
        ("best uniform", "best uniform", "higher"),
        ("best published", "MxMoE", "higher"),
        ("best of the others", "calibrated, knapsack", "alike"),
    ]
    assert all(one.ours and one.ours["strategy"] == "ours" for one in first)
    head, rows = verdict_table(document)
    assert len(rows) == 9
    assert all(len(row) == len(head) for row in rows)


def test_sentences_say_what_is_not_significant(document):
    said = sentences(document)
    assert said == [
        "17 strategies at 2bpw, 2.5bpw and 3bpw, at equal bytes, measured on 8,192 tokens that "
        "calibration did not see.",
        "Against the best uniform recipe of each budget, Bitknap's KL is 0.741 times as high in "
        "geometric mean; it is lower at 2bpw, 2.5bpw and 3bpw.",
        "Against the best published rule of each budget, Bitknap's KL is 0.763 times as high in "
        "geometric mean; it is lower at 2bpw, 2.5bpw and 3bpw.",
        "No strategy has a KL lower than Bitknap's by more than 2 standard errors.",
        "Not significantly different, within 2 standard errors of Bitknap: calibrated, knapsack at "
        "2bpw, 2.5bpw and 3bpw.",
        "Refinement changed KL: at 2bpw −0.0038 ± 0.0025 (not significant), at 2.5bpw −0.0019 ± "
        "0.0013 (not significant), at 3bpw −0.00094 ± 0.00063 (not significant).",
        "Not reachable, for the reason in the table: MoQa at 2bpw.",
        "Failed, for the reason in the table: AlphaQ at 2bpw.",
    ]


def test_sentences_say_who_is_lower(document):
    for row in document["rows"]:
        if row["strategy"] == "best uniform":
            row["difference"] = -row["difference"]
    said = sentences(document)
    assert any("; it is higher at 2bpw, 2.5bpw and 3bpw." in line for line in said)
    assert (
        "KL lower than Bitknap's by more than 2 standard errors: best uniform at "
        "2bpw, 2.5bpw and 3bpw." in said
    )


def test_there_is_nothing_to_say_without_rows():
    assert sentences({}) == []
    assert verdict_table({})[1] == []
    assert budgets_of({"rows": None, "budgets": None}) == []
    assert rows_csv({}).count("\n") == 1


def test_one_row_has_nobody_to_be_compared_with(document):
    document["rows"] = document["rows"][:1]
    document["budgets"] = document["budgets"][:1]
    assert sentences(document) == [
        "1 strategy at 2bpw, at equal bytes, measured on 8,192 tokens that calibration did not see."
    ]
    assert verdicts(document) == []


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.04691, 0.00104, "0.0469 ± 0.0010"),
        (0.04691, 0.2, "0.05 ± 0.20"),
        (12.3, 4.0, "12.3 ± 4.0"),
        (-0.5, 0.25, "−0.50 ± 0.25"),
        (0.25, None, "0.25"),
        (0.25, 0.0, "0.25"),
        (None, 0.1, "–"),
    ],
)
def test_digits_are_those_that_the_error_leaves(value, error, text):
    assert plus_minus(value, error) == text


def test_a_sign_is_written_on_request():
    assert plus_minus(0.5, 0.25, sign=True) == "+0.50 ± 0.25"
    assert plus_minus(0.0, 0.25, sign=True) == "0.00 ± 0.25"


def test_geometric_mean_of_what_is_positive():
    assert geometric_mean([4.0, 1.0, None, 0.0, -2.0]) == pytest.approx(2.0)
    assert geometric_mean([None]) is None


def test_csv_has_every_row_and_a_column_a_domain(document):
    document["rows"][3]["strategy"] = 'a "b", c\nd'
    text = rows_csv(document)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(document["rows"])
    assert rows[0]["kl"] == "0.125"
    assert rows[0]["kl_code"] == "0.1125"
    assert rows[0]["difference"] == ""
    assert list(rows[0])[-4:] == ["kl_books", "kl_code", "kl_wiki", "kl_speeches"]
    lost = [row for row in rows if row["status"] != "ok"]
    assert [row["reason"] for row in lost] == [
        "ValueError: matrix is singular",
        "its least is 2.13 bpw; the budget is 2bpw",
    ]
    assert all(row["kl"] == row["kl_books"] == "" for row in lost)
    assert any(row["strategy"] == 'a "b", c\nd' for row in rows)
    assert rows_csv(document) == text
