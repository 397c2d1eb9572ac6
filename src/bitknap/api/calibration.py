"""Turn a model and a text into the inputs of estimators and judges: evidence and token windows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitknap.allocation.problem.budget import human
from bitknap.api.live import LiveModel
from bitknap.api.requests import Calibration
from bitknap.errors import DeviceMemoryError, InputError, ModelError
from bitknap.estimators.evidence.evidence import Evidence, LinearEvidence
from bitknap.estimators.evidence.of_weights import of_weights
from bitknap.estimators.measuring.documents import Documents, TextLike, TokenWindows, text_of
from bitknap.estimators.measuring.language_model import loaded
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.measuring.text import Encoded, document_of, encode
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.sweep.in_memory import calibrate, digest_of
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.peak_memory import Way, layer_bytes, way_to_calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.progress import Progress
from bitknap.quantization.gguf import imatrix
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.packed.resume import settings
from bitknap.quantization.rounding.methods import Gptq
from bitknap.quantization.rounding.rounding import recorded_for, takes_squares
from bitknap.quantization.source.architecture import config_of, text_config_of
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.devices import dtype_name
from bitknap.quantization.source.transformers_calls import calling_transformers
from bitknap.quantization.stacks.grouping import stacks


def gather(
    source: Checkpoint,
    needs: frozenset[str],
    asked: Calibration,
    *,
    way: Way | None = None,
    readings: Readings | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Return the required evidence: from the weights alone, or from a pass over a text.

    Args:
        source: the model.
        needs: what an estimator needs.
        asked: the calibration request, with one text.
        way: the whole model in memory or one layer at a time; when not given, the quickest way
            within the request's limits.
        readings: where measurements are kept; they are not kept if this is not given.
        progress: called with (what, done, of).

    Raises:
        InputError: a pass over the text would take more than `max_memory` bytes.
    """
    if asked.imatrix is not None:
        return _of_imatrix(source, needs, asked, asked.imatrix)
    needs = needs | recorded_for(asked.method)
    if not needs:
        return of_weights(source, asked.include, rounding=asked.method, seed=asked.seed)
    kept = readings or Readings()
    evidence = _pass(source, needs, asked, way, kept, progress)
    about = {"model": source.fingerprint, "dtype": dtype_name(asked.products)}
    return replace(
        evidence,
        provenance={**evidence.provenance, **about},
        rounding=asked.method,
        readings=kept,
        effort=asked.effort,
        device=asked.on_device,
    )


def _of_imatrix(
    source: Checkpoint, needs: frozenset[str], asked: Calibration, path: Path
) -> Evidence:
    """Return evidence whose mean squares of inputs are those of an importance matrix.

    Raises:
        InputError: an estimator or the rounding method needs more than that.
        FileError: the file cannot be read.
        MismatchError: it is of another model.
    """
    if needs or not takes_squares(asked.method):
        what = "the estimator" if needs else asked.method.name
        raise InputError(f"`imatrix`: {what} needs more than mean squares of inputs; leave it out")
    evidence = of_weights(source, asked.include, rounding=asked.method, seed=asked.seed)
    rows = imatrix.of_units(imatrix.read(path), evidence.units, path)
    linears = {
        unit: LinearEvidence(tokens=1, input_square=torch.from_numpy(row).double())
        for unit, row in enumerate(rows)
    }
    provenance = {**evidence.provenance, "text": f"imatrix {path.name}", "tokens": 0}
    return replace(evidence, linears=linears, provenance=provenance, device=asked.on_device)


def _pass(
    source: Checkpoint,
    needs: frozenset[str],
    asked: Calibration,
    way: Way | None,
    readings: Readings,
    progress: Progress | None,
) -> Evidence:
    """Return the evidence from a pass over the text, in one piece or layer by layer."""
    layout = walk_headers(source.config, source.shapes, asked.include)
    way = way or way_to_calibrate(source, layout, asked.tokens, needs, asked.memory)
    windows, recorded = calibration_windows(source, asked), Recorded.of(needs)
    writer.check_finite(source)
    if way == "layers":
        return calibrate_by_layer(
            Skeleton(source, asked.include, where=asked.computing),
            windows,
            recorded,
            seed=asked.seed,
            readings=readings,
            progress=progress,
        )
    with saying_what_fits(lambda: layer_bytes(source, layout, asked.tokens, needs)):
        model = loaded(source.folder, asked.computing)
        return calibrate(
            model,
            walk(model, asked.include),
            windows,
            recorded,
            seed=asked.seed,
            progress=progress,
        )


@contextlib.contextmanager
def saying_what_fits(least: Callable[[], int]) -> Iterator[None]:
    """Add to a lack of memory for a whole model on a device what its layers take one at a time.

    Args:
        least: returns that number of bytes.
    """
    try:
        yield
    except DeviceMemoryError as error:
        raise DeviceMemoryError(
            f"{error}, or with `device_memory` below what the whole model takes: one decoder layer "
            f"at a time takes about {human(least())}"
        ) from None


def readings_about(
    origin: Checkpoint,
    asked: Sequence[Calibration],
    *,
    rotation: int | None = None,
    blocks: int | None = None,
) -> dict[str, Any]:
    """Return the inputs that measurements on a model depend on, as JSON values; reads all weights.

    Args:
        origin: the model, before it is rotated or sorted.
        asked: the calibration requests, which differ only in their texts.
        rotation: seed of the rotation of the residual stream; None does not rotate it.
        blocks: number of blocks of rows that neurons are sorted into; None does not sort.
    """
    first = asked[0]
    units = walk_headers(origin.config, origin.shapes, first.include).units
    return {
        "model": origin.checksum(),
        "text": [digest_of(calibration_windows(origin, one).ids) for one in asked],
        "tokens": first.tokens,
        "include": sorted(roles_of(units)),
        "seed": first.seed,
        "method": settings(first.method),
        "dtype": dtype_name(first.products),
        "rotation": rotation,
        "sorting": blocks,
    }


def calibration_windows(source: Checkpoint, asked: Calibration) -> Windows:
    """Return the windows of a calibration text for a model; the request has one text."""
    config = config_of(source.folder)
    document = encoded(source.folder, document_of(text_of(asked.only_text), "calibration"), config)
    return document.windows(asked.tokens, longest_of(config))


def encoded(
    folder: Path, text: str | Documents | TokenWindows, config: Any
) -> Encoded | TokenWindows:
    """Return a document tokenized for the model in a folder, whose configuration is given.

    Raises:
        InputError: the text is empty, or the tokenizer is missing or does not belong to the model.
    """
    return _encoded(None if isinstance(text, TokenWindows) else tokenizer_of(folder), text, config)


def _encoded(
    tokenizer: Any, text: str | Documents | TokenWindows, config: Any
) -> Encoded | TokenWindows:
    vocabulary = getattr(text_config_of(config), "vocab_size", None)
    if not isinstance(text, TokenWindows):
        return encode(tokenizer, text, vocabulary)
    most = int(text.ids.max())
    if vocabulary is not None and most >= vocabulary:
        raise InputError(
            f"text: has token {most}, the model's embedding has {vocabulary:,} rows; pass windows "
            "of the model's own tokenizer"
        )
    return text


def too_few_tokens(evidence: Evidence, rounding: Gptq) -> list[tuple[int, int, str, int]]:
    """Return (layer, expert, projection, tokens) of matrices for which GPTQ falls back."""
    units = evidence.units
    matrices = []
    for run in stacks(units):
        known = evidence.inputs(run)
        for unit, few, seen in zip(
            run, rounding.fallbacks(known).tolist(), known.tokens.tolist(), strict=True
        ):
            if few:
                name = str(units.projections[units.projection[unit]])
                matrices.append((int(units.layer[unit]), int(units.expert[unit]), name, int(seen)))
    return matrices


def evaluation_windows(model: Path | LiveModel, text: TextLike, tokens: int) -> Windows:
    """Return the windows of an evaluation text for the model in a folder, or a live one."""
    live = isinstance(model, LiveModel)
    config = model.model.config if isinstance(model, LiveModel) else config_of(model)
    if config.is_encoder_decoder:
        name = "the model" if live else model
        raise ModelError(
            f"{name} is an encoder-decoder; losses can be measured for decoder-only models alone"
        )
    document = document_of(text_of(text), "evaluation")
    if isinstance(model, LiveModel):
        return _encoded(model.tokenizer, document, config).windows(tokens, longest_of(config))
    return encoded(model, document, config).windows(tokens, longest_of(config))


def longest_of(config: Any) -> int:
    """Return the longest window a configuration allows; 512 where it does not say.

    Raises:
        ModelError: it is not a number of tokens.
    """
    longest = getattr(text_config_of(config), "max_position_embeddings", None)
    if longest is None:
        return 512
    if type(longest) is not int or longest < 1:
        raise ModelError(
            f"config.json: max_position_embeddings: {longest!r} is not a whole number above 0"
        )
    return longest


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer beside a model.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    what = f"{folder}: no tokenizer that transformers can read"
    with calling_transformers(what, "put the model's own tokenizer in its folder", InputError):
        return AutoTokenizer.from_pretrained(folder)
