"""Judging plans: block bootstrap, ranks over domains, and texts that must not overlap."""

import numpy as np
import pytest
import torch

from bitknap.benchmarks.compare.judge import bootstrap_error, check_apart, mean_ranks
from bitknap.errors import InputError


def test_bootstrap_error_is_the_standard_error_of_independent_values():
    values = np.random.default_rng(0).standard_normal(400)
    assert bootstrap_error(values) == pytest.approx(values.std() / 20, rel=0.15)


def test_bootstrap_error_is_larger_where_neighbours_are_alike():
    values = np.repeat(np.random.default_rng(0).standard_normal(100), 4)
    plain = values.std(ddof=1) / np.sqrt(len(values))
    assert bootstrap_error(values) > 1.4 * plain


def test_bootstrap_error_repeats_and_knows_small_cases():
    values = np.arange(10.0)
    assert bootstrap_error(values) == bootstrap_error(values)
    assert bootstrap_error(values[:1]) == 0.0
    assert bootstrap_error(np.zeros(8)) == 0.0


def test_ranks_are_means_over_domains_and_ties_share_theirs():
    domains = [{"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 1.0}, {"a": 2.0, "b": 2.0}]
    assert mean_ranks(domains) == [2.0, 1.75, 2.25]
    assert mean_ranks([]) == []


def test_evaluation_that_calibration_saw_is_refused():
    draw = torch.Generator().manual_seed(0)
    one = torch.randint(0, 1000, (6, 128), generator=draw)
    other = torch.randint(0, 1000, (6, 128), generator=draw)
    check_apart(one, other)
    with pytest.raises(InputError, match=r"1 of its 6 windows share 32 tokens"):
        check_apart(one, torch.cat([other, one[2:3]]))
    shifted = torch.cat([other, one[4:5].roll(7, 1)])
    with pytest.raises(InputError, match="judge plans on text that no strategy saw"):
        check_apart(one, shifted)
