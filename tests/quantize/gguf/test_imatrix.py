"""Importance matrices: read back as written, in both of llama.cpp's forms."""

import struct

import numpy as np
import pytest

from bitknap.allocation import Units
from bitknap.errors import FileError, MismatchError
from bitknap.quantization.ggml import container
from bitknap.quantization.gguf import imatrix

EXPERTS, COLS = 3, 8
NAME = "blk.0.ffn_down_exps.weight"


@pytest.fixture
def squares():
    return np.random.default_rng(0).uniform(0.1, 3, (EXPERTS, COLS)).astype(np.float32)


@pytest.fixture
def units():
    return Units.build(
        layer=[0] * EXPERTS,
        role=["routed"] * EXPERTS,
        expert=list(range(EXPERTS)),
        projection=["down"] * EXPERTS,
        rows=[4] * EXPERTS,
        cols=[COLS] * EXPERTS,
    )


def test_read_back_exactly(tmp_path, squares, units):
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(imatrix.content_of({NAME: squares}, "a text"))
    known = imatrix.read(path)
    np.testing.assert_array_equal(known[NAME].squares, squares)
    np.testing.assert_array_equal(imatrix.of_units(known, units, path), squares)
    held = container.read(path)
    assert held.values["general.type"] == "imatrix"
    assert held.entries[NAME + ".counts"].shape == (EXPERTS, 1)


def test_sums_are_divided_by_their_counts(tmp_path, squares):
    path = tmp_path / "theirs.gguf"
    counts = np.array([4, 2, 0], np.float32)
    entries = [
        container.Entry(NAME + ".in_sum2", (EXPERTS, COLS), "f32"),
        container.Entry(NAME + ".counts", (EXPERTS, 1), "f32"),
    ]
    data = b""
    for part in (squares, counts):
        data += part.tobytes() + container.padding(part.nbytes)
    path.write_bytes(container.head({"general.type": "imatrix"}, entries) + data)
    known = imatrix.read(path)[NAME]
    np.testing.assert_array_equal(known.tokens, counts)
    np.testing.assert_allclose(known.squares[:2], squares[:2] / counts[:2, None])


def plain(squares, calls=4):
    name = NAME.encode()
    return (
        struct.pack("<ii", 1, len(name))
        + name
        + struct.pack("<ii", calls, squares.size)
        + (squares * calls).tobytes()
        + struct.pack("<i", 10)
    )


def test_the_plain_list_is_read_as_well(tmp_path, squares, units):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(plain(squares))
    rows = imatrix.of_units(imatrix.read(path), units, path)
    np.testing.assert_allclose(rows, squares)


@pytest.mark.parametrize("kept", [0, 3, 10, 60])
def test_a_list_that_is_cut_short_is_refused(tmp_path, squares, kept):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(plain(squares)[:kept])
    with pytest.raises(FileError, match=r"no importance matrix of llama\.cpp, or cut short"):
        imatrix.read(path)


def test_a_model_is_no_importance_matrix(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(container.head({"general.type": "model"}, []))
    with pytest.raises(FileError, match="no importance matrix"):
        imatrix.read(path)


def test_values_that_no_mean_of_squares_has_are_refused(tmp_path, squares):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(plain(-squares))
    with pytest.raises(FileError, match="negative, NaN or infinite"):
        imatrix.read(path)


def test_a_file_of_another_model_is_refused(tmp_path, squares, units):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(plain(squares[:, :5]))
    with pytest.raises(MismatchError, match="make it with this model"):
        imatrix.of_units(imatrix.read(path), units, path)
    path.write_bytes(plain(squares[:2]))
    with pytest.raises(MismatchError, match=r"shape \[1, 16\]"):
        imatrix.of_units(imatrix.read(path), units, path)


def test_patterns_are_anchored_and_escaped():
    text = imatrix.types_text([("blk.1.ffn_up_exps.weight", "q4_k")])
    assert text == "^blk\\.1\\.ffn_up_exps\\.weight$=q4_k\n"
