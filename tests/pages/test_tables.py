"""Tables as CSV for programs and as LaTeX for papers."""

from __future__ import annotations

import csv
import io
import math

from mask_head_plugin.pages.tables import Cell, Column, Table, as_csv, latex

COLUMNS = [Column("variant", "variant", "", True), Column("AP", "AP, %", "")]
ROWS = [
    [Cell('a_b, "c" & {d}\\', 'a_b, "c" & {d}\\'), Cell("\N{MINUS SIGN}1.50 ± 0.2", -1.4999)],
    [Cell("▲ better", "▲ better"), Cell("\N{EN DASH}", math.nan)],
]


def test_csv_has_full_precision_and_empty_cells_for_nan():
    rows = list(csv.reader(io.StringIO(as_csv(Table(COLUMNS, ROWS)))))
    assert rows == [["variant", "AP"], ['a_b, "c" & {d}\\', "-1.4999"], ["▲ better", ""]]


def test_latex_shows_the_same_as_the_page_and_is_escaped():
    lines = latex(Table(COLUMNS, ROWS)).splitlines()
    assert lines[1:4] == ["\\begin{tabular}{lr}", "\\toprule", "variant & AP, \\% \\\\"]
    assert lines[5:7] == [
        'a\\_b, "c" \\& \\{d\\}\\textbackslash{} & $-$1.50 $\\pm$ 0.2 \\\\',
        "$\\uparrow$ better & -- \\\\",
    ]
    assert lines[-2:] == ["\\bottomrule", "\\end{tabular}"]
