"""ggml's own functions, called in the library that the package `xllamacpp` holds.

Every row is rounded by itself, with one importance for each column, exactly as `llama-quantize`
does. The first use of some types builds their tables of codes, which takes seconds.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitknap.allocation.codecs.ggml import TYPES
from bitknap.errors import InputError

EXTRA = "pip install 'bitknap[gguf]'"
# Numbers of the types in ggml's interface, which never change: files hold them.
NUMBERS = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq2_xxs": 16,
    "iq2_xs": 17,
    "iq3_xxs": 18,
    "iq1_s": 19,
    "iq4_nl": 20,
    "iq3_s": 21,
    "iq2_s": 22,
    "iq4_xs": 23,
    "iq1_m": 29,
    "bf16": 30,
    "mxfp4": 39,
}
# Rows that one thread rounds at a time, by their weights.
_CHUNK = 1 << 16


def quantize(rows: np.ndarray, type: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Return rows of weights as ggml's blocks, uint8 [rows, bytes].

    Args:
        rows: float32 [rows, cols], finite; cols must be a multiple of the type's block.
        type: a name in `TYPES`.
        importance: what an error in each column counts, float32 [cols], above 0; types that cannot
            do without count all columns alike when it is not given.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    count, cols = rows.shape
    if type == "f16":
        with np.errstate(over="ignore"):
            return rows.astype(np.float16).view(np.uint8).reshape(count, -1)
    library, number = _library(), NUMBERS[type]
    if importance is None and library.ggml_quantize_requires_imatrix(number):
        importance = np.ones(cols)
    weight = None if importance is None else np.ascontiguousarray(importance, np.float32)
    kind = TYPES[type]
    blocks = np.empty((count, cols // kind.block * kind.nbytes), np.uint8)
    library.ggml_quantize_init(number)

    def fill(first: int) -> None:
        part, out = rows[first : first + step], blocks[first : first + step]
        written = library.ggml_quantize_chunk(
            number,
            part.ctypes.data,
            out.ctypes.data,
            0,
            len(part),
            cols,
            None if weight is None else weight.ctypes.data,
        )
        assert written == out.nbytes, (type, written, out.nbytes)

    step = max(1, _CHUNK // cols)
    firsts = range(0, count, step)
    if len(firsts) > 1 and torch.get_num_threads() > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, firsts))
    else:
        for first in firsts:
            fill(first)
    return blocks


def dequantize(blocks: np.ndarray, type: str, cols: int) -> np.ndarray:
    """Return the weights that blocks [rows, bytes] stand for, float32 [rows, cols]."""
    blocks = np.ascontiguousarray(blocks)
    if type == "f16":
        return blocks.view(np.float16).astype(np.float32)
    weights = np.empty((len(blocks), cols), np.float32)
    name = type[:-1] + "K" if type.endswith("_k") else type
    decode = getattr(_library(), f"dequantize_row_{name}")
    decode.restype = None
    decode.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    decode(blocks.ctypes.data, weights.ctypes.data, weights.size)
    return weights


def check() -> None:
    """Raise InputError unless ggml can be called; the message names the extra to install."""
    _library()


@cache
def _library() -> Any:
    """Return the library.

    Raises:
        InputError: the package is missing, or its library lacks what is needed.
    """
    spec = find_spec("xllamacpp")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [file for folder in folders for file in sorted(Path(folder).glob("xllamacpp*.so"))]
    if not files:
        raise InputError(f"ggml: the package xllamacpp is missing; {EXTRA}")
    try:
        library = ctypes.CDLL(str(files[0]))
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        chunk = library.ggml_quantize_chunk
        chunk.restype = ctypes.c_size_t
        chunk.argtypes = (number, pointer, pointer, count, count, count, pointer)
        library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        library.ggml_quantize_requires_imatrix.argtypes = (number,)
        library.ggml_quantize_init.restype = None
        library.ggml_quantize_init.argtypes = (number,)
        row_size = library.ggml_row_size
        row_size.restype, row_size.argtypes = ctypes.c_size_t, (number, count)
    except (OSError, AttributeError) as error:
        raise InputError(
            f"ggml: xllamacpp {_version()} cannot be used ({error}); {EXTRA} --upgrade"
        ) from None
    wrong = [n for n, kind in TYPES.items() if row_size(NUMBERS[n], kind.block) != kind.nbytes]
    if wrong:
        raise InputError(
            f"ggml: xllamacpp {_version()} stores {wrong[0]} in other blocks; {EXTRA} --upgrade"
        )
    return library


def _version() -> str:
    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return "of no known version"
