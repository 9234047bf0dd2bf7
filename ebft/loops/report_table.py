"""Tables of the report, as HTML."""

from __future__ import annotations

import math
from html import escape

from ebft.loops.report_frame import number


def table(header: list[str], rows: list[list[str]], *, numbers: tuple[int, ...] = (), stack: bool = False) -> str:
    """A table of cells that are HTML already; the columns in `numbers` are set flush right.

    `stack`: on a phone every row is a block, its numbers with the words of the header.
    """

    def line(tag: str, cells: list[str]) -> str:
        words = [f' data-label="{name}"' if stack and tag == "td" else "" for name in header]
        marks = [f' class="number"{words[i]}' if i in numbers else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    body = "\n".join([line("th", header), *(line("td", row) for row in rows)])
    return f'<div class="scroll{" stack" if stack else ""}"><table>{body}</table></div>\n'


def bars(header: list[str], rows: list[tuple[str, float, list[str]]]) -> str:
    """A table with a bar per row, as long as its seconds are against the largest."""
    longest = max((s for _, s, _ in rows if math.isfinite(s)), default=0.0) or 1.0
    cells = []
    for label, seconds, more in rows:
        share = max(0.0, seconds / longest) if math.isfinite(seconds) else 0.0
        bar = f'<div class="bar" style="width:{100 * share:.1f}%"></div>'
        cells.append([escape(label.replace("_", " ")), bar, number(seconds, 3), *more])
    return table(header, cells, numbers=tuple(range(2, len(header))))
