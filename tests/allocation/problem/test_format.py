import numpy as np
import pytest

from bitknap.allocation import Format, formats
from bitknap.errors import InputError


@pytest.mark.parametrize(
    ("name", "rows", "cols", "nbytes"),
    [
        # 4*128 weights x 3 bits = 192; 2 groups a row x 4 rows x 2 bytes = 16.
        ("int3-g64-sym", 4, 128, 192 + 16),
        ("int3-g64-asym", 4, 128, 192 + 32),
        # 5*20 weights x 3 bits = 300 bits, 38 bytes; the last of 3 groups a row is short.
        ("int3-g8-asym", 5, 20, 38 + 5 * 3 * 4),
        ("int2-row-sym", 5, 20, 25 + 5 * 2),
        # Row scale 2 bytes, 8-bit scale a group, and 4*2 zeros of 3 bits in one stream: 3 bytes.
        ("int3-g64-asym-compact", 4, 128, 192 + 4 * 2 + 8 + 3),
        ("int3-g64-sym-compact", 4, 128, 192 + 4 * 2 + 8),
        # One group a row: the row scale says it all; 4 zeros of 3 bits are 2 bytes.
        ("int3-row-asym-compact", 4, 128, 192 + 8 + 2),
        ("int3-g128-asym-compact", 4, 128, 192 + 8 + 2),
        ("int1-g128-sym-compact", 4, 256, 128 + 4 * 2 + 8),
        ("int1-g128-asym", 4, 256, 128 + 8 * 4),
        # Shares of 6 bits: 4 rows x 2 groups are 48 bits, 6 bytes; of 3 rows 36 bits, 5 bytes.
        ("int3-g64-asym-compact6", 4, 128, 192 + 4 * 2 + 6 + 3),
        ("int3-g64-sym-compact6", 3, 128, 144 + 3 * 2 + 5),
        ("int3-row-asym-compact6", 4, 128, 192 + 8 + 2),
        ("int1-g128-sym-compact6", 4, 256, 128 + 4 * 2 + 6),
        # Words of 32 bits: 64 rows of 12 words of codes; 2 groups of 6 words of zeros; 64 x 2 fp16
        # scales; and the group of each of 128 columns.
        ("int3-g64-asym-gptq", 64, 128, 64 * 48 + 2 * 24 + 64 * 2 * 2 + 128 * 4),
        ("int3-g64-sym-gptq", 64, 128, 64 * 48 + 2 * 24 + 64 * 2 * 2 + 128 * 4),
        ("keep-bf16", 4, 128, 1024),
        ("keep-fp32", 3, 5, 60),
        ("keep-fp8", 3, 5, 15),
    ],
)
def test_bytes_counted_by_hand(name, rows, cols, nbytes):
    assert int(Format.parse(name).nbytes(rows, cols)) == nbytes


def test_bytes_of_many_matrices_at_once():
    found = Format(4, 32, symmetric=True).nbytes(np.array([8, 16]), 64)
    assert found.tolist() == [256 + 32, 512 + 64]
    assert found.dtype == np.int64
    huge = Format(8, 64).nbytes(200_000, 200_000)
    assert int(huge) == 200_000**2 + 200_000 * 3125 * 4


def test_groups_and_padding():
    assert Format(4, 64).groups([64, 65, 192]).tolist() == [1, 2, 3]
    assert Format(4, 64).padding([64, 65, 192]).tolist() == [0, 63, 0]
    assert int(Format(4, 0).groups(65)) == 1
    assert int(Format(4, 0).padding(65)) == 0


def test_names_round_trip():
    every = formats(
        bits=range(1, 9),
        group_size=(32, 64, "row"),
        symmetric=(True, False),
        metadata=("fp16", "compact", "compact6", "gptq"),
        keep="bf16",
    )
    # 8 widths x 3 x 2 x 4, less six 1-bit asymmetric compact ones and six of GPTQ, and the source.
    assert len(every) == 192 - 6 - 6 + 1
    assert all(Format.parse(item.name) == item for item in every)
    assert Format.parse("int3-row-asym-compact") == Format(3, 0, metadata="compact")
    assert Format.parse("int3-g64-asym-compact6") == Format(3, metadata="compact6")
    assert Format.parse(Format.made_up(3).name) == Format.made_up(3)
    assert str(Format(3, 64, symmetric=True)) == "int3-g64-sym"


def test_formats_are_sorted_and_distinct():
    found = formats(bits=(4, 2, 4), group_size=("row", 128, 64), keep="fp16")
    assert [item.name for item in found] == [
        "int2-g64-asym",
        "int2-g128-asym",
        "int2-row-asym",
        "int4-g64-asym",
        "int4-g128-asym",
        "int4-row-asym",
        "keep-fp16",
    ]
    assert formats(bits=4, group_size="64") == (Format(4, 64),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format(9), "bits: 9 is not a whole number from 1 to 8"),
        (lambda: Format(3, 60), "group_size: 60 is not a multiple of 8 (32, 64, 128, ...) or 0"),
        (
            lambda: Format(3, metadata="int8"),
            "metadata 'int8' is unknown; one of fp16, compact, compact6",
        ),
        (
            lambda: Format(1, metadata="compact"),
            "int1-g64-asym-compact: 1 bit is sign times scale, and its mean has no compact form; "
            "use symmetric or fp16 metadata",
        ),
        (
            lambda: Format(1, metadata="compact6"),
            "int1-g64-asym-compact6: 1 bit is sign times scale, and its mean has no compact form; ",
        ),
        (lambda: Format.parse("int1-g64-sym-gptq"), "files of GPTQ hold 2 bits or more"),
        (lambda: formats(bits=1, metadata="gptq"), "and gptq metadata need 2 bits"),
        (lambda: Format.parse("int3-g64-sym-compact8"), "'int3-g64-sym-compact8' is unknown"),
        (lambda: Format.keep("int4"), "keep 'int4' is unknown; one of bf16, fp16, fp32, fp8"),
        (lambda: Format.parse("q4_k"), "format 'q4_k' is unknown; examples: int3-g64-sym"),
        (lambda: formats(group_size="wide"), "group_size: 'wide' is not a number or 'row'"),
        (lambda: formats(bits=()), "formats: no combination is valid"),
        (lambda: formats(bits=1, metadata="int8"), "metadata 'int8' is unknown; one of"),
        (lambda: formats(bits=1, metadata="compact6"), "compact metadata must be symmetric"),
        (lambda: Format.made_up(2).nbytes(1, 1), "option-2: a made-up format has no bytes"),
    ],
)
def test_what_cannot_be_stored_says_so(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert message in str(error.value)


def test_what_metadata_says_of_scales():
    found = {m: Format(3, metadata=m) for m in ("fp16", "compact", "compact6")}
    assert {m: (f.compact, f.share_bits) for m, f in found.items()} == {
        "fp16": (False, 0),
        "compact": (True, 8),
        "compact6": (True, 6),
    }
