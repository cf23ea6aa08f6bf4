"""Finds the kind of each error, and the AP that is won if a kind is repaired.

After TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV
2020): a detection without an object is of the wrong class, badly located, both, a duplicate, or on
background; an object that no detection comes near is missed. Kinds are repaired one at a time, and
the AP won is the cost of that kind.

Differs from tidecv: matching and AP are COCO's, so the AP is the one of the evaluation (tidecv
counts a class that has detections and no objects as AP 0, and takes the first of equal IoUs); and
detections that a crowd absorbs do not count as errors.

Shape alphabet: N detections that count, G objects; n and g of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..evaluation.matching import BoolArray, FloatArray, Matches
from .assignment import Assignment
from .scene import IntArray, Scene, image_slices

KINDS = ("class", "location", "both", "duplicate", "background", "missed")
MEANINGS = {
    "class": "in the right place, under a wrong class",
    "location": "the right class, not in the right place",
    "both": "wrong class and not in the right place",
    "duplicate": "an object that a better detection has found",
    "background": "where no object is",
    "missed": "an object without any detection close to it",
}
CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
RIGHT, LEFT_OUT = -1, -2
BACKGROUND_IOU = 0.1
"""Up to this IoU, a detection is on background (TIDE's t_b)."""


@dataclass(frozen=True, eq=False)
class Errors:
    """The errors of a task at one IoU threshold.

    Attributes:
        threshold: IoU from which an object is found.
        kind: (N,) index of KINDS, RIGHT, or LEFT_OUT for detections that do not count.
        about: (N,) the object, by its index in the scene, that a detection found or is closest to;
            -1 for none.
        repaired: (N,) errors of class or location that would find their object if repaired. Of
            several about one object, it is the best-scored one; the others are removed.
        missed: (G,) objects that are missed even when all detections are repaired.
    """

    threshold: float
    kind: npt.NDArray[np.int8]
    about: IntArray
    repaired: BoolArray
    missed: BoolArray

    def count(self, kind: int) -> int:
        return int(self.missed.sum() if kind == MISSED else (self.kind == kind).sum())


def find_errors(scene: Scene, assignment: Assignment, threshold: float) -> Errors:
    """Returns the errors of a task.

    Args:
        scene: all detections and objects.
        assignment: of the task.
        threshold: one of its IoU thresholds.
    """
    at = assignment.at(threshold)
    partner = assignment.partner_at(threshold)
    kind = np.full(len(partner), RIGHT, np.int8)
    about = np.where(at.dt_ignored[0, 0], -1, partner).astype(np.int64)
    found = np.zeros(len(scene.gt_image), bool)
    found[about[about >= 0]] = True
    counted = image_slices(at.dt_image, len(scene.image_ids))
    dt_slices, gt_slices = scene.dt_slices, scene.gt_slices
    for image, own in enumerate(counted):
        is_wrong = (partner[own] < 0) & ~at.dt_ignored[0, 0, own]
        wrong = own.start + np.flatnonzero(is_wrong)
        if not len(wrong):
            continue
        gt = gt_slices[image]
        objects = np.arange(gt.start, gt.stop)[~scene.gt_crowd[gt]]
        rows = assignment.rows[wrong]
        iou = assignment.ious[image][rows - dt_slices[image].start][:, objects - gt.start]
        same = scene.dt_class[rows][:, None] == scene.gt_class[objects]
        of_image, nearest = _kinds(iou, same, threshold)
        kind[wrong] = of_image
        about[wrong] = objects[nearest] if len(objects) else -1
    kind[at.dt_ignored[0, 0]] = LEFT_OUT
    repaired = _repaired(at.dt_score, kind, about, found)
    found[about[repaired]] = True
    return Errors(threshold, kind, about, repaired, missed=~found & ~scene.gt_crowd)


def _kinds(
    iou: npt.NDArray[np.float64], same: BoolArray, threshold: float
) -> tuple[npt.NDArray[np.int8], IntArray]:
    """Returns the kind of each of an image's n false positives, and its object.

    Args:
        iou: (n, g) with the image's objects, without crowds.
        same: (n, g) whether the class is the same.
        threshold: IoU from which an object is found.
    """
    count = len(iou)
    if not iou.shape[1]:
        return np.full(count, BACKGROUND, np.int8), np.zeros(count, np.int64)
    row = np.arange(count)
    of_class, of_others = iou * same, iou * ~same
    nearest, other, any_class = (x.argmax(1) for x in (of_class, of_others, iou))
    iou_class, iou_other = of_class[row, nearest], of_others[row, other]
    # In tidecv's order, the last that is written holds.
    kinds, about = np.full(count, BOTH, np.int8), any_class.astype(np.int64)
    kinds[iou[row, any_class] <= BACKGROUND_IOU] = BACKGROUND
    for chosen, kind, objects in (
        (iou_class >= threshold, DUPLICATE, nearest),
        (iou_other >= threshold, CLASS, other),
        ((iou_class >= BACKGROUND_IOU) & (iou_class <= threshold), LOCATION, nearest),
    ):
        kinds[chosen], about[chosen] = kind, objects[chosen]
    return kinds, about


def _repaired(
    score: FloatArray, kind: npt.NDArray[np.int8], about: IntArray, found: BoolArray
) -> BoolArray:
    """Returns which of the N detections find an object if repaired, the best-scored one each."""
    can = np.flatnonzero(((kind == CLASS) | (kind == LOCATION)) & ~found[about])
    can = can[np.argsort(-score[can], kind="stable")]
    _, first = np.unique(about[can], return_index=True)
    repaired = np.zeros(len(kind), bool)
    repaired[can[first]] = True
    return repaired


def repaired_matches(scene: Scene, assignment: Assignment, errors: Errors, kind: int) -> Matches:
    """Returns the matches at the errors' threshold without one kind of errors.

    Errors of class and location find their object, once for each object; all other wrong detections
    of that kind are removed; missed objects are no longer required.

    Args:
        scene: all detections and objects.
        assignment: of the task.
        errors: of the same task.
        kind: index of KINDS.
    """
    at = assignment.at(errors.threshold)
    if kind == MISSED:
        return replace(at, gt_ignored=at.gt_ignored | errors.missed)
    chosen = errors.kind == kind
    right = chosen & errors.repaired
    classes = at.dt_class.copy()
    classes[right] = scene.gt_class[errors.about[right]]
    return replace(
        at,
        dt_class=classes,
        dt_matched=at.dt_matched | right,
        dt_ignored=at.dt_ignored | (chosen & ~right),
    )


def without_false_positives(assignment: Assignment, threshold: float) -> Matches:
    """Returns the matches at a threshold without wrong detections."""
    at = assignment.at(threshold)
    return replace(at, dt_ignored=at.dt_ignored | ~at.dt_matched)


def without_misses(scene: Scene, assignment: Assignment, errors: Errors) -> Matches:
    """Returns the matches at the errors' threshold without objects that were not found."""
    at = assignment.at(errors.threshold)
    lost = np.ones(len(scene.gt_image), bool)
    lost[errors.about[errors.kind == RIGHT]] = False
    return replace(at, gt_ignored=at.gt_ignored | lost)
