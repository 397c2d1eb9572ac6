"""Kinds: one integer each, and which of them kernels take."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitknap.errors import InputError
from bitknap.kernels.layout.kinds import Kind, check_runnable, kind_of
from bitknap.kernels.layout.scale_words import Recipe


@given(
    st.builds(
        Kind,
        bits=st.sampled_from([*range(1, 9), 16, 32]),
        share=st.sampled_from([0, 6, 8]),
        symmetric=st.integers(0, 1),
        kept=st.integers(0, 3),
        group=st.integers(0, 1 << 16),
    )
)
def test_a_kind_is_one_integer(kind):
    assert 0 <= kind.code < 2**31
    assert Kind.of(kind.code) == kind


def test_kinds_of_recipes():
    assert kind_of(Recipe(bits=3, group=64, share=6), 256, None) == Kind(3, 6, 0, 0, 64)
    assert kind_of(Recipe(bits=4, group=256, symmetric=True), 256, None) == Kind(4, 0, 1, 0, 0)
    kept = Recipe(bits=16, group=1, kept=100)
    assert kind_of(kept, 256, torch.float16) == Kind(16, kept=2)


def test_columns_that_share_a_word():
    assert [Kind(4, group=g).chunk for g in (0, 32, 96, 128, 512)] == [256, 32, 32, 128, 256]


def test_odd_groups_are_refused():
    check_runnable((Kind(4, group=96), Kind(2), Kind(16, kept=1)))
    with pytest.raises(InputError, match="group size 40: kernels take multiples of 32 or whole "):
        check_runnable((Kind(4, group=40),))
