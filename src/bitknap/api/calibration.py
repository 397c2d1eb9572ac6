"""From a model and a text to what estimators and judges read: evidence, and windows of tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitknap.errors import InputError, ModelError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.evidence.of_weights import of_weights
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.measuring.text import Encoded, encode, read_text
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.sweep.in_memory import calibrate, provenance_of
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.peak_memory import way_to_calibrate
from bitknap.progress import Progress
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.packed import writer
from bitknap.quantization.packed.folder import roles_of
from bitknap.quantization.packed.outline import settings
from bitknap.quantization.rounding.methods import RTN, Gptq
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.runtime import loading
from bitknap.quantization.source.architecture import config_of, text_config_of
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.transformers_calls import calling_transformers
from bitknap.quantization.stacks.apply import stacks


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a model is watched on.

    Attributes:
        text: calibration text, a file or "builtin".
        tokens: how much of it to use.
        include: roles beside routed experts.
        seed: random seed.
        rounding: how weights will be rounded; it may need whole second moments.
        max_memory: bytes; None for any number.
    """

    text: str
    tokens: int
    include: Collection[str] = ()
    seed: int = 0
    rounding: Rounding = RTN
    max_memory: int | None = None


def gather(
    source: Checkpoint,
    needs: frozenset[str],
    asked: Calibration,
    *,
    readings: Readings | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Return the evidence that is needed: from weights alone, or from a pass over a text.

    Args:
        source: the model.
        needs: what an estimator needs.
        asked: on what.
        readings: where measurements are kept; nowhere if not given.
        progress: called with (what, done, of).

    Raises:
        InputError: a pass over the text would take more than `max_memory` bytes.
    """
    if asked.rounding.needs_inputs:
        needs = needs | {"full"}
    if not needs:
        return of_weights(source, asked.include, rounding=asked.rounding, seed=asked.seed)
    on_disk = walk_headers(source.config, source.shapes, asked.include)
    way = way_to_calibrate(source, on_disk, asked.tokens, needs, asked.max_memory)
    windows = _windows(source, asked)
    writer.check_finite(source)
    full, traces = "full" in needs, "traces" in needs
    if way == "layers":
        found = calibrate_by_layer(
            source,
            windows,
            include=asked.include,
            full=full,
            traces=traces,
            seed=asked.seed,
            readings=readings,
            progress=progress,
        )
    else:
        model = loading.load(source.folder, torch.float32)
        found = calibrate(
            model,
            walk(model, asked.include),
            windows,
            full=full,
            curvature="curvature" in needs,
            traces=traces,
            gradients="gradients" in needs,
            by_layer=way == "gradients",
            seed=asked.seed,
            progress=progress,
        )
    provenance = {**found.provenance, "model": source.fingerprint}
    kept = readings or Readings()
    return replace(found, provenance=provenance, rounding=asked.rounding, readings=kept)


def readings_about(
    origin: Checkpoint,
    asked: Sequence[Calibration],
    *,
    rotation: int | None = None,
    blocks: int | None = None,
) -> dict[str, Any]:
    """Return what measurements on a model depend on, JSON values; reads all of its weights.

    Args:
        origin: the model, before it is rotated or sorted.
        asked: on what, alike but for their texts.
        rotation: seed of what turns the residual stream; None leaves it.
        blocks: number of blocks of rows that neurons are sorted into; None does not sort.
    """
    first = asked[0]
    units = walk_headers(origin.config, origin.shapes, first.include).units
    return {
        "model": origin.checksum(),
        "text": [provenance_of(_windows(origin, one).ids, one.seed)["text"] for one in asked],
        "tokens": first.tokens,
        "include": sorted(roles_of(units)),
        "seed": first.seed,
        "method": settings(first.rounding),
        "rotation": rotation,
        "sorting": blocks,
    }


def _windows(source: Checkpoint, asked: Calibration) -> Windows:
    config = config_of(source.folder)
    document = encoded(source.folder, read_text(asked.text, "calibration"), config)
    return document.windows(asked.tokens, longest_of(config))


def encoded(folder: Path, text: str, config: Any) -> Encoded:
    """Return a document as tokens of the model in a folder, whose configuration is given.

    Raises:
        InputError: the text is empty, or the tokenizer is missing or not the model's.
    """
    vocabulary = getattr(text_config_of(config), "vocab_size", None)
    return encode(tokenizer_of(folder), text, vocabulary)


def too_few_tokens(evidence: Evidence, rounding: Gptq) -> list[tuple[int, int, str, int]]:
    """Return (layer, expert, projection, tokens) of matrices that a method falls back on."""
    units = evidence.units
    found = []
    for run in stacks(units):
        known = evidence.inputs(run)
        for unit, few, seen in zip(
            run, rounding.fallbacks(known).tolist(), known.tokens.tolist(), strict=True
        ):
            if few:
                name = str(units.projections[units.projection[unit]])
                found.append((int(units.layer[unit]), int(units.expert[unit]), name, int(seen)))
    return found


def evaluation_windows(folder: Path, text: str, tokens: int) -> Windows:
    """Return the windows of an evaluation text for the model in `folder`."""
    config = config_of(folder)
    if config.is_encoder_decoder:
        raise ModelError(f"{folder}: an encoder-decoder; losses are those of decoder-only models")
    document = encoded(folder, read_text(text, "evaluation"), config)
    return document.windows(tokens, longest_of(config))


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
    with calling_transformers(what, "put the model's own tokenizer beside it", InputError):
        return AutoTokenizer.from_pretrained(folder)
