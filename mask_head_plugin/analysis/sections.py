"""The tables of an analysis with what is said of them, the same for Markdown and HTML."""

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
from .oracles import MEANINGS as ORACLE_MEANINGS

ERROR_TEXT = (
    "AP that would be won if one kind of error were repaired, each alone, so that they do not add "
    "up (TIDE, Bolya et al. 2020). At IoU 0.5 a rough mask counts as found; at 0.75 it is an error "
    "of location."
)
ORACLE_TEXT = (
    "AP with one branch of the model perfect and the others as they are: the most that more work "
    "on this branch can win. A grid only: the objects themselves, cut out and pasted at this "
    "resolution, with perfect boxes, classes and scores."
)
QUALITY_TEXT = (
    "Of objects whose box was found (IoU 0.5, right class), whatever the mask. Boundary IoU looks "
    "at the outline alone. Area: predicted by true area, the median. Fill: the share of its box "
    "that an object covers. Of more than 10,000 found objects, every second, third, … is looked at."
)
THRESHOLD_TEXT = (
    "The score above which detections of a class have the best F1 at IoU 0.5. On other images they "
    "will be less good than here."
)
SPECIAL_MEANINGS = dict(
    zip(SPECIAL_KINDS, ("all that is found wrongly", "all that is not found"), strict=True)
)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: its place in a link.
        title: what is written above it.
        text: what its numbers mean.
        table: may be without rows, where there are figures only.
    """

    key: str
    title: str
    text: str
    table: Table


def sections(analysis: Analysis) -> list[Section]:
    """Returns the parts that have something to show."""
    made = [
        Section("ap", "AP", "", _ap_table(analysis)),
        Section("errors", "What the errors cost", ERROR_TEXT, _error_table(analysis)),
        Section("branches", "What each branch can still win", ORACLE_TEXT, _oracles(analysis)),
        Section("quality", "Mask quality of found objects", QUALITY_TEXT, _quality(analysis)),
        Section("classes", "Classes", THRESHOLD_TEXT, _class_table(analysis)),
        Section("density", "AP by objects in the image", "", _density_table(analysis)),
    ]
    return [x for x in made if x.table.rows]


def _ap_table(analysis: Analysis) -> Table:
    columns = [Column("task", "of", "", True), *(Column(x, x, "") for x in METRICS)]
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
    columns = [Column("kind", "error", "", True), Column("meaning", "what it is", "", True)]
    for task in findings.scene.tasks:
        columns.append(Column(f"{task}-count", f"{TASK_NAMES[task]}: number", "At IoU 0.5."))
        columns += [
            Column(f"{task}-{t}", f"AP{100 * t:.0f} won", f"Of {TASK_NAMES[task]}, at IoU {t:g}.")
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
    columns = [Column("oracle", "with", "", True), Column("meaning", "what it is", "", True)]
    for task in findings.scene.tasks:
        columns.append(Column(f"{task}-ap", f"AP of {TASK_NAMES[task]}", ""))
        columns.append(Column(f"{task}-won", "won", ""))
    oracles = {task: findings.oracles(task) for task in findings.scene.tasks}
    rows = []
    for name in dict.fromkeys(itertools.chain(*oracles.values())):
        meaning = ORACLE_MEANINGS.get(name, "only the resolution of the mask branch limits")
        row = [_text(name), _text(meaning)]
        for task in findings.scene.tasks:
            won = findings.value(task, "oracle", name) if name in oracles[task] else math.nan
            row += [_value(findings.value(task, "AP", "AP") + won), _won(won)]
        rows.append(row)
    return Table(columns, rows)


def _quality(analysis: Analysis) -> Table:
    columns = [
        Column("group", "by", "", True),
        Column("name", "objects", "", True),
        Column("count", "found", ""),
        Column("iou", "mask IoU", "Mean, in percent."),
        Column("boundary", "boundary IoU", "Mean, in percent."),
        Column("area", "area", "Predicted by true area, median, in percent."),
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
    """Returns one row for each class: AP, mask quality, the best threshold."""
    tasks = analysis.findings.scene.tasks
    by_name = {x.class_name: x for x in analysis.thresholds}
    quality = {x.name: x for x in analysis.quality_rows if x.group == "class"}
    if len(analysis.class_names) == 1:
        quality = dict(zip(analysis.class_names, analysis.quality_rows, strict=False))  # of all
    aps = {task: analysis.class_ap(task) for task in tasks}
    columns = [
        Column("class", "class", "", True),
        *(Column(task, f"AP of {TASK_NAMES[task]}", "In percent.") for task in tasks),
        Column("iou", "mask IoU", "Mean of found objects, in percent."),
        Column("threshold", "best threshold", "Keep detections with a higher score."),
        Column("f1", "F1", "With this threshold, in percent."),
        Column("precision", "precision", "Share of these detections that is right."),
        Column("recall", "recall", "Share of the objects that these find."),
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
    """Returns names and texts of what a reader has to know of the run."""
    scene, files = analysis.findings.scene, analysis.files
    limit = f"{files.max_detections} per image and class" if files.max_detections >= 0 else "all"
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
