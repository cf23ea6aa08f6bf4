"""Tables for pages, the same in Markdown, HTML, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
LATEX_SIGNS = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    MINUS: "$-$",
    NOTHING: "--",
    "±": r"$\pm$",
    "▲": r"$\uparrow$",
    "▼": r"$\downarrow$",
    "≈": r"$\approx$",
}
"""Characters that LaTeX reads as commands, and signs of ours that its fonts lack."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: its name in a link such as ``report.html#sort=-difference``.
        label: the heading above it.
        meaning: a sentence about it.
        is_text: whether it holds texts instead of numbers.
        is_optional: whether it is omitted if it has no content.
    """

    key: str
    label: str
    meaning: str
    is_text: bool = False
    is_optional: bool = False


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and its sorting value: a number, nan for none, or a text."""

    text: str
    value: float | str


@dataclass(frozen=True)
class Table:
    """Columns, and a row of cells for each variant."""

    columns: list[Column]
    rows: list[list[Cell]]


def number(value: float, form: str = ".2f") -> str:
    """Returns a number with a true minus sign; a dash for nan."""
    return f"{value:{form}}".replace("-", MINUS) if math.isfinite(value) else NOTHING


def markdown(table: Table) -> str:
    """Returns a table in GitHub's Markdown, with numbers on the right."""
    cells: list[Sequence[Any]] = [[cell.text for cell in row] for row in table.rows]
    lines = [_markdown_row([column.label for column in table.columns])]
    lines.append("|" + "|".join("---" if c.is_text else "---:" for c in table.columns) + "|")
    return "\n".join([*lines, *map(_markdown_row, cells)])


def as_csv(table: Table) -> str:
    """Returns a table for programs: keys as headings, numbers in full, empty cells for none."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([column.key for column in table.columns])
    for row in table.rows:
        values = [cell.value for cell in row]
        writer.writerow(["" if isinstance(x, float) and math.isnan(x) else x for x in values])
    return written.getvalue()


def latex(table: Table) -> str:
    """Returns a table for a paper, as the page shows it, with the rules of the package booktabs."""
    alignment = "".join("l" if column.is_text else "r" for column in table.columns)
    rows = [[escape_latex(cell.text) for cell in row] for row in table.rows]
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{{alignment}}}",
        "\\toprule",
        " & ".join(escape_latex(column.label) for column in table.columns) + " \\\\",
        "\\midrule",
        *(" & ".join(row) + " \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """Returns a text, escaped for LaTeX, in one line."""
    shown = "".join(LATEX_SIGNS.get(sign, sign) for sign in text)
    return " ".join(shown.split())


def _markdown_row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, texts)) + " |"


def escape_markdown(text: str) -> str:
    """Returns a text, escaped for Markdown, in one line."""
    for sign, shown in {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.items():
        text = text.replace(sign, shown)
    # An underscore within a word has no meaning; config keys stay readable.
    return " ".join(re.sub(r"[\\`*|\[\]~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text).split())


def code_markdown(text: str) -> str:
    """Returns a text as code; a backtick in it, which would end it, becomes a quote."""
    return f"`{text.replace('`', chr(39))}`"
