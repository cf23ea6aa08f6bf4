"""Interactive figures of a comparison of two runs. Needs plotly (extra ``report``)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from plotly.subplots import make_subplots

from ..pages.differences import BETTER, NOISE, WORSE
from ..pages.figures import Figure, plotly_text
from ..pages.intervals import IntervalRow, add_intervals, lay_out_rows, row_heights
from .compare import Comparison, Difference
from .diagnosis import TASK_NAMES
from .resampled import BOUNDARY, BY_CLASS, F1, IOU, Key

SIZES = {
    "all objects": ("AP", "all"),
    "small": ("APs", "size: small"),
    "medium": ("APm", "size: medium"),
    "large": ("APl", "size: large"),
}
"""For each size of objects, the names under which its AP and its mask quality are stored."""
MOST_CLASSES = 40
ROW_HEIGHT = 30
CAPTION = (
    "This run minus the other one, in percent. Lines are 95% intervals over the choice of images; "
    "they do not cover the noise of training."
)

Panels = Mapping[str, Mapping[str, Difference]]
"""Maps the title of each panel to its rows, and the name of each row to its difference."""


def comparison_figures(comparison: Comparison) -> dict[str, list[Figure]]:
    """Returns the figures of each section, by the section's key."""
    found = {x.key: x for x in comparison.differences if math.isfinite(x.paired.difference)}
    sizes = _figure("compared-sizes", "Differences by size of the objects", _sizes(found))
    names = _by_change(found, comparison.other.findings.main_task)
    caption = ""
    if len(names) > MOST_CLASSES:
        caption = f" Shows the {MOST_CLASSES} of {len(names)} classes that differ most."
    panels = _classes(found, names[:MOST_CLASSES])
    classes = _figure("compared-by-class", "Differences by class", panels, caption)
    made = {"compared": sizes, "compared-classes": classes}
    return {key: [figure] for key, figure in made.items() if figure is not None}


def _sizes(found: Mapping[Key, Difference]) -> Panels:
    panels = {
        f"AP of {TASK_NAMES[task]}": {row: Key(task, "AP", ap) for row, (ap, _) in SIZES.items()}
        for task in TASK_NAMES
    }
    for group in (IOU, BOUNDARY):
        panels[group] = {row: Key("segm", group, name) for row, (_, name) in SIZES.items()}
    return _known(panels, found)


def _by_change(found: Mapping[Key, Difference], task: str) -> list[str]:
    """Returns the classes sorted by how much their AP changed, largest change first."""
    changes = {
        key.name: abs(x.paired.difference)
        for key, x in found.items()
        if key.task == task and key.group == BY_CLASS + "AP"
    }
    return sorted(changes, key=lambda name: -changes[name])


def _classes(found: Mapping[Key, Difference], names: list[str]) -> Panels:
    panels = {
        f"AP of {TASK_NAMES[task]}": {x: Key(task, BY_CLASS + "AP", x) for x in names}
        for task in TASK_NAMES
    }
    panels[IOU] = {x: Key("segm", BY_CLASS + IOU, x) for x in names}
    for task in reversed(TASK_NAMES):  # F1 is computed for masks if there are any
        if any(Key(task, BY_CLASS + F1, x) in found for x in names):
            panels[F1] = {x: Key(task, BY_CLASS + F1, x) for x in names}
            break
    return _known(panels, found)


def _known(panels: Mapping[str, Mapping[str, Key]], found: Mapping[Key, Difference]) -> Panels:
    known = {
        title: {name: found[key] for name, key in rows.items() if key in found}
        for title, rows in panels.items()
    }
    return {title: rows for title, rows in known.items() if rows}


def _figure(name: str, title: str, panels: Panels, more: str = "") -> Figure | None:
    rows = list(dict.fromkeys(row for of_panel in panels.values() for row in of_panel))
    if not rows:
        return None
    figure = make_subplots(
        rows=1,
        cols=len(panels),
        shared_yaxes=True,
        subplot_titles=[plotly_text(x) for x in panels],
        horizontal_spacing=0.02,
    )
    heights = row_heights(rows)
    for column, of_panel in enumerate(panels.values(), 1):
        shown = [IntervalRow(row, x.paired, x.finding) for row, x in of_panel.items()]
        add_intervals(figure, heights, shown, column, (BETTER, WORSE, NOISE))
    lay_out_rows(figure, heights, ROW_HEIGHT)
    return Figure(name, title, CAPTION + more, figure)
