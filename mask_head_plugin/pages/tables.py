"""Tables for pages, in the form of Markdown, CSV and LaTeX. The templates produce the HTML."""

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
"""LaTeX code for characters that are commands in LaTeX and for signs that its fonts lack."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: name of the column in links such as ``report.html#sort=-difference``.
        label: heading of the column.
        meaning: a sentence that explains the column.
        is_text: whether the column contains text instead of numbers.
        is_optional: whether the column is omitted if all its cells are empty.
    """

    key: str
    label: str
    meaning: str
    is_text: bool = False
    is_optional: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell: the text to show, and the value to sort by (a number, nan if missing, or a text)."""

    text: str
    value: float | str


@dataclass(frozen=True)
class Table:
    """A table: its columns, and rows with one cell for each column."""

    columns: list[Column]
    rows: list[list[Cell]]


def number(value: float, form: str = ".2f") -> str:
    """Formats a number with a real minus sign; returns a dash for nan and infinity."""
    return f"{value:{form}}".replace("-", MINUS) if math.isfinite(value) else NOTHING


def markdown(table: Table) -> str:
    """Returns a table in GitHub's Markdown, with numbers aligned to the right."""
    cells: list[Sequence[Any]] = [[cell.text for cell in row] for row in table.rows]
    lines = [_markdown_row([column.label for column in table.columns])]
    lines.append("|" + "|".join("---" if c.is_text else "---:" for c in table.columns) + "|")
    return "\n".join([*lines, *map(_markdown_row, cells)])


def as_csv(table: Table) -> str:
    """Returns a table as CSV: keys as headings, numbers in full precision, empty cells for nan."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([column.key for column in table.columns])
    for row in table.rows:
        values = [cell.value for cell in row]
        writer.writerow(["" if isinstance(x, float) and math.isnan(x) else x for x in values])
    return written.getvalue()


def latex(table: Table) -> str:
    """Returns a table as LaTeX with the text shown on the page; needs the package booktabs."""
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
    """Escapes text for LaTeX and joins it into one line."""
    shown = "".join(LATEX_SIGNS.get(sign, sign) for sign in text)
    return " ".join(shown.split())


def _markdown_row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, texts)) + " |"


def escape_markdown(text: str) -> str:
    """Escapes text for Markdown and joins it into one line."""
    for sign, shown in {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.items():
        text = text.replace(sign, shown)
    # Underscores inside words need no escape, which keeps config keys readable.
    return " ".join(re.sub(r"[\\`*|\[\]~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text).split())


def code_markdown(text: str) -> str:
    """Formats text as inline code; replaces backticks, which would end the code, with quotes."""
    return f"`{text.replace('`', chr(39))}`"
