"""The inputs of strategies: a model, its calibration evidence, and the texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from bitknap.allocation import Format
from bitknap.allocation import formats as make_formats
from bitknap.allocation.problem.arrays import Floats
from bitknap.api.calibration import calibration_windows, encoded, gather, longest_of
from bitknap.api.plan_measures import Loop
from bitknap.api.refining import GATE_TOKENS, open_loop
from bitknap.api.requests import REFINE_TOKENS, Calibration
from bitknap.benchmarks.compare.judge import Judge, check_apart
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.judging.memory import way_to_measure_plans
from bitknap.estimators.measuring.readings import Readings
from bitknap.estimators.measuring.text import BUILTIN, read_text
from bitknap.estimators.measuring.windows import Windows
from bitknap.estimators.published.chowdhury import router_norms
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.peak_memory import Way
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.progress import Progress
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.buildable import check_source
from bitknap.quantization.rounding.memo import Remembered
from bitknap.quantization.rounding.methods import method as method_of
from bitknap.quantization.rounding.rounding import recorded_for
from bitknap.quantization.source.architecture import config_of
from bitknap.quantization.source.checkpoint import Checkpoint, resolve
from bitknap.quantization.source.devices import CPU, dtype_name

NOT_IN_MEMORY = "--tasks: need the whole model in memory; raise --max-memory, or leave out --tasks"
# Domains of the bundled texts in order, a quarter of the text each.
DOMAINS = ("books", "code", "speeches", "wiki")
WIDTHS, SIZES = (1, 2, 3, 4, 5, 6, 8), (32, 64, "row")
# File of a bundled model with its routers before training.
_ROUTERS = "initial_routers.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a comparison.

    Attributes:
        model: a folder, a hub id, or "reference:NAME".
        method: how weights are rounded.
        profile: which units share a format; published rules keep their own ties.
        text: calibration text, a file or "builtin".
        tokens: number of its tokens used for calibration.
        evaluations: number of plans that the closed loop measures at each budget.
        refine_tokens: number of its tokens used to measure plans.
        evaluation: evaluation texts, each a domain; "builtin" has four.
        judged: number of evaluation tokens, all texts together.
        seed: the random seed.
        formats: formats that Bitknap's own strategies choose from.
        device: name of the device where the model runs and weights are rounded.
        tasks: whether plans are also evaluated on tasks, which takes the model in memory.
        max_memory: maximum bytes; a model that needs more is run one decoder layer at a time.
        device_memory: maximum bytes on a GPU.
        dtype: name of the dtype of the model's matrix products.
    """

    model: str
    method: str = "rtn"
    profile: str = "free"
    text: str = BUILTIN
    tokens: int = 8192
    evaluations: int = 64
    refine_tokens: int = REFINE_TOKENS
    evaluation: tuple[str, ...] = (BUILTIN,)
    judged: int = 8192
    seed: int = 0
    formats: tuple[Format, ...] = field(
        default_factory=lambda: make_formats(WIDTHS, SIZES, (False, True), ("compact",))
    )
    device: str = str(CPU)
    tasks: bool = False
    max_memory: int | None = None
    device_memory: int | None = None
    dtype: str = dtype_name(torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The inputs that strategies plan from.

    Attributes:
        options: the options of the comparison.
        source: the checkpoint.
        evidence: the calibration pass: moments, curvature, traces and gradients.
        judge: measures plans on the evaluation text.
        loop: measures plans on calibration text.
        sets: makes passes over quarters of the calibration text, for MoQa.
        final: router norms, by layer.
        initial: router norms before training, if known.
        progress: called with (what, done, of).
    """

    options: Options
    source: Checkpoint
    evidence: Evidence
    judge: Judge
    loop: Loop
    sets: Callable[[], tuple[Evidence, ...]]
    final: Mapping[int, Floats]
    initial: Mapping[int, Floats] | None
    progress: Progress | None


def prepare(options: Options, progress: Progress | None = None) -> Setting:
    """Load and calibrate a model, and cut the texts.

    Raises:
        InputError: a text cannot be used, is too short, or is also used for judging.
        ModelError: the model cannot be walked or calibrated.
    """
    source = Checkpoint.open(resolve(options.model))
    check_source(source, reads_text=True)
    asked, way = _asked(options, source)
    config = config_of(source.folder)
    held_out, domain, names = _held_out(options, source.folder, config)
    # Several strategies measure the same groups.
    evidence = gather(
        source,
        _needs(options),
        asked,
        way=way,
        readings=Readings(in_memory=True),
        progress=progress,
    )
    loop = open_loop(
        source, evidence, asked, options.refine_tokens, judged=held_out, progress=progress
    )
    assert loop.judged is not None
    # The prefix that the tokenizer adds to every window does not count as shared text.
    windows = calibration_windows(source, asked)
    read = (windows.ids, *(part.windows for part in loop.parts), loop.gate.windows)
    check_apart(held_out.ids[:, held_out.prefix :], torch.cat(read)[:, held_out.prefix :])
    return Setting(
        options=options,
        source=source,
        evidence=evidence,
        judge=Judge(sample=loop.judged, evidence=loop.evidence, domain=domain, names=names),
        loop=loop,
        sets=lambda: tuple(_sets(source, asked, evidence, windows)),
        final=router_norms(source, walk_headers(source.config, source.shapes)),
        initial=_initial(source.folder, evidence.layout),
        progress=progress,
    )


def _needs(options: Options) -> frozenset[str]:
    """Return what strategies read off the calibration pass."""
    return frozenset({"kl", "curvature", "gradients"} | recorded_for(method_of(options.method)))


def _asked(options: Options, source: Checkpoint) -> tuple[Calibration, Way]:
    """Return how the model is calibrated, and whether it goes one layer at a time.

    Raises:
        InputError: neither way is within the limit, or tasks need more.
    """
    rounding = method_of(options.method)
    asked = Calibration(
        text=options.text,
        tokens=options.tokens,
        seed=options.seed,
        rounding=rounding,
        device=options.device,
        dtype=options.dtype,
        max_memory=options.max_memory,
        device_memory=options.device_memory,
    )
    tokens = options.tokens + options.refine_tokens + GATE_TOKENS + options.judged
    layout = walk_headers(source.config, source.shapes)
    way = way_to_measure_plans(source, layout, tokens, asked.memory, _needs(options))
    if way == "layers" and options.tasks:
        raise InputError(NOT_IN_MEMORY)
    if way == "whole":
        asked = replace(asked, rounding=Remembered(rounding=rounding))
    return asked, way


def _sets(
    source: Checkpoint, asked: Calibration, evidence: Evidence, windows: Windows
) -> Iterator[Evidence]:
    """Yield passes over quarters of the calibration windows, in the text's order."""
    cuts = [len(windows) * part // len(DOMAINS) for part in range(len(DOMAINS) + 1)]
    for part in [windows[a:b] for a, b in pairwise(cuts) if b > a]:
        if evidence.replay is not None:
            yield calibrate(evidence.replay.model, evidence.layout, part, seed=asked.seed)
        else:
            skeleton = Skeleton(source, asked.include, where=asked.computing)
            yield calibrate_by_layer(skeleton, part, seed=asked.seed)


def _held_out(
    options: Options, folder: Path, config: Any
) -> tuple[Windows, np.ndarray, tuple[str, ...]]:
    """Return the windows that plans are judged on, their domains, and the domain names."""
    texts = {
        BUILTIN if name == BUILTIN else Path(name).stem: read_text(name, "evaluation")
        for name in options.evaluation
    }
    if len(texts) < len(options.evaluation):
        raise InputError(
            f"--evaluation-text: {', '.join(options.evaluation)}: a name appears twice; give each "
            "domain a file of its own name"
        )
    if BUILTIN in texts:
        words = texts.pop(BUILTIN)
        cuts = [len(words) * part // len(DOMAINS) for part in range(len(DOMAINS) + 1)]
        texts |= {n: words[a:b] for n, (a, b) in zip(DOMAINS, pairwise(cuts), strict=True)}
    each = options.judged // len(texts)
    longest = longest_of(config)
    by_domain = [encoded(folder, words, config).windows(each, longest) for words in texts.values()]
    counts = [len(windows) for windows in by_domain]
    held_out = Windows(ids=torch.cat([one.ids for one in by_domain]), prefix=by_domain[0].prefix)
    return held_out, np.repeat(np.arange(len(by_domain)), counts), tuple(texts)


def _initial(folder: Path, layout: Layout) -> Mapping[int, Floats] | None:
    """Return the router norms of a bundled model before training."""
    file = folder / _ROUTERS
    return router_norms(load_file(file), layout) if file.is_file() else None
