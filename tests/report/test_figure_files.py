import numpy as np
import pytest

from bitknap.allocation import CostTable
from bitknap.allocation.tradeoffs.frontier_path import frontier
from bitknap.cli.views.tables import uniform_costs
from bitknap.report.figure_files import frontier_figure, write_picture


def table(cost):
    return CostTable.from_arrays(cost, np.tile([1, 2, 4], (len(cost), 1)))


@pytest.mark.slow
def test_costs_above_zero_are_drawn_on_a_log_axis():
    positive = table([[9.0, 4.0, 1.0], [5.0, 3.0, 2.0]])
    figure = frontier_figure(frontier(positive), uniform_costs(positive))
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "bytes of the units"
    assert {text.get_text() for text in axes.texts} == {"option-0", "option-1", "option-2"}


def test_formats_that_cost_nothing_fall_off_the_log_axis():
    free = table([[9.0, 4.0, 0.0]])
    (axes,) = frontier_figure(frontier(free), uniform_costs(free)).axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] > 1
    assert {text.get_text() for text in axes.texts} == {"option-0", "option-1"}


def test_costs_that_are_never_above_zero_are_drawn_on_a_linear_axis():
    free = table([[0.0, 0.0, 0.0]])
    (axes,) = frontier_figure(frontier(free), uniform_costs(free)).axes
    assert axes.get_yscale() == "linear"


def test_formats_that_some_units_may_not_have_are_no_recipe():
    pinned = table([[9.0, 4.0, 1.0], [5.0, 3.0, np.inf]])
    assert list(uniform_costs(pinned)) == ["option-0", "option-1"]
    (axes,) = frontier_figure(frontier(pinned), {}).axes
    assert not axes.texts


def test_names_do_not_cover_each_other():
    generator = np.random.default_rng(0)
    many = CostTable.from_arrays(generator.random((50, 40)), generator.integers(1, 99, (50, 40)))
    figure = frontier_figure(frontier(many), uniform_costs(many))
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) < 40
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.slow
def test_equal_figures_are_equal_files(tmp_path):
    one = table([[9.0, 4.0, 1.0]])
    for name in ("a.svg", "b.svg"):
        write_picture(frontier_figure(frontier(one), uniform_costs(one)), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
