"""The cache of dequantized matrices: within its bytes, and what is asked for most stays."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitknap.quantization.runtime.dequantized_cache import Cache

MATRIX = torch.zeros(25)  # 100 bytes


def ask(cache, key, matrix=MATRIX):
    """Return whether a matrix was there; offer it if not, as a weight does."""
    there = cache.get(key) is not None
    if not there:
        cache.offer(key, matrix)
    return there


def test_the_most_used_stay_although_all_are_asked_for_in_turn():
    cache = Cache(200)
    for _ in range(5):
        for key in ("a", "b", "a", "c", "a", "b"):
            ask(cache, key)
    # a and b three and two times a round, c once.
    assert ask(cache, "a")
    assert ask(cache, "b")
    assert not ask(cache, "c")
    assert cache.used == 200


def test_what_becomes_hot_replaces_what_was():
    cache = Cache(100)
    assert not ask(cache, "old")
    assert not ask(cache, "new")
    assert ask(cache, "old")
    for _ in range(3):
        ask(cache, "new")
    assert ask(cache, "new")
    assert not ask(cache, "old")


@given(
    st.integers(0, 500),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=60),
)
def test_never_more_than_the_limit(limit, asked):
    cache = Cache(limit)
    kept: dict[tuple[int, int], torch.Tensor] = {}
    for key, size in asked:
        matrix = torch.zeros(25 * size)
        there = cache.get((key, size))
        assert there is None or there is kept[key, size]
        if there is None and cache.offer((key, size), matrix):
            kept[key, size] = matrix
        assert 0 <= cache.used <= limit
    cache.clear()
    assert cache.used == 0
    assert all(cache.get(key) is None for key in kept)


def test_a_limit_of_nothing_keeps_nothing():
    cache = Cache(0)
    assert not cache.offer("a", MATRIX)
    assert cache.get("a") is None


def test_things_are_logged_once_also_by_copies():
    cache = Cache()
    assert cache.tell("a")
    assert not cache.tell("a")
    assert not copy.deepcopy(cache).tell("a")
    assert cache.tell("b")
