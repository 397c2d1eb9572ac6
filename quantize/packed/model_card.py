"""The model card of a packed checkpoint: a README.md that says what is in it and how to load it.

The source's own README.md is not lost: it stays beside the card under another name, and its licence
is carried over. A card does not say when and where it was made, so that equal checkpoints have
equal cards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.budget import human
from bitknap.allocation.problem.units import ROLES
from bitknap.disk.atomic import write_whole
from bitknap.errors import FileError

CARD, SOURCE_CARD = "README.md", "SOURCE_README.md"
# Maximum size of a card, so that a checkpoint's size can be bounded before its card is written.
MOST_BYTES = 16_384
_LAYER_BYTES = 8_000  # of that, at most, for the table of layers
_MOST_FORMATS = 32

_HUB_FOLDER = re.compile(r"models--(.+?)--(.+)")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LICENSE = re.compile(r"(license(?:_name|_link)?):[ \t]*(\S.{0,199})")


def write(
    folder: Path,
    plan: BitPlan,
    *,
    source: Path,
    sizes: Mapping[str, int],
    losses: Mapping[str, float] | None = None,
) -> None:
    """Write the card of a packed checkpoint, and keep the README.md that was copied into it.

    Args:
        folder: the checkpoint; it may already hold the source's files beside weights.
        plan: the plan that was applied.
        source: folder of the model that was quantized.
        sizes: bytes by a name of what takes them, such as {"packed weights": …, "source": …}.
        losses: losses measured on held-out text, if any: some of "perplexity", "kl",
            "kl_se" and "top1".
    """
    theirs = _text(source / CARD)
    if theirs is not None:
        write_whole(folder / SOURCE_CARD, theirs.encode())
    text = card(
        plan,
        sizes,
        losses,
        name=hub_id(source),
        license=licence(theirs or ""),
        described=theirs is not None,
    )
    write_whole(folder / CARD, text.encode())


def measured(folder: Path, losses: Mapping[str, float]) -> None:
    """Replace the measured losses in the card in `folder`; the rest stays as it is.

    Raises:
        FileError: there is no card, or it is not one that `write` wrote.
    """
    path = folder / CARD
    text = _text(path)
    parts = re.split(r"(?m)^## Loss\n", text or "", maxsplit=1)
    if len(parts) != 2:
        raise FileError(f"{path}: not a card of a packed checkpoint; quantize again to get one")
    _, rest = parts[1].split("\n## ", 1)
    write_whole(path, f"{parts[0]}## Loss\n{_losses(losses)}\n## {rest}".encode())


def card(
    plan: BitPlan,
    sizes: Mapping[str, int],
    losses: Mapping[str, float] | None = None,
    *,
    name: str = "",
    license: Mapping[str, str] | None = None,
    described: bool = False,
) -> str:
    """Return the text of a card, at most `MOST_BYTES` of it.

    Args:
        plan: the plan that was applied.
        sizes: bytes by a name of what takes them.
        losses: measured losses, if any.
        name: hub id of the source, or "" if it has none.
        license: the licence entries of the source's front matter.
        described: whether the source's own README.md stands beside the card.
    """
    lines = [
        *_front(name, license or {}),
        *_opening(plan, name, described),
        "## Sizes",
        "",
        *_table(("what", "bytes", ""), ((k, f"{v:,}", human(v)) for k, v in sizes.items())),
        "",
        "## Loss",
        _losses(losses or {}),
        "## How it was made",
        "",
        *_made(plan),
        "",
        "## Formats",
        "",
        *_table(("format", "matrices", "weights", "bytes"), _formats(plan)),
        "",
        "## Bits per weight by layer",
        "",
        "Scales and zero points are counted. The plan, matrix by matrix, is in "
        "`bitknap_plan.json`.",
        "",
        *_layers(plan),
    ]
    return "\n".join(lines) + "\n"


def _front(name: str, license: Mapping[str, str]) -> list[str]:
    """Return the front matter, which the hub reads."""
    front = dict(license)
    if name:
        front |= {"base_model": name, "base_model_relation": "quantized"}
    front |= {"library_name": "transformers"}
    tags = ("bitknap", "quantized", "mixed-precision", "mixture-of-experts")
    lines = ["---", *(f"{key}: {value}" for key, value in front.items())]
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def _opening(plan: BitPlan, name: str, described: bool) -> list[str]:
    """Return the title, what the checkpoint is, and how it is loaded."""
    title = name.rpartition("/")[2] or "Quantized model"
    more = f" The model itself is described in `{SOURCE_CARD}`." if described else ""
    return [
        f"# {title}, {plan.bpw:.4g} bits per weight",
        "",
        f"{len(plan.units):,} matrices of {f'`{name}`' if name else 'the source model'}, each "
        "quantized by Bitknap with its own number of bits, chosen for the least expected loss at "
        f"a given size. Everything else is unchanged.{more}",
        "",
        "## Loading",
        "",
        "```python",
        "import bitknap  # tells transformers how to read packed weights",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder, or its hub id")',
        "```",
        "",
        "Weights stay packed in memory and are dequantized as they are used. "
        "`bitknap.load(folder)` dequantizes them once, which is faster and takes the memory of "
        "the source model.",
        "",
        "## Serving",
        "",
        *_table(("runtime", "how"), _runtimes(plan, name)),
        "",
    ]


def _runtimes(plan: BitPlan, name: str) -> Iterator[tuple[str, str]]:
    """Yield each runtime and how it serves this checkpoint, or one like it."""
    yield "transformers", "as above; on a CUDA GPU experts run packed, by kernels"
    yield "vLLM", "`pip install bitknap` beside it, then `vllm serve` this folder or its hub id"
    again = f"bitknap quantize {name or 'SOURCE'} --target {{}} --budget {plan.bpw:.4g}bpw -o OUT"
    yield "llama.cpp", f"`{again.format('gguf')}` plans and writes its own formats"
    yield "MLX", f"`{again.format('mlx')}` plans and writes its own formats"
    yield "others", "`bitknap list targets` names them"


def tagged(text: str, tags: Iterable[str]) -> str:
    """Return a card with more tags in its front matter; those that it has stay single."""
    front, rule, rest = text.partition("\n---\n")
    known = front.splitlines()
    more = [f"- {tag}" for tag in dict.fromkeys(tags) if f"- {tag}" not in known]
    return "\n".join([front, *more]) + rule + rest


def hub_id(source: Path) -> str:
    """Return the hub id of a folder in the hub's cache, or "": other paths are private.

    Args:
        source: such as ".../models--mistralai--Mixtral-8x7B-v0.1/snapshots/fc7ac94".
    """
    for part in source.parts:
        match = _HUB_FOLDER.fullmatch(part)
        if match and _HUB_ID.fullmatch(name := f"{match[1]}/{match[2]}"):
            return name
    return ""


def licence(readme: str) -> dict[str, str]:
    """Return the licence entries of a README's front matter, value by key as written."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", readme, re.DOTALL | re.MULTILINE)
    lines = match[1].splitlines() if match else []
    pairs = (_LICENSE.fullmatch(line.rstrip()) for line in lines)
    # Skip a value that continues on the next line ("|", ">").
    return {pair[1]: pair[2] for pair in pairs if pair and pair[2][0] not in "|>&*"}


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _table(heads: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join('---:' if place else '---' for place in range(len(heads)))}|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _losses(losses: Mapping[str, float]) -> str:
    """Return the section on losses, including the blank lines around it."""
    rows = []
    if "perplexity" in losses:
        rows.append(("perplexity", f"{losses['perplexity']:.3f}"))
    if "kl" in losses:
        error = f" ± {losses['kl_se']:.5f}" if "kl_se" in losses else ""
        rows.append(("KL from the source, nats per token", f"{losses['kl']:.5f}{error}"))
    if "top1" in losses:
        rows.append(("same most likely token", f"{100 * losses['top1']:.2f} %"))
    if not rows:
        return "\nNot measured; measure it with `bitknap evaluate`.\n"
    return "\n" + "\n".join(_table(("on held-out text", "measured"), rows)) + "\n"


def _made(plan: BitPlan) -> Iterator[str]:
    header = plan.header
    for key, label in (
        ("solver", "solver"),
        ("profile", "grouping rule"),
        ("estimator", "costs estimated by"),
        ("method", "rounding"),
        ("text", "calibration text"),
        ("seed", "seed"),
    ):
        if key in header:
            yield f"- {label}: {_short(header[key])}"
    if "row_blocks" in header:
        yield f"- row blocks of each matrix: {_short(header['row_blocks'])}"
    transformed = header.get("rewritten")
    if isinstance(transformed, Mapping):
        if transformed.get("rotation") is not None:
            yield f"- residual stream rotated: seed {_short(transformed['rotation'])}"
        if transformed.get("order") is not None:
            yield "- neurons of experts sorted by sensitivity"
    objective, bound = header.get("objective"), header.get("bound")
    if isinstance(objective, int | float):
        yield f"- expected loss: {objective:.5g}"
        if isinstance(bound, int | float):
            gap = (objective - bound) / abs(objective) if objective else 0.0
            yield f"- no plan can be below: {bound:.5g} (gap {max(gap, 0.0):.2g})"
    limits = header.get("limits")
    if isinstance(limits, Mapping):
        for name, value in list(limits.items())[:8]:
            yield f"- limit on {_short(name)}: {_short(value)}"
    yield f"- source model: fingerprint `{plan.model}`"


def _short(value: object) -> str:
    """Return a value in one line of at most 120 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else f"{text[:119]}…"


def _formats(plan: BitPlan) -> Iterator[tuple[str, ...]]:
    """Yield format, matrices, share of the weights and bytes, most weights first."""
    weights, count = plan.units.numel, len(plan.formats)
    of_all = np.bincount(plan.choice, weights, count)
    order = [i for i in np.argsort(-of_all, kind="stable").tolist() if (plan.choice == i).any()]
    groups = [(plan.formats[i].name, plan.choice == i) for i in order[:_MOST_FORMATS]]
    if rest := order[_MOST_FORMATS:]:
        groups.append((f"{len(rest)} others", np.isin(plan.choice, rest)))
    for name, chosen in groups:
        share = 100 * weights[chosen].sum() / max(1, weights.sum())
        yield name, f"{chosen.sum():,}", f"{share:.1f} %", f"{plan.nbytes[chosen].sum():,}"


def _layers(plan: BitPlan) -> list[str]:
    """Return the table of layers; equal neighbours share a row."""
    units = plan.units
    pairs = np.unique(np.stack([units.role, units.projection]), axis=1).T.tolist()
    labels = [f"{ROLES[r]} {units.projections[p]}" for r, p in pairs]
    kinds = [(units.role == r) & (units.projection == p) for r, p in pairs]
    rows = []
    for layer in np.unique(units.layer).tolist():
        here = units.layer == layer
        cells = tuple(_bpw(plan, here & kind) for kind in kinds)
        rows.append((layer, (*cells, _bpw(plan, here))))
    merged = []
    for cells, group in groupby(rows, key=lambda row: row[1]):
        numbers = [layer for layer, _ in group]
        name = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        merged.append((name, *cells))
    lines = list(_table(("layer", *labels, "all"), merged))
    room = np.cumsum([len(line.encode()) + 1 for line in lines]) <= _LAYER_BYTES
    kept = [line for line, fits in zip(lines, room.tolist(), strict=True) if fits]
    return kept if len(kept) == len(lines) else [*kept, "", f"and {len(lines) - len(kept)} more."]


def _bpw(plan: BitPlan, which: np.ndarray) -> str:
    weights = int(plan.units.numel[which].sum())
    return f"{8 * plan.nbytes[which].sum() / weights:.3f}" if weights else ""
