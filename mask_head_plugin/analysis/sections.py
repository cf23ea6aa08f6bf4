"""Makes the tables of an analysis, with explanations, for both analysis.md and analysis.html."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..evaluation.coco_ap import METRICS
from ..pages.tables import Cell, Column, Table, number
from .analysis import Analysis
from .diagnosis import TASK_NAMES
from .errors import KINDS, MEANINGS
from .measures import ERROR_THRESHOLDS, SPECIAL_KINDS
from .oracles import GRID
from .oracles import MEANINGS as ORACLE_MEANINGS

ERROR_TEXT = (
    "The AP that would be gained if one kind of error were repaired. Only one kind is repaired at "
    "a time, so the gains do not add up (TIDE, Bolya et al. 2020). Even many errors may cost "
    "little, because most of them have low scores. A detection with a rough mask may count as "
    "right at IoU 0.5, but as a location error at 0.75."
)
ORACLE_TEXT = (
    "The AP if one branch were perfect and the others unchanged: an estimate of the most that "
    "improving this branch can gain. Perfect classes leave one detection on each object, as NMS "
    "within each class would. Perfect masks are the true masks in full resolution; they do not "
    "pass through the mask branch's grid, so their AP may exceed what the grid allows. “Grid only” "
    "takes the true objects, with perfect boxes, classes and scores, and crops and pastes their "
    "masks at the stated resolution. It is a limit, not a gain."
)
QUALITY_TEXT = (
    "Covers objects whose box was found (IoU 0.5, right class), regardless of their mask. Boundary "
    "IoU measures only the outline. Area is the median of predicted divided by true area. Fill is "
    "the share of its box that an object covers. If more than 10,000 objects were found, only "
    "every second, third, … object is measured."
)
THRESHOLD_TEXT = (
    "The best threshold of a class is the score above which its detections reach the best F1 at "
    "IoU 0.5. Expect a lower F1 on other images, because the thresholds were chosen on these "
    "images."
)
SPECIAL_MEANINGS = dict(
    zip(SPECIAL_KINDS, ("all wrong detections", "all objects that were not found"), strict=True)
)


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: anchor of the section in links.
        title: heading.
        text: explains the numbers.
        table: the numbers.
    """

    key: str
    title: str
    text: str
    table: Table


def sections(analysis: Analysis) -> list[Section]:
    """Returns the sections whose table is not empty."""
    made = [
        Section("ap", "AP", "", _ap_table(analysis)),
        Section("errors", "What the errors cost", ERROR_TEXT, _error_table(analysis)),
        Section("branches", "What each branch can still gain", ORACLE_TEXT, _oracles(analysis)),
        Section("quality", "Mask quality of found objects", QUALITY_TEXT, _quality(analysis)),
        Section("classes", "Classes", THRESHOLD_TEXT, _class_table(analysis)),
        Section("density", "AP by number of objects in the image", "", _density_table(analysis)),
    ]
    return [x for x in made if x.table.rows]


def _ap_table(analysis: Analysis) -> Table:
    columns = [Column("task", "for", "", True), *(Column(x, x, "") for x in METRICS)]
    rows = [
        [
            _text(TASK_NAMES[task]),
            *(_value(analysis.findings.value(task, "AP", x)) for x in METRICS),
        ]
        for task in analysis.findings.scene.tasks
    ]
    return Table(columns, rows)


def _error_table(analysis: Analysis) -> Table:
    findings = analysis.findings
    columns = [Column("kind", "error", "", True), Column("meaning", "meaning", "", True)]
    for task in findings.scene.tasks:
        columns.append(Column(f"{task}-count", f"{TASK_NAMES[task]}: number", "At IoU 0.5."))
        columns += [
            Column(f"{task}-{t}", f"AP{100 * t:.0f} gain", f"For {TASK_NAMES[task]} at IoU {t:g}.")
            for t in ERROR_THRESHOLDS
        ]
    rows = []
    for name in (*findings.kinds, *SPECIAL_KINDS):
        row = [_text(name), _text({**MEANINGS, **SPECIAL_MEANINGS}[name])]
        for task in findings.scene.tasks:
            errors = findings.errors[task][ERROR_THRESHOLDS[0]]
            row.append(_count(errors.count(KINDS.index(name))) if name in KINDS else _text(""))
            row += [_won(findings.value(task, "error", name, t)) for t in ERROR_THRESHOLDS]
        rows.append(row)
    return Table(columns, rows)


def _oracles(analysis: Analysis) -> Table:
    findings = analysis.findings
    columns = [Column("oracle", "with", "", True), Column("meaning", "meaning", "", True)]
    for task in findings.scene.tasks:
        columns.append(Column(f"{task}-ap", f"AP of {TASK_NAMES[task]}", ""))
        columns.append(Column(f"{task}-won", "gain", ""))
    oracles = {task: findings.oracles(task) for task in findings.scene.tasks}
    rows = []
    for name in dict.fromkeys(itertools.chain(*oracles.values())):
        meaning = ORACLE_MEANINGS.get(name, "limited only by the mask branch's resolution")
        row = [_text(name), _text(meaning)]
        for task in findings.scene.tasks:
            won = findings.value(task, "oracle", name) if name in oracles[task] else math.nan
            gain = _text("") if name.endswith(GRID) else _won(won)
            row += [_value(findings.value(task, "AP", "AP") + won), gain]
        rows.append(row)
    return Table(columns, rows)


def _quality(analysis: Analysis) -> Table:
    columns = [
        Column("group", "by", "", True),
        Column("name", "objects", "", True),
        Column("count", "found", ""),
        Column("iou", "mask IoU", "Mean, in percent."),
        Column("boundary", "boundary IoU", "Mean, in percent."),
        Column("area", "area", "Predicted divided by true area: median, in percent."),
    ]
    rows = [
        [
            *(_text(x.group), _text(x.name), _count(x.count)),
            *(_value(100 * v) for v in (x.iou, x.boundary, x.area_ratio)),
        ]
        for x in analysis.quality_rows
        if x.group != "class"
    ]
    return Table(columns, rows)


def _class_table(analysis: Analysis) -> Table:
    """Returns a table with the AP, mask quality and best threshold of each class."""
    tasks = analysis.findings.scene.tasks
    by_name = {x.class_name: x for x in analysis.thresholds}
    quality = {x.name: x for x in analysis.quality_rows if x.group == "class"}
    if len(analysis.class_names) == 1:
        # With one class, the first row (all objects) is also the row of the class.
        quality = dict(zip(analysis.class_names, analysis.quality_rows, strict=False))
    aps = {task: analysis.class_ap(task) for task in tasks}
    columns = [
        Column("class", "class", "", True),
        *(Column(task, f"AP of {TASK_NAMES[task]}", "In percent.") for task in tasks),
        Column("iou", "mask IoU", "Mean of found objects, in percent."),
        Column("threshold", "best threshold", "Keep detections with a higher score."),
        Column("f1", "F1", "With this threshold, in percent."),
        Column("precision", "precision", "Share of these detections that are right."),
        Column("recall", "recall", "Share of objects that these detections find."),
        Column("half", "F1 at 0.5", "With a threshold of 0.5."),
    ]
    rows = []
    for k, name in enumerate(analysis.class_names):
        best = by_name.get(name)
        if best is None:
            continue
        iou = quality[name].iou if name in quality else math.nan
        shares = (best.f1, best.precision, best.recall, best.f1_at_half)
        row = [_text(name), *(_value(float(aps[task][k])) for task in tasks), _value(100 * iou)]
        row += [Cell(number(best.score, "g"), best.score), *(_value(100 * x) for x in shares)]
        rows.append(row)
    return Table(columns, rows)


def _density_table(analysis: Analysis) -> Table:
    columns = [
        Column("objects", "objects in the image", "", True),
        Column("images", "images", ""),
        Column("total", "objects", ""),
        Column("ap", "AP", ""),
    ]
    rows = [
        [_text(x.name), _count(x.images), _count(x.objects), _value(x.ap)]
        for x in analysis.densities
    ]
    return Table(columns, rows)


def facts(analysis: Analysis) -> list[tuple[str, str]]:
    """Returns the facts at the top of the page, as pairs of a name and a text."""
    scene, files = analysis.findings.scene, analysis.files
    limit = f"{files.max_detections:,} per image and class" if files.max_detections >= 0 else "all"
    pairs: Sequence[tuple[str, str]] = [
        ("data set", files.dataset),
        ("images", f"{len(scene.image_ids):,}"),
        ("objects", f"{int((~scene.gt_crowd).sum()):,}"),
        ("detections", f"{len(scene.dt_image):,}"),
        ("classes", f"{len(scene.class_names):,}"),
        ("detections that count", limit),
        ("mask branch", f"{files.mask_side} x {files.mask_side}"),
        ("results", str(files.results)),
        ("annotations", str(files.annotations)),
    ]
    return [pair for pair in pairs if pair[0] != "mask branch" or "segm" in scene.tasks]


def _text(text: str) -> Cell:
    return Cell(text, text)


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", float(value))


def _value(value: float) -> Cell:
    return Cell(number(value, ".1f"), value)


def _won(value: float) -> Cell:
    return Cell(number(value, "+.1f"), value)
