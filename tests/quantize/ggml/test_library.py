"""ggml's own functions: what it rounds to, decoded by it and by the gguf package alike."""

import numpy as np
import pytest

from bitknap.allocation.codecs.ggml import TYPES
from bitknap.errors import InputError
from bitknap.quantization.ggml import library

# Their tables of codes take seconds to build.
SLOW = ("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(0, 0.02, (6, 512)).astype(np.float32)


@pytest.mark.parametrize(
    "type", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TYPES]
)
def test_blocks_decode_to_nearly_the_weights(rows, type):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = library.quantize(rows, type, np.linspace(0.5, 2, 512))
    kind = TYPES[type]
    assert blocks.shape == (6, 512 // kind.block * kind.nbytes)
    decoded = library.dequantize(blocks, type, 512)
    theirs = blocks.view(np.float16) if type == "f16" else blocks
    expected = dequantize(theirs, GGMLQuantizationType[type.upper()])
    np.testing.assert_array_equal(decoded, expected)
    # An error halves with every bit or so, from one half at 1 bit.
    most = max(3e-4, 2.2 * 2.0**-kind.bits)
    assert np.linalg.norm(decoded - rows) < most * np.linalg.norm(rows)


def test_threads_change_no_byte(rows, monkeypatch):
    many = np.tile(rows, (50, 1))
    whole = library.quantize(many, "q4_k")
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    np.testing.assert_array_equal(library.quantize(many, "q4_k"), whole)
    np.testing.assert_array_equal(library.quantize(rows, "q4_k"), whole[: len(rows)])


def test_numbers_are_those_of_the_gguf_package():
    from gguf import GGMLQuantizationType

    for name, number in library.NUMBERS.items():
        assert GGMLQuantizationType[name.upper()] == number


def test_a_missing_package_names_the_extra(rows, monkeypatch):
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    library._library.cache_clear()
    with pytest.raises(InputError, match=r"bitknap\[gguf\]"):
        library.quantize(rows, "q4_k")
    library._library.cache_clear()
