"""The benchmark of large tables and plans, on a small shape."""

from dataclasses import replace

import pytest

from bitknap.benchmarks.large_outputs import markdown, measured, units_of
from bitknap.benchmarks.models.shapes import shape_of

SHAPE = replace(shape_of("DeepSeek-V3"), layers=5, experts=8)


def test_the_units_are_those_of_the_model():
    whole, cut = units_of(shape_of("DeepSeek-V3")), units_of(SHAPE, blocks=6)
    assert len(whole) == 58 * 256 * 3
    assert sorted(set(whole.layer.tolist())) == list(range(3, 61))
    assert cut.numel.sum() == units_of(SHAPE).numel.sum() == 2 * 8 * 3 * 7168 * 2048


@pytest.mark.slow
def test_every_part_is_measured():
    one = measured(SHAPE, blocks=2, count=8)
    assert set(one["seconds"]) == set(one["peak_bytes"])
    assert one["units"] == 96
    page = markdown({"model": "DeepSeek-V3", "sizes": [one], "cores": 2})
    assert "| open the plan | " in page
    assert "| plan.json | " in page
