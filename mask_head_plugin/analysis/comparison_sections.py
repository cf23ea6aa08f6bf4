"""Makes the tables of a comparison of two runs for both analysis.md and analysis.html."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..pages.differences import BETTER, MARKS, WORSE, with_interval
from ..pages.tables import NOTHING, Cell, Column, Table, number
from .compare import ONE_TRAINING, Comparison, Difference, finding_text
from .diagnosis import TASK_NAMES
from .oracles import GRID
from .resampled import BOUNDARY, BY_CLASS, CALIBRATION, DENSITY, F1, F1_AT_HALF, IOU
from .sections import Section

TEXT = (
    "Both runs are compared on the same images, resampled many times (paired bootstrap). For the "
    "cost of errors, possible gains and the calibration error, lower is better. "
    f"{ONE_TRAINING} If two models are equally good, chance makes about 5 in 100 numbers look "
    "better or worse. Numbers that do not differ or come from a single image are left out."
)
MASK_TEXT = (
    "Mean IoUs of the objects whose boxes were found. The two runs may have found different "
    "objects."
)
CLASS_TEXT = (
    "Differences with their intervals, the largest first. F1 uses the best threshold of each run, "
    "chosen separately for each resampled set of images."
)
NAMES = {
    F1: "F1 with the best thresholds, mean over classes",
    F1_AT_HALF: "F1 with a threshold of 0.5, mean over classes",
    CALIBRATION: "calibration error of scores",
}


def comparison_sections(comparison: Comparison) -> list[Section]:
    """Returns tables of the differences from the other run: overall, in masks, and by class."""
    shown = [x for x in comparison.differences if _differs(x)]
    classes = [x for x in shown if x.key.group.startswith(BY_CLASS)]
    of_all = [x for x in shown if not x.key.group.startswith(BY_CLASS)]
    masks = [x for x in of_all if x.key.group in (IOU, BOUNDARY)]
    others = [x for x in of_all if x.key.group not in (IOU, BOUNDARY)]
    made = [
        Section("compared", "Compared with the other run", TEXT, _table(others)),
        Section("compared-masks", "Mask quality, compared", MASK_TEXT, _table(masks)),
        Section("compared-classes", "Classes, compared", CLASS_TEXT, _classes(classes)),
    ]
    return [x for x in made if x.table.rows]


def _differs(difference: Difference) -> bool:
    """Returns whether a difference is worth showing.

    Leaves out differences without an interval: either nothing differs, or only one image counts.
    Also leaves out possible gains with a grid: the AP that a grid allows is the same for both runs,
    so the gains differ only because the runs' APs differ.
    """
    paired, key = difference.paired, difference.key
    is_known = not math.isnan(paired.difference) and paired.low != paired.high
    return is_known and not (key.group == "oracle" and key.name.endswith(GRID))


def _table(differences: Sequence[Difference]) -> Table:
    columns = [
        Column("figure", "metric", "", True),
        Column("task", "for", "", True),
        Column("other", "other run", ""),
        Column("value", "this run", ""),
        Column("difference", "difference", "With its 95% interval over images."),
        Column("finding", "finding", "Whether the interval excludes 0.", True),
    ]
    rows = []
    for x in differences:
        names = figure_name(x), TASK_NAMES[x.key.task]
        values = x.paired.baseline, x.paired.value
        rows.append(
            [
                *(Cell(name, name) for name in names),
                *(Cell(number(value, ".1f"), value) for value in values),
                Cell(with_interval(x.paired, 1), x.paired.difference),
                Cell(MARKS.get(x.finding, "") + finding_text(x), x.finding),
            ]
        )
    return Table(columns, rows)


def figure_name(difference: Difference) -> str:
    """Returns the name under which readers see a compared number."""
    _, group, name, threshold = difference.key
    if group == "error":
        return f"AP{100 * threshold:.0f} lost to “{name}”"
    if group == "oracle":
        return f"possible gain with {name}"
    if group == DENSITY:
        return f"AP of images with {name} object{'' if name == '1' else 's'}"
    if group in (IOU, BOUNDARY):
        return group if name == "all" else f"{group}, {name}"
    return NAMES.get(group, name)


def _classes(differences: Sequence[Difference]) -> Table:
    """Returns a table with a row for each class and a column for each metric."""
    heads = list(dict.fromkeys((x.key.task, x.key.group) for x in differences))
    found = {(x.key.name, x.key.task, x.key.group): x for x in differences}
    names = dict.fromkeys(
        x.key.name for x in sorted(differences, key=lambda x: -abs(x.paired.difference))
    )
    columns = [Column("class", "class", "", True)]
    for task, group in heads:
        label = group.removeprefix(BY_CLASS)
        label += f" of {TASK_NAMES[task]}" * (label == "AP")
        columns.append(Column(label.lower().replace(" ", "-"), label, "Difference."))
    rows = []
    for name in names:
        cells = [_difference(found.get((name, *head))) for head in heads]
        rows.append([Cell(name, name), *cells])
    return Table(columns, rows)


def _difference(difference: Difference | None) -> Cell:
    if difference is None:
        return Cell(NOTHING, math.nan)
    found = difference.finding
    mark = MARKS[found] if found in (BETTER, WORSE) else ""
    return Cell(mark + with_interval(difference.paired, 1), difference.paired.difference)
