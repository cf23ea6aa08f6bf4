"""Classifies errors and repairs them, one kind at a time.

Follows TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV
2020). A false detection has the wrong class, a bad location or both, is a duplicate, or lies on
background. An object is missed if no detection finds it and no repair of a class or location error
would. The cost of a kind is the AP gained by repairing all errors of that kind.

Unlike tidecv, this module uses COCO's matching and AP, so its AP equals that of the evaluation.
(tidecv assigns AP 0 to a class that has detections but no objects, and chooses the first of several
equal IoUs.) Detections that are matched to a crowd do not count as errors.

Shape alphabet: N detections within the limit, G objects; n false detections and g objects of one
image.
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
    "class": "in the right place, but the wrong class",
    "location": "the right class, but not in the right place",
    "both": "the wrong class and not in the right place",
    "duplicate": "a second detection of an object",
    "background": "a place without an object",
    "missed": "an object that no detection finds, even if repaired",
}
CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
RIGHT, LEFT_OUT = -1, -2
BACKGROUND_IOU = 0.1
"""Highest IoU at which a detection counts as background (TIDE's t_b)."""


@dataclass(frozen=True, eq=False)
class Errors:
    """The errors of a task at one IoU threshold.

    Attributes:
        threshold: lowest IoU at which an object counts as found.
        kind: (N,) index of KINDS if the detection is an error; RIGHT if it found an object;
            LEFT_OUT if it does not count.
        about: (N,) scene index of the object that the detection found or is closest to; -1 if there
            is no such object.
        repaired: (N,) whether the detection is a class or location error that would find its object
            if repaired. If several such errors concern the same object, only the one with the
            highest score is marked; a repair removes the others.
        missed: (G,) whether the object would be missed even if all errors were repaired.
    """

    threshold: float
    kind: npt.NDArray[np.int8]
    about: IntArray
    repaired: BoolArray
    missed: BoolArray

    def count(self, kind: int) -> int:
        return int(self.missed.sum() if kind == MISSED else (self.kind == kind).sum())


def find_errors(scene: Scene, assignment: Assignment, threshold: float) -> Errors:
    """Classifies the errors of a task.

    Args:
        scene: all detections and objects.
        assignment: the task's assignment.
        threshold: one of the assignment's IoU thresholds.
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
    """Returns the kinds and the objects of the n false detections in an image.

    Args:
        iou: (n, g) IoUs with the image's objects, without crowds.
        same: (n, g) whether the classes are equal.
        threshold: lowest IoU at which an object counts as found.
    """
    count = len(iou)
    if not iou.shape[1]:
        return np.full(count, BACKGROUND, np.int8), np.zeros(count, np.int64)
    row = np.arange(count)
    of_class, of_others = iou * same, iou * ~same
    nearest, other, any_class = (x.argmax(1) for x in (of_class, of_others, iou))
    iou_class, iou_other = of_class[row, nearest], of_others[row, other]
    # The conditions are in the reverse of tidecv's order, because the last assignment wins.
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
    """Returns which detections would find an object if repaired, (N,); at most one per object."""
    can = np.flatnonzero(((kind == CLASS) | (kind == LOCATION)) & ~found[about])
    can = can[np.argsort(-score[can], kind="stable")]
    _, first = np.unique(about[can], return_index=True)
    repaired = np.zeros(len(kind), bool)
    repaired[can[first]] = True
    return repaired


def repaired_matches(scene: Scene, assignment: Assignment, errors: Errors, kind: int) -> Matches:
    """Returns the matches at the errors' threshold with one kind of error repaired.

    A repaired class or location error finds its object; at most one error is repaired per object.
    All other wrong detections of this kind are removed. Missed objects are ignored.

    Args:
        scene: all detections and objects.
        assignment: the task's assignment.
        errors: the task's errors.
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
    """Returns the matches at a threshold with all wrong detections removed."""
    at = assignment.at(threshold)
    return replace(at, dt_ignored=at.dt_ignored | ~at.dt_matched)


def without_misses(scene: Scene, assignment: Assignment, errors: Errors) -> Matches:
    """Returns the matches at the errors' threshold, ignoring objects that were not found."""
    at = assignment.at(errors.threshold)
    lost = np.ones(len(scene.gt_image), bool)
    lost[errors.about[errors.kind == RIGHT]] = False
    return replace(at, gt_ignored=at.gt_ignored | lost)
