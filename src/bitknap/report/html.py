"""The shell of HTML pages: style, tables, and plots that need no network, in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import Any

from bitknap.errors import InputError

# The scroll bar is always shown: plots are drawn before the page is long enough to need it.
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #fff; --line: #d0d7de;
  --lift: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #30363d; --lift: #161b22 }
}
* { box-sizing: border-box }
html { overflow-y: scroll }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.2; font-weight: 600; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; font-size: 1.2rem }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem }
details { margin: 1rem 0 }
summary { cursor: pointer; padding: .2rem 0 }
summary b { color: var(--ink) }
p, caption, small, summary { color: var(--soft) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left;
  vertical-align: baseline; overflow-wrap: anywhere }
.n { text-align: right; white-space: nowrap }
pre { border: 1px solid var(--line); padding: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
.plot, .wide { overflow-x: auto }
.wide td, .wide th { overflow-wrap: normal }
.wide th { white-space: nowrap }
"""
# Plots take the page's background and text colours, and change with them.
_SCRIPT = """
function paint() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim();
  const line = style.getPropertyValue("--line").trim();
  for (const plot of document.querySelectorAll(".plotly-graph-div")) {
    const change = {"font.color": ink, "title.font.color": ink, "legend.font.color": ink};
    for (const key of Object.keys(plot.layout || {})) {
      if (/^[xy]axis/.test(key)) {
        change[key + ".gridcolor"] = line;
        change[key + ".zerolinecolor"] = line;
        change[key + ".linecolor"] = line;
      }
    }
    Plotly.relayout(plot, change);
  }
}
addEventListener("load", paint);
// What is drawn inside something closed has no width yet.
addEventListener("toggle", event => {
  if (!event.target.open) return;
  event.target.querySelectorAll(".plotly-graph-div").forEach(plot => Plotly.Plots.resize(plot));
}, true);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
"""


def shell(title: str, body: Iterable[str], *, style: str = "", script: str = "") -> str:
    """Return a whole page that loads nothing from elsewhere; equal inputs give equal bytes.

    Args:
        title: plain text, for the window title and the first heading.
        body: HTML, part by part; empty parts are left out.
        style: CSS in addition to that of every page.
        script: JavaScript in addition to that for plots.

    Raises:
        InputError: there are plots, and plotly is not installed.
    """
    inside = "\n".join(part for part in body if part)
    plots = '<div class="plot">' in inside
    library = f"<script>{_library()}</script>" if plots else ""
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="Bitknap">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
{library}
</head>
<body>
<h1>{escape(title)}</h1>
{inside}
<script>{_SCRIPT if plots else ""}{script}</script>
</body>
</html>
"""
    # A file name on the page may contain bytes that are not valid text.
    return page.encode(errors="backslashreplace").decode()


def section(heading: str, note: str, *content: str) -> str:
    """Return a heading, a plain-text explanation if any, and HTML below them."""
    below = "\n".join(part for part in content if part)
    explained = f"<p>{escape(note)}</p>\n" if note else ""
    return f"<h2>{escape(heading)}</h2>\n{explained}{below}"


def drawn(figure: Any, name: str, height: int | None = None) -> str:
    """Return a plotly figure as HTML with the page's background.

    Args:
        figure: changed in place.
        name: must be unique on the page, since the figure's id is made from it.
        height: pixels; plotly's default if None.
    """
    figure.update_layout(
        title=None,
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"t": 30},
        font={"family": "system-ui, sans-serif"},
        height=height,
    )
    # Parameter names may be long.
    figure.update_yaxes(automargin=True)
    html = figure.to_html(
        include_plotlyjs=False,
        full_html=False,
        div_id="plot-" + re.sub(r"\W+", "-", name.lower()).strip("-"),
        # Buttons would cover legends; dragging zooms, a double click resets the view.
        config={"displayModeBar": False, "responsive": True},
    )
    return f'<div class="plot">{html}</div>'


def folded(name: str, note: str, content: str, *, opened: bool) -> str:
    """Return HTML that can be folded away under a name and a note, both plain text."""
    state = " open" if opened else ""
    return (
        f"<details{state}><summary><b>{escape(name)}</b>, {escape(note)}</summary>\n"
        f"{content}</details>"
    )


def table(
    rows: Iterable[Sequence[str]],
    head: Sequence[str] | None = None,
    *,
    numbers: Collection[int] = (),
) -> str:
    """Return plain texts as a table.

    Args:
        rows: cells, row by row.
        head: names of the columns.
        numbers: columns that are aligned right.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        shown = (
            f"<{tag}{' class=n' if index in numbers else ''}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return "<tr>" + "".join(shown) + "</tr>"

    lines = [row(head, "th")] if head else []
    return "<table>\n" + "\n".join([*lines, *(row(cells, "td") for cells in rows)]) + "\n</table>"


def _library() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("the page needs plotly; pip install plotly, or leave out -o") from None
    return str(get_plotlyjs())
