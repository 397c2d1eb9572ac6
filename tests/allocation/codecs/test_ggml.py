"""ggml's block types: exact bytes, and the types that llama.cpp falls back to."""

import numpy as np
import pytest

from bitknap.allocation import Format
from bitknap.allocation.codecs.ggml import TYPES, row_bytes, stored_as
from bitknap.allocation.problem.format import ggml_types
from bitknap.errors import InputError


@pytest.mark.parametrize(
    ("name", "cols", "stored", "nbytes"),
    [
        ("q4_k", 512, "q4_k", 2 * 144),
        ("q4_k", 320, "q5_0", 10 * 22),
        ("q5_k", 192, "q5_1", 6 * 24),
        ("q6_k", 192, "q8_0", 6 * 34),
        ("iq2_xxs", 192, "iq4_nl", 6 * 18),
        ("q2_k", 40, "f16", 80),
        ("q8_0", 256, "q8_0", 8 * 34),
    ],
)
def test_rows_that_are_no_multiple_of_the_block_fall_back(name, cols, stored, nbytes):
    assert stored_as(name, cols) == stored
    assert row_bytes(name, cols) == nbytes
    assert int(Format.ggml(name).nbytes(3, cols)) == 3 * nbytes


def test_bytes_of_many_matrices_at_once():
    found = Format.ggml("q4_k").nbytes([[2], [3]], [256, 192])
    assert found.tolist() == [[2 * 144, 2 * 132], [3 * 144, 3 * 132]]
    assert found.dtype == np.int64


def test_names_round_trip():
    for one in ggml_types():
        assert Format.parse(one.name) == one
        assert one.source.upper() in one.about


def test_types_go_from_wide_to_narrow():
    widths = [kind.bits for kind in TYPES.values()]
    assert widths == sorted(widths, reverse=True)


def test_an_unknown_type_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="q4_k"):
        Format.parse("ggml-q4k")


def test_sizes_are_those_of_the_gguf_package():
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, kind in TYPES.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]] == (kind.block, kind.nbytes)
