"""The container: read back as written, by us and by the gguf package; damage is one line."""

from typing import Any

import numpy as np
import pytest

from bitknap.errors import FileError
from bitknap.quantization.ggml import container
from bitknap.quantization.ggml.container import Entry

VALUES: dict[str, Any] = {
    "general.architecture": "llama",
    "a.text": "ü",
    "a.flag": True,
    "a.count": 7,
    "a.below": -7,
    "a.share": 0.5,
    "a.words": ["one", "two"],
    "a.numbers": [1, 2],
    "a.shares": [0.5, -1.0],
    "a.flags": [True, False],
}
ENTRIES = (
    Entry("one.weight", (3, 5), "f32"),
    Entry("two.weight", (2, 4, 256), "q4_k"),
    Entry("three.weight", (7,), "bf16"),
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.gguf"
    rng = np.random.default_rng(0)
    data = b""
    for entry in ENTRIES:
        part = rng.integers(0, 256, entry.nbytes, np.uint8).tobytes()
        data += part + container.padding(len(part))
    path.write_bytes(container.head(VALUES, ENTRIES) + data)
    return path


def test_read_back_as_written(file):
    held = container.read(file)
    assert held.values == VALUES
    assert list(held.entries.values()) == list(ENTRIES)
    assert all(place % 32 == 0 for place in held.places.values())


def test_the_gguf_package_reads_the_same(file):
    from gguf import GGUFReader

    theirs, ours = GGUFReader(file), container.read(file)
    for name, value in VALUES.items():
        assert theirs.fields[name].contents() == value
    for tensor in theirs.tensors:
        entry = ours.entries[tensor.name]
        assert tensor.tensor_type.name.lower() == entry.type
        assert [int(size) for size in tensor.shape] == list(entry.shape[::-1])
        np.testing.assert_array_equal(
            np.asarray(tensor.data).view(np.uint8).reshape(-1), ours.data(tensor.name)
        )


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2, 0.5, 0.97])
def test_a_file_that_is_cut_short_is_refused(file, share):
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(FileError, match=r"a\.gguf: .*(cut short|not a GGUF)") as error:
        container.read(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4 something else", "not a GGUF file"),
        (b"GGUF\x01" + bytes(19), "version 1"),
        (b"GGUF\3\0\0\0" + b"\xff" * 40, "cut short or damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    path = tmp_path / "b.gguf"
    path.write_bytes(content)
    with pytest.raises(FileError, match=words):
        container.read(path)


def test_a_type_that_is_not_known_is_named(file):
    data = bytearray(file.read_bytes())
    at = data.index(b"three.weight") + len(b"three.weight") + 4 + 8
    data[at] = 77
    file.write_bytes(data)
    with pytest.raises(FileError, match=r"three\.weight has type 77"):
        container.read(file)
