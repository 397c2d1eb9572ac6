"""Chowdhury et al.: counts as the authors' code has them, and bits by rank."""

import numpy as np
import pytest

from bitknap.allocation.published import (
    chowdhury_bits,
    chowdhury_counts,
)
from bitknap.allocation.published.chowdhury import chowdhury_order as order
from bitknap.allocation.published.chowdhury import norm_changes
from bitknap.errors import InputError, MismatchError

COUNTS = {
    8: {
        1.5: (0, 4, 4),
        1.75: (2, 2, 4),
        2.0: (2, 4, 2),
        2.125: (3, 3, 2),
        2.25: (4, 2, 2),
        2.375: (5, 1, 2),
        2.5: (6, 0, 2),
        2.75: (7, 0, 1),
    },
    64: {
        1.5: (0, 32, 32),
        1.75: (16, 16, 32),
        1.875: (18, 20, 26),
        2.0: (21, 22, 21),
        2.125: (26, 20, 18),
        2.25: (32, 16, 16),
        2.375: (44, 0, 20),
        2.5: (48, 0, 16),
        2.75: (56, 0, 8),
    },
}


@pytest.mark.parametrize(
    ("experts", "average", "counts"),
    [(experts, *row) for experts, rows in COUNTS.items() for row in rows.items()],
)
def test_chowdhury_counts_as_their_code_does(experts, average, counts):
    assert chowdhury_counts(experts, average, (3, 2, 1)) == counts
    assert sum(n * b for n, b in zip(counts, (3, 2, 1), strict=True)) == average * experts


def test_more_bits_may_mean_more_experts_at_one_bit():
    # The rule's own quirk: 2.375 instead of 2.25 bits raises the 1-bit experts from 16 to 20.
    assert chowdhury_counts(64, 2.25, (3, 2, 1))[2] == 16
    assert chowdhury_counts(64, 2.375, (3, 2, 1))[2] == 20


def test_chowdhury_with_two_levels_and_at_the_ends():
    assert chowdhury_counts(8, 2.5, (3, 2)) == (4, 4)
    assert chowdhury_counts(8, 1.0, (2, 3)) == (0, 8)
    assert chowdhury_counts(8, 9.0, (1, 2, 3)) == (8, 0, 0)
    assert chowdhury_counts(8, 0.5, (1, 2, 3)) == (0, 0, 8)
    # The average that comes out is not the one asked for.
    counts = chowdhury_counts(8, 1.6, (3, 2, 1))
    assert (3 * counts[0] + 2 * counts[1] + counts[2]) / 8 == 1.625


def test_chowdhury_gives_most_bits_to_the_first_of_the_order():
    assert chowdhury_bits([2, 0, 3, 1], 2.5, (3, 2)).tolist() == [3, 2, 3, 2]
    layers = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]])
    bits = chowdhury_bits(layers, 2.0, (1, 2, 3))
    assert bits.tolist() == [[3, 3, 2, 2, 2, 2, 1, 1], [1, 1, 2, 2, 2, 2, 3, 3]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chowdhury_counts(8, 2, (3,)), "levels: [3] must be two or three different"),
        (lambda: chowdhury_counts(8, 2, (3, 3)), "levels: [3, 3] must be two or three different"),
        (lambda: chowdhury_counts(8, 2, (4, 2, 1)), "levels: [4, 2, 1] are not equally spaced"),
        (lambda: chowdhury_counts(0, 2, (2, 1)), "experts: 0 at an average of 2; both must"),
        (lambda: chowdhury_counts(8, float("nan"), (2, 1)), "experts: 8 at an average of nan;"),
        (lambda: chowdhury_bits([0, 0], 2, (2, 1)), "order: each row must hold the numbers 0 to 1"),
        (lambda: chowdhury_bits(3, 2, (2, 1)), "order: shape (), expected [experts]"),
    ],
)
def test_chowdhury_says_what_is_wrong(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)


def test_changes_are_differences_of_norms():
    final, initial = {3: [3.0, 2.0]}, {3: [1.0, 2.5]}
    assert norm_changes(final, initial)[3].tolist() == [2, -0.5]
    assert norm_changes(final)[3].tolist() == [3, 2]
    with pytest.raises(MismatchError, match=r"final of layers \[3\], initial of \[2\]"):
        norm_changes(final, {2: [1.0, 1.0]})
    with pytest.raises(MismatchError, match="layer 3 has 2 final and 3 initial ones"):
        norm_changes(final, {3: [1.0, 1.0, 1.0]})
    with pytest.raises(InputError, match=r"final\[3\]: give one finite number of at least 0"):
        norm_changes({3: [-1.0]})


def test_order_by_norm_alone():
    assert order([3.0, 1.0, 2.0]).tolist() == [1, 2, 0]
    assert order([1.0, 1.0, 0.5]).tolist() == [2, 0, 1]  # ties keep their numbers' order


def test_order_by_hand():
    # Ranked 0, 1, 2. Expert 2 varies three times as much as 0: the paper's bound is inclusive,
    # the code's strict.
    assert order([1, 2, 3], [1, 2, 3], 3.0).tolist() == [2, 0, 1]
    assert order([1, 2, 3], [1, 2, 3], 3.0, one_pass=True).tolist() == [0, 1, 2]
    assert order([1, 2, 3], [1, 2, 3.1], 3.0, one_pass=True).tolist() == [2, 0, 1]


def test_one_pass_and_the_fixed_point_differ():
    # From the last rank up: 2 goes before 0, then 1 before 0 but behind 2. From the first rank
    # down: 1 goes before 0, then 2 before 0 but behind 1.
    assert order([1, 2, 3], [1, 4, 3.5], one_pass=True).tolist() == [2, 1, 0]
    assert order([1, 2, 3], [1, 4, 3.5]).tolist() == [1, 2, 0]


def test_neither_leaves_a_pair():
    rng = np.random.default_rng(0)
    unlike = 0
    for _ in range(200):
        norms, spread = rng.random(8), np.exp(2 * rng.standard_normal(8))
        stable, once = order(norms, spread), order(norms, spread, one_pass=True)
        unlike += stable.tolist() != once.tolist()
        for found in (stable, once):
            assert sorted(found.tolist()) == list(range(8))
            assert pairs(found, spread) == 0
            # Doing it again changes nothing.
            rank = np.argsort(found)
            assert order(rank, spread).tolist() == found.tolist()
    assert unlike > 20


def pairs(ranking, spread, zeta=3.0):
    """Count pairs that the rule would still exchange."""
    ranked = spread[ranking]
    wider = ranked[None, :] >= zeta * ranked[:, None]
    return int(np.triu(wider, 1).sum())


def test_experts_without_variance_stay():
    assert order([1, 2, 3], [0, 0, 0]).tolist() == [0, 1, 2]
    assert order([1, 2, 3], [0, 0, 1]).tolist() == [2, 0, 1]


def test_order_checks_its_numbers():
    with pytest.raises(InputError, match="zeta: 1 must be above 1; the paper takes 3"):
        order([1, 2], [1, 2], 1)
    with pytest.raises(InputError, match=r"variances: shape \(3,\), expected \(2,\)"):
        order([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="norms: give one finite number for each expert"):
        order([1, np.nan])
    with pytest.raises(InputError, match="variances: give one finite number of at least 0"):
        order([1, 2], [1, -2])
