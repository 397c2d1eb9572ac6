import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, Limit, Problem
from bitknap.errors import InputError

INF = np.inf
TABLE = CostTable.from_arrays([[3.0, 1.0], [4.0, 2.0], [INF, 5.0]], [[1, 2], [1, 3], [1, 4]])


def test_ties_are_summed():
    problem = Problem(TABLE.tie([0, 1, 0]), [Budget.bytes(7)])
    assert problem.cost.tolist() == [[INF, 6], [4, 2]]
    # Bytes of the forbidden option do not matter, and are 0.
    assert problem.weights.tolist() == [[[0, 6], [1, 3]]]
    assert problem.bounds.tolist() == [7]
    assert problem.expand([1, 0]).tolist() == [1, 0, 1]


def test_weights_broadcast_and_infinity_forbids():
    limit = Limit("rank", np.array([[1.0], [2.0], [0.0]]), 3)
    reads = Limit("reads", np.array([[INF, 1.0]]), 3)
    problem = Problem(TABLE, [limit, reads])
    assert problem.cost.tolist() == [[INF, 1], [INF, 2], [INF, 5]]
    assert problem.weights[0].tolist() == [[0, 1], [0, 2], [0, 0]]


def test_one_limit_needs_no_list():
    assert Problem(TABLE, Budget.bytes(9)).bounds.tolist() == [9]
    assert Problem(TABLE, []).weights.shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Problem(TABLE.tie([0, 0, 0]), Limit("a", np.array([[1, INF]]), 1)),
            "layer=0 role=routed expert=0 proj=unit and the units tied to it: every format is "
            "forbidden; relax the pins or the table",
        ),
        (
            lambda: Problem(TABLE, [Budget.bytes(1), Budget.bytes(2)]),
            "limits: ['memory', 'memory']: a name appears twice",
        ),
        (
            lambda: Problem(TABLE, Limit("a", np.ones((2, 2)), 1)),
            "limit a: weight has shape (2, 2), expected (3, 2)",
        ),
        (lambda: Limit("a", np.ones(3), 1), "limit a: weight has shape (3,), expected [U,F]"),
        (lambda: Limit("a", np.array([[1, np.nan]]), 1), "limit a: weight[0,1] is nan"),
        (lambda: Limit("a", np.ones((1, 1)), np.nan), "limit a: bound is nan, expected a number"),
    ],
)
def test_what_does_not_fit_says_so(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert message in str(error.value)
