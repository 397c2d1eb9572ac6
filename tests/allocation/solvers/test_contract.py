"""Our own solvers keep the contract that others are given."""

import pytest

from bitknap.allocation import Knapsack
from bitknap.testing import SolverContract


class TestKnapsack(SolverContract):
    solver = Knapsack()


class TestIlpHighs(SolverContract):
    def solver(self):
        return pytest.importorskip("bitknap.allocation.solvers.ilp").Ilp(backend="highs")


class TestIlpCbc(SolverContract):
    instances = 4

    def solver(self):
        return pytest.importorskip("bitknap.allocation.solvers.ilp").Ilp(backend="cbc")


class TestGreedy(SolverContract):
    exact = False

    def solver(self):
        return pytest.importorskip("bitknap.allocation.solvers.greedy").Greedy()


class TestSearch(SolverContract):
    exact = False
    instances = 2

    def solver(self):
        return pytest.importorskip("bitknap.allocation.search.solver").Search(trials=5)
