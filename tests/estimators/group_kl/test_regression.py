"""Ridge and sums of exponentials, against brute force and SciPy."""

from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize, nnls
from scipy.stats import spearmanr

from bitknap.errors import InputError
from bitknap.estimators.group_kl.regression import Sums, log_sums, rank_correlation, ridge


def case(seed, rows=12, cols=4):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, cols)), generator.normal(size=rows)


def objective(a, y, penalty, prior, x):
    return ((a @ x - y) ** 2).sum() + (np.asarray(penalty) * (x - prior) ** 2).sum()


@pytest.mark.parametrize("seed", range(5))
def test_ridge_solves_its_normal_equations(seed):
    a, y = case(seed)
    penalty, prior = np.array([0.0, 0.5, 2.0, 10.0]), np.array([0.0, 1.0, -1.0, 3.0])
    wanted = np.linalg.solve(a.T @ a + np.diag(penalty), a.T @ y + penalty * prior)
    assert ridge(a, y, penalty=penalty, prior=prior) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(5))
def test_ridge_from_zero_is_nnls(seed):
    a, y = case(seed)
    assert ridge(a, y, nonnegative=True) == pytest.approx(nnls(a, y)[0])


@pytest.mark.parametrize("seed", range(5))
def test_some_signs_as_by_trying_all_active_sets(seed):
    a, y = case(seed)
    signs = np.array([True, False, True, True])
    found = ridge(a, y, penalty=0.3, prior=-0.2, nonnegative=signs)
    best = np.inf
    for zero in product((False, True), repeat=4):
        free = np.flatnonzero(~(np.array(zero) & signs))
        x = np.zeros(4)
        if len(free):
            x[free] = ridge(a[:, free], y, penalty=0.3, prior=-0.2)
        if (x[signs] >= 0).all():
            best = min(best, objective(a, y, 0.3, -0.2, x))
    assert (found[signs] >= 0).all()
    assert objective(a, y, 0.3, -0.2, found) == pytest.approx(best)


def test_a_heavy_penalty_gives_the_prior():
    a, y = case(0)
    assert ridge(a, y, penalty=1e12, prior=[1, 2, 3, 4]) == pytest.approx([1, 2, 3, 4])


def test_fewer_rows_than_coefficients_have_an_answer():
    assert ridge([[1.0, 1.0]], [2.0], penalty=1e-9) == pytest.approx([1, 1])


def test_ridge_refuses():
    with pytest.raises(InputError, match=r"design \(2, 2\) and target \(3,\) must be \[N,P\]"):
        ridge(np.eye(2), np.zeros(3))
    with pytest.raises(InputError, match="penalties at least 0"):
        ridge(np.eye(2), np.zeros(2), penalty=-1)
    with pytest.raises(InputError, match=r"prior: shape \(3,\), expected \(2,\)"):
        ridge(np.eye(2), np.zeros(2), prior=np.zeros(3))


def sums(seed, groups=20, size=7, features=3):
    generator = np.random.default_rng(seed)
    return Sums(
        base=generator.lognormal(size=groups * size),
        features=generator.normal(size=(groups * size, features)),
        start=np.arange(groups) * size,
    )


def test_slopes_of_log_sums_are_differences():
    case, at = sums(0), np.array([0.3, -0.2, 0.1])
    _, slope = case.log(at)
    for k, step in enumerate(1e-6 * np.eye(3)):
        difference = (case.log(at + step)[0] - case.log(at - step)[0]) / 2e-6
        assert slope[:, k] == pytest.approx(difference, abs=1e-6)


def test_log_sums_find_what_made_them():
    case, truth = sums(1), np.array([1.5, -0.7, 0.2])
    found = log_sums(case, case.log(truth)[0], penalty=np.zeros(3))
    assert found == pytest.approx(truth, abs=1e-6)


def test_log_sums_find_the_least_of_their_objective():
    case = sums(2)
    target = case.log(np.array([0.5, 0.5, 0.0]))[0] + np.random.default_rng(0).normal(
        scale=0.3, size=20
    )
    penalty = np.array([0.1, 1.0, 5.0])

    def value(x):
        return ((target - case.log(x)[0]) ** 2).sum() + (penalty * x**2).sum()

    found = log_sums(case, target, penalty=penalty)
    assert value(found) <= minimize(value, np.zeros(3)).fun * (1 + 1e-6)


def test_log_sums_keep_their_signs():
    case = sums(3)
    target = case.log(np.array([-1.0, 0.5, 0.0]))[0]
    found = log_sums(case, target, penalty=np.zeros(3), nonnegative=[True, False, False])
    assert found[0] == 0


def test_rank_correlation_is_spearmans():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, 30), generator.integers(0, 6, 30)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
