"""Turns the numbers of an analysis into sentences that say what limits the AP.

Shape alphabet: K classes, P pairs of a detection and its object.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..messages import counted, listed
from ..pages.tables import number
from .curves import ClassGap
from .errors import KINDS, MISSED
from .mask_quality import BoxOffsets, MaskQuality, quality_rows
from .measures import Findings
from .oracles import grid_name

LEAST_WON = 0.5
"""Smallest gain of AP, in percent, for which a repair gets a sentence."""
LEAST_SHIFT = 1.0
"""Smallest median shift of the boxes, in pixels, that gets a sentence."""
LEAST_AREA = 0.05
"""Smallest relative error of the median mask area that gets a sentence."""
LEAST_WEAK = 0.05
"""How far a group's mean mask IoU must be below that of all pairs to get a sentence."""
LEAST_CONFUSED = 0.1
"""How large a share of a class's objects must be found as another class to get a sentence."""
LEAST_GAP = 0.1
"""How far the gap between a class's scores and precision must be from the median gap of all classes
to get a sentence."""
NEAR_LIMIT = 10
"""A finer grid is recommended only if AP is at most this far below what the present grid allows."""
LEAST_FINER = 3
"""A finer grid is recommended only if doubling its side allows at least this much more AP."""
FEW = 20
"""Smallest number of pairs, objects or detections on which a sentence may be based."""
TASK_NAMES = {"bbox": "boxes", "segm": "masks"}
BRANCHES = {
    "perfect masks": "mask branch",
    "perfect boxes": "box branch",
    "perfect classes": "classifier",
}
LOSSES = {
    "class": "wrong classes",
    "location": "inaccurate locations",
    "both": "wrong classes in inaccurate locations",
    "duplicate": "duplicates",
    "background": "detections without an object",
    "missed": "missed objects",
}
"""Words for KINDS after "lose most to"."""
WHAT_IT_IS = {"box branch": " (its regression and the proposals)"}
WEAK_OBJECTS = {
    "small": "small objects",
    "medium": "medium-sized objects",
    "large": "large objects",
    "one part": "objects in one part",
    "several parts": "objects in several parts",
    "holes": "objects with holes",
    "thin, below 0.4": "objects that fill less than 0.4 of their box",
    "0.4 to 0.7": "objects that fill 0.4 to 0.7 of their box",
    "full, from 0.7": "objects that fill at least 0.7 of their box",
}
"""Words for the groups of quality_rows, except classes."""


def diagnose(
    findings: Findings,
    mask_side: int,
    offsets: BoxOffsets,
    quality: MaskQuality | None,
    confusion: npt.NDArray[np.int64],
    gaps: list[ClassGap],
) -> list[str]:
    """Returns the sentences of the diagnosis.

    Args:
        findings: errors and numbers of the scene.
        mask_side: M, the side of the mask branch's output.
        offsets: offsets of the detected boxes.
        quality: quality of the masks; None without masks.
        confusion: result of curves.confusion.
        gaps: gap between scores and precision, for each class with detections.
    """
    return [
        *_summary(findings),
        *_errors(findings),
        *_branches(findings),
        *_grid(findings, mask_side),
        *_shift(offsets),
        *_area(quality),
        *_weak_masks(findings, quality),
        *_confused(findings, confusion),
        *_scores(gaps),
    ]


def _summary(findings: Findings) -> Iterator[str]:
    scene = findings.scene
    if not len(scene.dt_image):
        yield "Nothing was detected: AP is 0, and every object is missed."
        return
    told = [
        f"{number(findings.value(task, 'AP', 'AP'), '.1f')} for {TASK_NAMES[task]} "
        f"(AP50 {number(findings.value(task, 'AP', 'AP50'), '.1f')})"
        for task in scene.tasks
    ]
    yield f"AP is {' and '.join(told)}."
    if "segm" not in scene.tasks:
        yield "The run has no masks: everything below is about boxes."


def _errors(findings: Findings) -> Iterator[str]:
    """Yields a sentence about the most costly kinds of errors at IoU 0.5 for each task."""
    for task in findings.scene.tasks:
        won = {name: findings.value(task, "error", name, 0.5) for name in findings.kinds}
        ranked = sorted(won, key=lambda name: -np.nan_to_num(won[name]))
        worth = [name for name in ranked[:3] if won[name] >= LEAST_WON]
        if not worth or not len(findings.scene.dt_image):
            continue
        first, *others = worth
        count = findings.errors[task][0.5].count(KINDS.index(first))
        what = "object" if KINDS.index(first) == MISSED else "detection"
        then = [f"{LOSSES[name]} ({number(won[name], '.1f')})" for name in others]
        yield (
            f"{TASK_NAMES[task].capitalize()} at IoU 0.5 lose most to {LOSSES[first]}: "
            f"{number(won[first], '.1f')} AP50 ({counted(count, what)})"
            f"{', then to ' * bool(then)}{' and '.join(then)}."
        )


def _ranked_branches(findings: Findings) -> dict[str, float]:
    """Returns how much AP each perfect branch would add, largest first; empty if all add little."""
    task = findings.main_task
    won = {
        name: findings.value(task, "oracle", name)
        for name in findings.oracles(task)
        if name in BRANCHES
    }
    ranked = sorted(won, key=lambda name: -np.nan_to_num(won[name]))
    return {name: won[name] for name in ranked if won[ranked[0]] >= LEAST_WON}


def _branches(findings: Findings) -> Iterator[str]:
    """Yields a sentence about the branch whose improvement would gain most."""
    won = _ranked_branches(findings)
    if not won:
        return
    told = [f"{name} would add {number(gain, '.1f')}" for name, gain in won.items()]
    best = BRANCHES[next(iter(won))]
    yield (
        f"By branch, AP of {TASK_NAMES[findings.main_task]} (mean of IoU 0.5 to 0.95): "
        f"{', '.join(told)}. The {best}{WHAT_IT_IS.get(best, '')} has the most to gain."
    )


def _grid(findings: Findings, side: int) -> Iterator[str]:
    """Yields a sentence that says whether a finer mask grid would help.

    Only a model near the limit of its grid needs a finer one.
    """
    key = ("segm", "oracle", grid_name(side), 0.0)
    if key not in findings.measures:
        return
    base = findings.value("segm", "AP", "AP")
    own, double = (base + findings.value("segm", "oracle", grid_name(x)) for x in (side, 2 * side))
    if own < base:
        yield (
            f"A {side} x {side} grid allows an AP of at most {number(own, '.1f')}, but these masks "
            f"reach more, so they do not come from a mask branch of that size."
        )
        return
    allowed = f"The {side} x {side} grid would allow {number(own, '.1f')}"
    if own - base > NEAR_LIMIT:
        best = next(iter(_ranked_branches(findings)), "")
        first = f": improve the {BRANCHES[best]} first" if best else ""
        yield f"{allowed}, so the grid is not the limit yet{first}."
        return
    advice = (
        "this model is close to that limit, so a finer grid "
        "(MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION) is worth a try"
        if double - own >= LEAST_FINER
        else "a finer grid would gain little"
    )
    yield f"{allowed}, and a {2 * side} x {2 * side} grid {number(double, '.1f')}: {advice}."


def _shift(offsets: BoxOffsets) -> Iterator[str]:
    """Yields a sentence for each axis along which boxes have a median shift."""
    if len(offsets.edges) < FEW:
        return
    middle = np.median(offsets.edges, axis=0)
    for axis, low, high in (("right", 0, 2), ("down", 1, 3)):
        shift = (middle[low] + middle[high]) / 2
        if abs(shift) >= LEAST_SHIFT:
            side = axis if shift > 0 else {"right": "left", "down": "up"}[axis]
            yield (
                f"Boxes lie {abs(shift):.1f} px too far {side} (median of {len(offsets.edges):,} "
                "found objects): something shifts them all, such as an image offset or scale that "
                "differs between training and evaluation."
            )


def _area(quality: MaskQuality | None) -> Iterator[str]:
    if quality is None or len(quality.objects) < FEW:
        return
    ratio = float(np.median(quality.area_ratio))
    if abs(ratio - 1) >= LEAST_AREA:
        size = "small" if ratio < 1 else "large"
        yield (
            f"Masks are too {size}: their area is {100 * ratio:.1f}% of the true one (median of "
            f"{len(quality.objects):,} found objects)."
        )


def _weak_masks(findings: Findings, quality: MaskQuality | None) -> Iterator[str]:
    """Yields a sentence about the sizes, shapes and fills of objects with the worst masks."""
    if quality is None or not len(quality.objects):
        return
    usual, *rows = quality_rows(findings.scene, quality)
    weak = [
        f"{WEAK_OBJECTS[x.name]} (mean IoU {100 * x.iou:.1f}, {x.count:,} found)"
        for x in sorted(rows, key=lambda x: x.iou)
        if x.count >= FEW and x.group != "class" and usual.iou - x.iou >= LEAST_WEAK
    ]
    if weak:
        yield (
            f"Among groups of at least {FEW} found objects, masks are worst on "
            f"{' and '.join(weak[:2])}. The mean IoU of all found objects is "
            f"{100 * usual.iou:.1f}."
        )


def _confused(findings: Findings, confusion: npt.NDArray[np.int64]) -> Iterator[str]:
    """Yields a sentence about the pairs of classes that the model confuses most."""
    names = findings.scene.class_names
    objects = confusion[:-1].sum(1)
    shares = confusion[:-1, :-1] / np.maximum(objects, 1)[:, None]
    np.fill_diagonal(shares, 0)
    shares[objects < FEW] = 0
    told = []
    for k in np.argsort(-shares, axis=None, kind="stable")[:4]:
        true, found = np.unravel_index(k, shares.shape)
        if shares[true, found] >= LEAST_CONFUSED:
            told.append(
                f"{100 * shares[true, found]:.0f}% of the objects of class “{names[true]}” "
                f"are taken for “{names[found]}”"
            )
    if told:
        yield f"Classes are confused: {'; '.join(told)}."


def _scores(gaps: list[ClassGap]) -> Iterator[str]:
    """Yields a sentence about classes whose scores are too high or low compared with others."""
    known = [x for x in gaps if x.count >= FEW]
    if len(known) < 2:
        return
    told = []
    usual = float(np.median([x.gap for x in known]))
    for one in known:
        if abs(one.gap - usual) >= LEAST_GAP:
            word = "low" if one.gap > usual else "high"
            told.append(
                f"{one.name} (too {word}: {one.score:.2f} on average, but a share of "
                f"{one.precision:.2f} is right)"
            )
    if told:
        yield (
            f"Scores of some classes are not comparable with those of other classes: "
            f"{listed(told, 4)}. "
            "Do not use one threshold for all classes; use the thresholds by class."
        )
