"""Analyses scores: the best thresholds, confusions, and how reliable a score is.

Shape alphabet: K classes, N detections that count, n those of one class, B bins of scores, S draws
of I images.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..evaluation.bootstrap import resampled_ap
from ..evaluation.matching import FloatArray, Matches
from .assignment import Assignment
from .scene import IntArray, Scene

NUM_BINS = 10
DENSITIES = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 10**9))
"""Ranges of the number of objects in an image; both ends are included."""


@dataclass(frozen=True)
class Threshold:
    """The score threshold at which a class has its best F1, at IoU 0.5.

    Attributes:
        class_name: the class.
        score: the threshold, above which detections are kept; nan if no detection is right.
        f1: F1 of the kept detections, 0 to 1.
        precision: share of the kept detections that are right.
        recall: share of the objects that the kept detections find.
        f1_at_half: F1 at the usual threshold of 0.5.
    """

    class_name: str
    score: float
    f1: float
    precision: float
    recall: float
    f1_at_half: float


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often detections with a given score are right, at IoU 0.5.

    Attributes:
        score: (B,) mean score of each bin; nan for an empty bin.
        precision: (B,) share of right detections in each bin.
        count: (B,) number of detections in each bin.
        error: expected calibration error, 0 to 1: the mean difference between score and precision,
            weighted by count.
    """

    score: FloatArray
    precision: FloatArray
    count: IntArray
    error: float


@dataclass(frozen=True, eq=False)
class Density:
    """AP of the images whose number of objects lies in a range.

    Attributes:
        name: name of the range.
        chosen: (I,) whether each image belongs to the range.
        objects: number of objects in these images.
        ap: AP on these images, in percent.
    """

    name: str
    chosen: npt.NDArray[np.bool_]
    objects: int
    ap: float

    @property
    def images(self) -> int:
        return int(self.chosen.sum())


@dataclass(frozen=True)
class ClassGap:
    """How far the scores of a class are from its precision.

    Attributes:
        name: the class.
        score: mean score of its detections.
        precision: share of its detections that are right, at IoU 0.5.
        count: number of its detections.
    """

    name: str
    score: float
    precision: float
    count: int

    @property
    def gap(self) -> float:
        return self.precision - self.score


def best_thresholds(scene: Scene, assignment: Assignment) -> list[Threshold]:
    """Returns the best threshold of each class that has objects.

    Detections are ranked by the score of their class, even if masks are ranked by another score,
    because the demo and the runtime apply thresholds to the score of the class.
    """
    at = assignment.at(0.5)
    counted = ~at.dt_ignored[0, 0]
    score, right = scene.dt_score[assignment.rows], at.dt_matched[0, 0]
    thresholds = []
    for k, name in enumerate(scene.class_names):
        own = np.flatnonzero(counted & (at.dt_class == k))
        num_objects = int((~at.gt_ignored[0] & (at.gt_class == k)).sum())
        if num_objects:
            thresholds.append(_best_threshold(name, score[own], right[own], num_objects))
    return thresholds


def f1_curves(
    score: FloatArray,
    right: npt.NDArray[np.bool_],
    drawn: npt.NDArray[np.integer],
    num_objects: npt.NDArray[np.integer],
) -> FloatArray:
    """Returns a class's F1 when its best 1, 2, ..., n detections are kept, (S, n).

    The F1 is -1 where the next detection has the same score, because detections with equal scores
    are kept or dropped together.

    Args:
        score: (n,) scores in descending order.
        right: (n,) whether each detection found an object.
        drawn: (S, n) how often each draw contains the detection.
        num_objects: (S,) number of objects of the class in each draw.
    """
    hits, taken = (drawn * right).cumsum(1), drawn.cumsum(1)
    f1 = 2 * hits / np.maximum(taken + num_objects[:, None], 1)
    f1[:, :-1][:, score[:-1] == score[1:]] = -1
    return np.asarray(f1, float)


def _best_threshold(
    name: str, score: FloatArray, right: npt.NDArray[np.bool_], num_objects: int
) -> Threshold:
    order = np.argsort(-score, kind="stable")
    score, right = score[order], right[order]
    hits, taken = right.cumsum(), np.arange(1, len(score) + 1)
    once = np.ones((1, len(score)), np.int64)
    f1 = f1_curves(score, right, once, np.array([num_objects]))[0]
    at_half = int((score > 0.5).sum())
    f1_at_half = float(2 * hits[at_half - 1] / (at_half + num_objects)) if at_half else 0.0
    if not len(score) or not hits[-1]:
        return Threshold(name, float("nan"), 0.0, float("nan"), 0.0, f1_at_half)
    best = int(f1.argmax())
    lower = score[best + 1] if best + 1 < len(score) else max(score[best] - 0.01, 0.0)
    # The threshold lies between the last score kept and the first one dropped.
    cut = _short_number(float(lower), float(score[best]))
    return Threshold(
        name,
        cut,
        float(f1[best]),
        float(hits[best] / taken[best]),
        float(hits[best] / num_objects),
        f1_at_half,
    )


def _short_number(low: float, high: float) -> float:
    """Returns a number in [low, high) with as few digits as possible."""
    for digits in range(2, 8):
        middle = round((low + high) / 2, digits)
        if low <= middle < high:
            return middle
    return low


def threshold_flag(thresholds: list[Threshold]) -> str:
    """Returns the thresholds as a flag of tools/demo.py and tools/predict.py."""
    known = [x for x in thresholds if not math.isnan(x.score)]
    pairs = [shlex.quote(f"{x.class_name}={x.score!r}") for x in known]
    # A name such as "-x" would be taken for a flag unless it follows "=". Since "=" takes only one
    # value, each such name needs a separate flag.
    alone = [pair for pair in pairs if pair.lstrip("'").startswith("-")]
    plain = " ".join(pair for pair in pairs if pair not in alone)
    words = [f"--class-thresholds {plain}"] if plain else []
    return " ".join([*words, *(f"--class-thresholds={pair}" for pair in alone)])


def confusion(
    scene: Scene, assignment: Assignment, kept: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Counts how often objects of a class (rows) were found as each class (columns).

    Each detection, best first, takes the free object of any class that it overlaps most, if their
    IoU is at least 0.5. The last column counts objects that were not found, and the last row counts
    detections that found no object. Crowds and the detections in them are left out.

    Args:
        scene: all detections and objects.
        assignment: the task's assignment.
        kept: (D,) which detections to count.

    Returns:
        (K + 1, K + 1) counts.
    """
    num_classes = len(scene.class_names)
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    at = assignment.at(0.5)
    in_crowd = np.zeros(len(scene.dt_image), bool)
    in_crowd[assignment.rows[at.dt_ignored[0, 0]]] = True
    kept = kept & ~in_crowd
    for dt, gt, ious in zip(scene.dt_slices, scene.gt_slices, assignment.ious, strict=True):
        rows = np.arange(dt.start, dt.stop)[kept[dt]]
        rows = rows[np.argsort(-scene.dt_score[rows], kind="stable")]
        objects = np.arange(gt.start, gt.stop)[~scene.gt_crowd[gt]]
        iou = ious[rows - dt.start][:, objects - gt.start].copy()
        free_dt, free_gt = np.ones(len(rows), bool), np.ones(len(objects), bool)
        for d in range(len(rows) if len(objects) else 0):
            best = int(iou[d].argmax())
            if iou[d, best] >= 0.5:
                counts[scene.gt_class[objects[best]], scene.dt_class[rows[d]]] += 1
                free_dt[d], free_gt[best] = False, False
                iou[:, best] = 0
        counts[:-1, -1] += _count(scene.gt_class[objects[free_gt]], num_classes)
        counts[-1, :-1] += _count(scene.dt_class[rows[free_dt]], num_classes)
    return counts


def _count(classes: IntArray, num_classes: int) -> IntArray:
    return np.bincount(classes, minlength=num_classes)


def reliability(matches: Matches, score: FloatArray) -> Reliability:
    """Computes how often detections with a given score are right.

    Args:
        matches: the matches at one IoU threshold.
        score: (N,) scores, 0 to 1.
    """
    sums = bin_sums(matches, score).sum(1)
    count, total, right = sums
    with np.errstate(invalid="ignore"):
        mean, precision = total / count, right / count
    return Reliability(mean, precision, count.astype(np.int64), float(calibration_error(sums)))


def bin_sums(matches: Matches, score: FloatArray) -> FloatArray:
    """Sums up the detections of each image and bin of scores.

    Args:
        matches: the matches at one IoU threshold.
        score: (N,) scores, 0 to 1.

    Returns:
        (3, I, B) number of detections, sum of their scores, number of right detections.
    """
    counted = ~matches.dt_ignored[0, 0]
    score, right = score[counted], matches.dt_matched[0, 0, counted]
    place = (score * NUM_BINS).astype(int).clip(0, NUM_BINS - 1)
    shape = len(matches.image_ids), NUM_BINS
    place += NUM_BINS * matches.dt_image[counted]
    values = np.ones(len(score)), score, right
    sums = [np.bincount(place, x, shape[0] * shape[1]).reshape(shape) for x in values]
    return np.stack(sums)


def calibration_error(sums: FloatArray) -> FloatArray:
    """Returns the expected calibration error, 0 to 1, of shape (...).

    Args:
        sums: (3, ..., B) sums of detections, as in ``bin_sums``.
    """
    count, total, right = sums
    error = np.abs(total - right).sum(-1) / np.maximum(count.sum(-1), 1)
    return np.asarray(error, float)


def ap_by_density(matches: Matches) -> list[Density]:
    """Returns the AP of images grouped by their number of objects, without empty images.

    The list is empty if all these images belong to one group.
    """
    num_objects = np.bincount(
        matches.gt_image[~matches.gt_ignored[0]], minlength=len(matches.image_ids)
    )
    ranges = [(low, high) for low, high in DENSITIES if _between(num_objects, low, high).any()]
    if len(ranges) < 2:
        return []
    chosen = np.stack([_between(num_objects, low, high) for low, high in ranges])
    aps = resampled_ap(matches, chosen.astype(np.int32), ("AP",))["AP"]
    return [
        Density(_range_name(*r), x, int(num_objects[x].sum()), float(ap))
        for r, x, ap in zip(ranges, chosen, aps, strict=True)
    ]


def _between(values: IntArray, low: int, high: int) -> npt.NDArray[np.bool_]:
    return (values >= low) & (values <= high)


def _range_name(low: int, high: int) -> str:
    if high == DENSITIES[-1][1]:
        return f"{low} and more"
    return f"{low} to {high}" if high > low else str(low)


def class_gaps(scene: Scene, assignment: Assignment) -> list[ClassGap]:
    """Returns the mean score and the precision at IoU 0.5 of each class with detections."""
    at = assignment.at(0.5)
    counted, score = ~at.dt_ignored[0, 0], scene.dt_score[assignment.rows]
    gaps = []
    for k, name in enumerate(scene.class_names):
        own = counted & (at.dt_class == k)
        if own.any():
            right = float(at.dt_matched[0, 0, own].mean())
            gaps.append(ClassGap(name, float(score[own].mean()), right, int(own.sum())))
    return gaps
