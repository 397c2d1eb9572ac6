import re

import numpy as np
import pytest

from bitknap.allocation import BitPlan, Format, Units
from bitknap.errors import InputError
from bitknap.report.comparison_rows import rows_csv
from bitknap.report.figure_files import write_picture
from bitknap.report.html import drawn, shell, table
from bitknap.report.maps import bits_range, coverage_figure, panels, plan_figure
from bitknap.report.pareto_picture import pareto_figure
from bitknap.report.plots import decades, marked, pareto, prediction, prices, refinement
from bitknap.report.run_files import write_report
from bitknap.report.run_page import report

HEADS = [
    "Summary",
    "Strategies",
    "Size against loss",
    "Predicted and measured",
    "Plan",
    "Expert coverage",
    "Price of runtime profiles",
    "Refinement",
    "Claims",
    "The run",
    "Repeat it",
]
HOSTILE = "</script><script>alert(1)</script> & <a href='http://x.example'>\"x\"</a> $a_b$"


def heads(text):
    return re.findall("<h2>(.*?)</h2>", text)


def outside(text):
    """What is not plotly's library, which has tags and names of hosts of its own in it."""
    return text[: text.index("<script>")] + text[text.index("<body>") :]


@pytest.mark.slow
def test_the_whole_page(document, plans):
    text = report(document, plans)
    assert heads(text) == HEADS
    assert "<title>Bits of reference:mixtral</title>" in text
    assert text.count("plotly.js v") == 1
    assert text.count('<div class="plot">') == 3 + len(plans) + 1 + 2
    assert text == report(document, plans)


@pytest.mark.slow
def test_ids_are_fixed_and_distinct(document, plans):
    ids = re.findall(r'<div id="([^"]+)" class="plotly-graph-div"', report(document, plans))
    assert len(ids) == len(set(ids)) == 9
    assert all(one.startswith("plot-") for one in ids)


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(document, plans):
    ours = outside(report(document, plans))
    assert not re.search(r"https?://", ours)
    assert not re.search(r"<(script|link|img|iframe|a)[^>]+(src|href)=", ours)
    assert "@import" not in ours
    assert "url(" not in ours


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "gone"),
    [
        ("rows", ["Summary", "Strategies", "Size against loss", "Predicted and measured"]),
        ("coverage", ["Expert coverage"]),
        ("price", ["Price of runtime profiles"]),
        ("refine", ["Refinement"]),
        ("claims", ["Claims"]),
        ("about", ["Repeat it"]),
        ("frontier", []),
    ],
)
@pytest.mark.parametrize("empty", [True, False])
def test_a_missing_part_is_left_out(document, plans, part, gone, empty):
    if empty:
        document[part] = type(document[part])()
    else:
        del document[part]
    assert heads(report(document, plans)) == [head for head in HEADS if head not in gone]


def test_an_empty_document_is_a_page_without_a_library():
    text = report({}, {})
    assert heads(text) == []
    assert "plotly" not in text.lower().replace("plotly-graph-div", "")
    assert len(text) < 10_000


def test_a_run_of_one_row(document, plans):
    document["rows"] = document["rows"][:1]
    document["budgets"] = document["budgets"][:1]
    text = report(document, {"2bpw": plans["2bpw"]})
    assert "1 strategy at 2bpw" in text
    assert "best uniform" not in text.replace("the best uniform recipes;", "")


@pytest.mark.slow
def test_rows_that_were_not_measured_say_why(document, plans):
    text = report(document, plans)
    assert "not reachable: its least is 2.13 bpw; the budget is 2bpw</td>" in text
    assert "failed: ValueError: matrix is singular</td>" in text
    assert "15 measured, 1 failed, 1 not reachable" in text
    document["rows"] = [row for row in document["rows"] if row["status"] != "ok"]
    text = report(document, {})
    assert "Size against loss" not in heads(text)
    assert "0 measured, 1 failed, 1 not reachable" in text


def test_hostile_names_stay_text(document, plans):
    for row in document["rows"][2:]:
        row |= {"strategy": HOSTILE + row["strategy"], "source": HOSTILE, "setting": HOSTILE}
        row["reason"] = HOSTILE
    document["about"] |= {"model": HOSTILE, "command": HOSTILE, "device": HOSTILE}
    document["claims"][0] |= {"claim": HOSTILE, "verdict": HOSTILE}
    document["price"][0]["profile"] = HOSTILE
    for steps in document["refine"].values():
        steps[0]["origin"] = HOSTILE
    document["refine"] = {HOSTILE: document["refine"]["2bpw"]}
    inside = outside(report(document, {HOSTILE: plans["2bpw"]}))
    assert "<script>alert" not in inside
    assert "<a href" not in inside
    assert inside.count("<script") == inside.count("</script>") == 6 + 1
    # Plotly reads tags, too: in what it draws they are entities.
    assert "\\u003ca href" not in inside
    assert "&lt;a href" in inside or "\\u0026lt;a" in inside


@pytest.mark.slow
def test_budgets_that_are_close_have_a_linear_scale(document):
    assert marked([0.01, 0.2]) == (1, 2, 5)
    assert marked([0.02, 0.06]) == (1, 2, 3, 5)
    assert marked([0.021, 0.024]) == ()
    document["rows"] = document["rows"][:2]
    assert pareto(document).layout.yaxis.type is None
    (axes,) = pareto_figure(document).axes
    assert axes.get_yscale() == "linear"


def test_the_frontier_is_drawn_around_what_was_measured(document):
    figure = pareto(document)
    (line,) = [trace for trace in figure.data if trace.name == "predicted"]
    assert min(line.x) >= 1.8
    assert max(line.x) <= 3.2
    names = [trace.name for trace in figure.data if trace.showlegend is None]
    assert names[1:] == ["random", "signal", "search", "estimator", "published", "uniform", "ours"]


def test_only_what_has_a_prediction_is_compared_with_it(document):
    figure = prediction(document)
    assert [trace.name for trace in figure.data] == ["equal", "estimator", "ours"]
    for row in document["rows"]:
        row["predicted"] = None
    assert prediction(document) is None


def test_refinement_marks_what_was_accepted(document):
    traces = {trace.name: trace for trace in refinement(document["refine"]["2bpw"]).data}
    assert list(traces) == ["predicted", "measured", "measured, accepted"]
    assert list(traces["measured, accepted"].x) == list(range(0, 24, 3))
    assert refinement([]) is None
    assert refinement([{"loss": None}]) is None


def test_prices_without_a_cost_are_in_the_table_only(document):
    assert list(prices(document["price"]).data[0].y) == ["free", "gate_eq_up", "expert"]
    assert prices(document["price"][-1:]) is None
    assert "no format fits the budget" in report({"price": document["price"][-1:]}, {})


def test_maps_have_the_bits_of_every_unit(plans):
    plan = plans["2bpw"]
    maps = panels(plan)
    assert [one.title for one in maps] == ["gate", "up", "down", "attention"]
    assert [one.columns for one in maps][3] == ["q", "k", "v", "o"]
    assert maps[0].values.shape == (4, 8)
    (unit,) = plan.units.matches("layer=1,expert=3,proj=up,role=routed").nonzero()[0]
    assert maps[1].values[1, 3] == 8 * plan.nbytes[unit] / (64 * 128)
    assert maps[1].names[1][3] == plan.format_of(int(unit)).name
    total = sum(float(one.values.sum()) for one in maps) * 64 * 128 / 8
    assert total == pytest.approx(plan.total_bytes)


def test_blocks_share_a_place_and_gaps_stay_empty():
    two, four = Format(2, 0, symmetric=True), Format(4, 0, symmetric=True)
    units = Units.build(
        layer=[0, 0, 1, -1],
        role=["routed", "routed", "routed", "embedding"],
        expert=[0, 0, 1, -1],
        projection=["down", "down", "down", "embedding"],
        rows=[8, 8, 16, 32],
        cols=[64] * 4,
        block=[0, 1, 0, 0],
    )
    first, other = panels(BitPlan.from_choice(units, [two, four], [0, 1, 0, 1]))
    assert first.names == [["int2-row-sym, int4-row-sym", ""], ["", "int2-row-sym"]]
    assert first.values[0, 0] == 3.25
    assert np.isnan(first.values[0, 1])
    assert (other.title, other.layers, other.columns) == ("embedding", ["none"], ["embedding"])


def test_plans_without_shapes_have_no_map(document):
    plan = BitPlan.from_choice(Units.anonymous(2), [Format.made_up(0)], [0, 0], nbytes=[1, 2])
    assert plan_figure(plan, *bits_range([plan])) is None
    assert "Plan" not in heads(report(document, {"2bpw": plan}))


def test_a_uniform_plan_has_one_colour(plans):
    plan = BitPlan.uniform(plans["2bpw"].units, Format(3, 32, symmetric=True))
    found = plan_figure(plan, *bits_range([plan]))
    assert found is not None
    axis = found[0].layout.coloraxis
    assert axis.cmin < axis.cmax
    assert list(axis.colorbar.ticktext) == ["3.5"]


def test_experts_that_saw_no_tokens_are_marked(document):
    found = coverage_figure(document["coverage"])
    assert found is not None
    figure, _, unseen = found
    assert unseen == 2
    assert [list(axis) for axis in (figure.data[1].x, figure.data[1].y)] == [[6, 7], ["3", "3"]]
    assert coverage_figure({"layers": [], "tokens": []}) is None
    assert "2 saw none (crosses)" in report({"coverage": {"tokens": [[0, 0]]}}, {})
    assert "every expert saw some" in report({"coverage": {"tokens": [[3, 4], [5]]}}, {})


def test_ticks_of_a_log_colour():
    assert decades([1, 1000])[1] == ["1", "10", "100", "1,000"]
    assert decades([3, 40])[1] == ["5", "10", "20"]
    assert decades([3, 3])[1] == ["3"]


@pytest.mark.slow
def test_a_large_model_is_a_light_page(document_of, plan_of):
    document = document_of(layers=48, experts=128)
    text = report(document, {"2bpw": plan_of(2.0, layers=48, experts=128)})
    bare = report(document, {})
    # A character or two a unit for colours, hover text of as many names.
    assert len(text) - len(bare) < 900_000
    assert text.count('"type":"heatmap"') == 4 + 1
    assert len(re.findall("<details open>", text)) == 2


@pytest.mark.slow
def test_the_picture_beside_the_page(document, tmp_path):
    document["about"]["model"] = HOSTILE
    for name in "ab":
        write_picture(pareto_figure(document), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (axes,) = pareto_figure(document).axes
    assert axes.get_yscale() == "log"
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[0] == "ours"
    assert labels[-1] == "predicted"
    with pytest.raises(InputError, match="no row has a KL above 0"):
        pareto_figure({})


@pytest.mark.slow
def test_all_that_is_beside_the_page(document, plans, tmp_path):
    write_report(document, plans, tmp_path)
    names = ["pareto.png", "report.html", "rows.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "report.html").read_text() == report(document, plans)
    assert (tmp_path / "rows.csv").read_text() == rows_csv(document)
    write_report({"about": document["about"]}, {}, tmp_path / "bare")
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["report.html"]


def test_the_shell_has_what_it_is_given():
    text = shell("a < b", ["<p>one</p>", "", "<p>two</p>"], style=".x{}", script="go()")
    assert "<h1>a &lt; b</h1>\n<p>one</p>\n<p>two</p>\n" in text
    assert ".x{}" in text
    assert "go()" in text
    assert "Plotly" not in text


def test_tables_are_texts():
    found = table([["<b>", "1"]], ["name", "n"], numbers=(1,))
    assert "<td>&lt;b&gt;</td><td class=n>1</td>" in found
    assert "<th>name</th><th class=n>n</th>" in found


def test_a_plot_has_the_id_of_its_name():
    from plotly import graph_objects

    assert '<div id="plot-size-loss"' in drawn(graph_objects.Figure(), "Size & loss!")
