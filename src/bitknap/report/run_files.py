"""Writes a run's report: the page, a picture and a table of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitknap.allocation import BitPlan
from bitknap.disk.atomic import write_whole
from bitknap.report.comparison_rows import rows_csv, rows_of
from bitknap.report.figure_files import write_picture
from bitknap.report.pareto_picture import pareto_figure
from bitknap.report.plots import placed
from bitknap.report.run_page import report


def write_report(document: Mapping[str, Any], plans: Mapping[str, BitPlan], folder: Path) -> None:
    """Write report.html, rows.csv if there are rows, and pareto.png if any was measured.

    Each file is written whole or not at all and replaces an existing one; equal inputs give equal
    bytes.

    Args:
        document: content of compare.json.
        plans: plans to draw, by the name of their budget.
        folder: created if missing.
    """
    write_whole(folder / "report.html", report(document, plans).encode())
    if rows_of(document):
        write_whole(folder / "rows.csv", rows_csv(document).encode())
    if any(placed(row) for row in rows_of(document)):
        write_picture(pareto_figure(document), folder / "pareto.png")
