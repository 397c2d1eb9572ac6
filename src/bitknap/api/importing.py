"""Turn what other tools have measured into a cost table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitknap.allocation import CostTable, Format
from bitknap.allocation.problem.serving import KEY
from bitknap.api.requests import default_formats
from bitknap.disk.atomic import read_json
from bitknap.disk.json_shapes import json_object
from bitknap.errors import FileError, InputError
from bitknap.estimators.evidence.of_weights import of_weights
from bitknap.estimators.imported import autoround, exl2, imatrix, modelopt
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.models.tensor_names import INCLUDES
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.packed.writer import fixed_bytes
from bitknap.quantization.runtime.serving_needs import serving_of
from bitknap.quantization.source.checkpoint import Checkpoint, resolve

_KNOWN = (
    "ExLlamaV2's measurement.json, AutoRound's scheme_NN_KEY.json, ModelOpt's search state and "
    "llama.cpp's importance matrices are"
)
_ZIP = b"PK\x03\x04"


def import_costs(
    *files: str | Path,
    model: str | Path | None = None,
    formats: Sequence[Format] | None = None,
    include: Collection[str] = (),
) -> CostTable:
    """Return what another tool has measured as a cost table, so that `solve` can plan with it.

    Args:
        files: ExLlamaV2's `measurement.json`; ModelOpt's search state; the files of one run of
            AutoRound's AutoScheme, one for each scheme; or an importance matrix of llama.cpp. The
            file says which tool it is from.
        model: The model that AutoRound scored, or that the importance matrix was made with; the
            others' units and options are their own, and a plan names options by their number in
            the file, or in the table's provenance.
        formats: The formats that an importance matrix's costs are of; `default_formats()` when not
            given. The other files have their own.
        include: Roles besides routed experts that an importance matrix's costs are of.

    Raises:
        InputError: A scheme is no format of Bitknap, or files and model do not go together.
        FileError: A file is damaged, or of a tool or version that is not known.
        MismatchError: Files are of different runs, or of another model.
    """
    if not files:
        raise InputError(f"files: none; {_KNOWN} read")
    first, *others = map(Path, files)
    start = _start(first)
    if start == imatrix.MAGIC or first.suffix == ".dat":
        return _of_imatrix(first, others, model, formats, include)
    if formats is not None or include:
        raise InputError(f"{first}: has formats and units of its own; leave `formats` out")
    if start == _ZIP:
        _check_alone(first, others, model)
        return modelopt.read(first)
    contents = [(path, _object(path)) for path in (first, *others)]
    if exl2.KEY in contents[0][1]:
        _check_alone(first, others, model)
        return exl2.read(first, contents[0][1])
    for path, content in contents:
        if autoround.KEY not in content:
            raise FileError(f"{path}: of no tool that is known; {_KNOWN} read")
    scores = [autoround.read(path, content) for path, content in contents]
    if model is None:
        raise InputError(f"{first}: AutoRound's scores need `model`, the model that was scored")
    source = Checkpoint.open(resolve(model))
    layout = _everything(source)
    return _of_model(autoround.table(scores, layout.units, {}), source)


def _of_imatrix(
    path: Path,
    others: Sequence[Path],
    model: str | Path | None,
    formats: Sequence[Format] | None,
    include: Collection[str],
) -> CostTable:
    if model is None:
        raise InputError(f"{path}: an importance matrix needs `model`, which it was made with")
    _check_alone(path, others, None)
    source = Checkpoint.open(resolve(model))
    evidence = of_weights(source, include)
    options = formats or default_formats(evidence.units)
    return _of_model(imatrix.table(path, evidence, options), source)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_ZIP))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None


def _object(path: Path) -> dict[str, Any]:
    return json_object(read_json(path), path, f"{_KNOWN} read")


def _check_alone(first: Path, others: Sequence[Path], model: str | Path | None) -> None:
    if others:
        raise InputError(f"{first}: holds a whole run, and {others[0]} is another; pass one file")
    if model is not None:
        raise InputError(f"{first}: names its units itself; leave `model` out")


def _everything(source: Checkpoint) -> Layout:
    """Return a model's units of as many roles as it can have."""
    roles: Collection[str] = INCLUDES
    return walk_headers(source.config, source.shapes, include=roles)


def _of_model(table: CostTable, source: Checkpoint) -> CostTable:
    """Return the table with what `estimate` would say about the model."""
    include = roles_of(table.units)
    layout = walk_headers(source.config, source.shapes, include=include)
    about = {
        "model": source.fingerprint,
        "fixed_bytes": fixed_bytes(source, layout),
        "source_bytes": source.folder_bytes,
        "include": sorted(include),
        KEY: serving_of(source, layout, table.formats).to_dict(),
    }
    return replace(table, provenance={**table.provenance, **about})
