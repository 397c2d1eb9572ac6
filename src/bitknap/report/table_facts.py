"""Facts about a cost table in addition to its costs, as JSON values and as lines of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitknap.allocation import CostTable
from bitknap.allocation.problem.budget import human

# A line names at most this many experts and counts the rest.
_NAMED = 12


def table_summary(table: CostTable) -> dict[str, Any]:
    """Return facts about a table as JSON values; a format's cost is over units that may use it."""
    allowed = np.isfinite(table.cost)
    costs = np.where(allowed, table.cost, 0.0).sum(0).tolist()
    forbidden = (~allowed).sum(0).tolist()
    sizes = table.nbytes.sum(0).tolist()
    return {
        "kind": "table",
        "units": len(table.units),
        "weights": table.weights,
        "formats": {
            item.name: {"bytes": size, "cost": cost} | ({"forbidden": count} if count else {})
            for item, size, cost, count in zip(table.formats, sizes, costs, forbidden, strict=True)
        },
        "provenance": displayed(table.provenance),
    }


def displayed(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return a header or a provenance without the order of neurons, which takes megabytes."""
    rewritten = said.get("rewritten")
    order = rewritten.get("order") if isinstance(rewritten, Mapping) else None
    if not isinstance(rewritten, Mapping) or not isinstance(order, Mapping):
        return dict(said)
    return {**said, "rewritten": {**rewritten, "order": {"blocks": order.get("blocks")}}}


def notes(table: CostTable) -> str:
    """Return facts to check before trusting a table, one per line."""
    said = table.provenance
    lines = [*_experts(said), *_sampled(table), *_repaired(said), *_rewritten(said)]
    for one in (said, *said.get("each", ())):
        lines += [*_readings(one), *_check(one), *_proxies(one), *_samples(one)]
    if said.get("initial_router") is False:
        lines.append("no initial router: final norms alone rank experts; --initial-router adds it")
    return "\n".join(lines)


def few_tokens_note(few: Sequence[Sequence[Any]]) -> str:
    """Return a line on matrices with too few tokens for their rounding method."""
    named = _some([f"{layer}/{expert} {name} ({seen})" for layer, expert, name, seen in few])
    return (
        "too few tokens for their width, so rounded almost to nearest: layer/expert (tokens) "
        f"{named}"
    )


def left_out_note(left: Mapping[str, Sequence[str]]) -> str:
    """Return one line per reason why files of the source's folder were not copied."""
    lines = [f"not copied, {why}: {_some(names)}" for why, names in sorted(left.items())]
    # A file name need not be valid text.
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def decoded_note(sizes: Mapping[str, Any]) -> str:
    """Return a line on tensors that are written with more bits than the source stores."""
    return (
        f"{sizes['decoded']:,} tensors that are not quantized are written as bf16, which is how "
        f"every loader reads them: {human(sizes['decoded_bytes'])} instead of "
        f"{human(sizes['stored_bytes'])} in the source"
    )


def _experts(said: Mapping[str, Any]) -> list[str]:
    if "text" not in said and "texts" not in said:
        return ["no calibration text was read"]
    few, large = said.get("coverage", []), said.get("super_experts", [])
    lines = ["every expert saw enough tokens"]
    if few:
        named = _some([f"{layer}/{expert} ({seen})" for layer, expert, seen in few])
        lines = [f"few tokens, shrunk to the layer's mean: layer/expert (tokens) {named}"]
    if large:
        named = _some([f"{layer}/{expert} ({times:g} x)" for layer, expert, times in large])
        lines.append(
            f"super experts, output far above the layer's median: layer/expert (times) {named}"
        )
        held = said.get("protected", {})
        lines.append(
            f"the model cannot do without them: their {held['units']} units get no grid below "
            f"{held['bits']} bits, or the widest there is (--protect-bits)"
            if held.get("units")
            else "the model cannot do without them, and they are not protected (--protect-bits)"
        )
    return lines


def _sampled(table: CostTable) -> list[str]:
    share = table.provenance.get("rows", 1)
    if table.spread is None or share == 1:
        return []
    known = np.isfinite(table.cost) & (table.cost > 0)
    error = float(np.median(table.spread[known] / table.cost[known])) if known.any() else 0.0
    return [
        f"rounding errors are estimated from {100 * share:.0f} % of the rows, to {100 * error:.1f} "
        "% in the middle (--thorough rounds all)"
    ]


def _repaired(said: Mapping[str, Any]) -> list[str]:
    count = said.get("repaired")
    return (
        [f"{count:,} costs that rose with the width were averaged with their neighbours"]
        if count
        else []
    )


def _rewritten(said: Mapping[str, Any]) -> list[str]:
    blocks, rewritten = said.get("row_blocks"), said.get("rewritten", {})
    ways = [
        f"each matrix cut into {blocks} runs of rows" if blocks else "",
        "neurons sorted by sensitivity" if rewritten.get("order") else "",
        f"residual stream rotated (seed {rewritten.get('rotation')})"
        if rewritten.get("rotation") is not None
        else "",
    ]
    return ["; ".join(filter(None, ways))] if any(ways) else []


def _check(said: Mapping[str, Any]) -> list[str]:
    check = said.get("check")
    if not check:
        return []
    names = {"spearman": "rank correlation", "slope": "slope", "scale": "measured over predicted"}
    numbers = [f"{name} {_short(check[key])}" for key, name in names.items()]
    regret = f"regret {_short(check['regret'])}"
    where = f"{check['plans']} held-out plans at {check['bits']:.4g} bpw"
    return [f"{where}: {', '.join([*numbers, regret])}"]


def _proxies(said: Mapping[str, Any]) -> list[str]:
    proxies = said.get("proxies")
    if not proxies:
        return []
    dropped = proxies.get("dropped", [])
    fitted = {name: value for name, value in proxies["exponents"].items() if name not in dropped}
    exponents = ", ".join(f"{name} {value:.3g}" for name, value in fitted.items())
    lines = [f"exponents fitted on halves of groups: {exponents or 'none'}"]
    if dropped:
        lines.append(f"the same for all units, so left out: {', '.join(dropped)}")
    return [*lines, *([str(proxies["note"])] if proxies.get("note") else [])]


def _readings(said: Mapping[str, Any]) -> list[str]:
    """Return lines on readings of groups that were not taken, and on gains that groups share."""
    readings = said.get("readings")
    if not readings:
        return []
    lines, left = [], readings["left"]
    if left:
        lines.append(
            f"{left:,} of {readings['taken'] + left:,} readings of groups were not taken "
            "(--measure-time, --calibrate)"
        )
    if readings.get("noise"):
        lines.append(
            f"{readings['noise']:,} of {readings['taken']:,} readings of groups are below the "
            f"noise of arithmetic and count as that: {said['kl_floor']:.2g} nats a token"
        )
    if readings.get("sharing"):
        error = readings.get("error")
        known = "" if error is None else f", known to a factor of {math.exp(error):.2f}"
        lines.append(
            f"{readings['sharing']:,} groups have the gain that their projection has in all layers "
            f"together{known}"
        )
    return lines


def _samples(said: Mapping[str, Any]) -> list[str]:
    if "samples" not in said:
        return []
    lines = [f"rules from {said.get('measurements', 0):,} measured cells"]
    scores = said["samples"].get("spearman")
    if scores:
        lines.append(f"rank correlation on held-out cells while measuring: {scores[-1]:.3f}")
    return [*lines, *([str(said["note"])] if said.get("note") else [])]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
