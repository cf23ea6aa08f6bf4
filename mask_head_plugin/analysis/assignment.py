"""Matches the detections and objects of a scene as COCO does.

Shape alphabet: D detections and G objects; N detections within the limit per image and class; A
area ranges, T IoU thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..evaluation.matching import BoolArray, FloatArray, Matches, Pairs, match
from .scene import IntArray, Scene

AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""COCO's area ranges in pixels; both ends are included."""
THRESHOLDS: FloatArray = np.linspace(0.5, 0.95, 10)


@dataclass(frozen=True, eq=False)
class Assignment:
    """The matches of a scene for one task.

    Attributes:
        matches: matches by COCO's rules. Detections are ordered by image, class and descending
            score.
        rows: (N,) scene index of each detection in ``matches``.
        partner: (A, T, N) scene index of the object that each detection found; -1 if it found none.
        ious: for each image, the (d, g) IoUs of all its detections and objects.
    """

    matches: Matches
    rows: IntArray
    partner: IntArray
    ious: list[FloatArray]

    def at(self, threshold: float) -> Matches:
        """Returns the matches at one IoU threshold for objects of all sizes."""
        t = int(np.abs(self.matches.iou_thresholds - threshold).argmin())
        return replace(
            self.matches,
            area_names=self.matches.area_names[:1],
            iou_thresholds=self.matches.iou_thresholds[t : t + 1],
            dt_matched=self.matches.dt_matched[:1, t : t + 1],
            dt_ignored=self.matches.dt_ignored[:1, t : t + 1],
            gt_ignored=self.matches.gt_ignored[:1],
        )

    def partner_at(self, threshold: float) -> IntArray:
        """Returns the row of ``partner`` for objects of all sizes at one IoU threshold, (N,)."""
        return self.partner[0, int(np.abs(self.matches.iou_thresholds - threshold).argmin())]


def assign(
    scene: Scene,
    task: str,
    max_detections: int,
    ious: list[FloatArray] | None = None,
    areas: Sequence[str] = tuple(AREAS),
) -> Assignment:
    """Matches detections and objects as COCO does.

    Args:
        scene: all detections and objects.
        task: "bbox" or "segm".
        max_detections: how many detections count per image and class; negative for no limit.
        ious: the result of ``scene.ious(task)``, if already computed.
        areas: names from AREAS, "all" first.
    """
    ious = scene.ious(task) if ious is None else ious
    ranges = np.array([AREAS[name] for name in areas])
    area = scene.dt_area(task) if len(areas) > 1 else np.zeros(len(scene.dt_image))
    dt_outside = _outside(area, ranges)
    if scene.lenient:
        keys = zip(scene.dt_image.tolist(), scene.dt_class.tolist(), strict=True)
        dt_outside = dt_outside | np.array([key in scene.lenient for key in keys])
    gt_ignored = scene.gt_crowd | _outside(scene.gt_area, ranges)
    score = scene.score(task)
    row = _counted(scene, score, max_detections)
    num_detections, num_objects = _sizes(scene, row)
    pairs = Pairs(
        num_detections,
        num_objects,
        np.concatenate([np.zeros(0), *(x.ravel() for x in ious)]),
        _first_iou(scene, row, ious),
        scene.gt_crowd,
        gt_ignored,
        dt_outside[:, row],
    )
    partner, ignored = match(pairs, THRESHOLDS)
    matches = Matches(
        image_ids=np.array([str(x) for x in scene.image_ids], dtype=str),
        class_names=np.array(scene.class_names, dtype=str),
        area_names=np.array(areas),
        iou_thresholds=THRESHOLDS,
        dt_image=scene.dt_image[row].astype(np.int32),
        dt_class=scene.dt_class[row].astype(np.int32),
        dt_score=score[row],
        dt_matched=partner >= 0,
        dt_ignored=ignored,
        gt_image=scene.gt_image.astype(np.int32),
        gt_class=scene.gt_class.astype(np.int32),
        gt_ignored=gt_ignored,
    )
    return Assignment(matches, row, partner.astype(np.int64), ious)


def _counted(scene: Scene, score: FloatArray, max_detections: int) -> IntArray:
    """Returns the N detections within the limit, by image, class and descending score."""
    # The sort is stable, so equal scores keep their order.
    order = np.lexsort((-score, scene.dt_class, scene.dt_image))
    if max_detections < 0:
        return order
    keys = scene.dt_image[order] * len(scene.class_names) + scene.dt_class[order]
    return order[np.arange(len(order)) - np.searchsorted(keys, keys) < max_detections]


def _keys(scene: Scene, row: IntArray) -> tuple[IntArray, IntArray]:
    """Numbers the image and class of each counted detection, (N,), and of each object, (G,)."""
    num_classes = len(scene.class_names)
    detections = scene.dt_image[row] * num_classes + scene.dt_class[row]
    return detections, scene.gt_image * num_classes + scene.gt_class


def _sizes(scene: Scene, row: IntArray) -> list[IntArray]:
    """Returns how many detections and objects each pair of image and class has, two (P,) arrays."""
    keys = _keys(scene, row)
    in_use = np.union1d(*keys)
    return [np.searchsorted(x, in_use, "right") - np.searchsorted(x, in_use) for x in keys]


def _first_iou(scene: Scene, row: IntArray, ious: list[FloatArray]) -> IntArray:
    """Returns where each counted detection's IoUs start in the flattened IoUs, (N,)."""
    image = scene.dt_image[row]
    sizes = np.array([x.shape for x in ious]).reshape(-1, 2)
    start = np.cumsum(sizes.prod(1)) - sizes.prod(1)
    dt_start, gt_start = (
        np.array([x.start for x in slices]) for slices in (scene.dt_slices, scene.gt_slices)
    )
    detections, objects = _keys(scene, row)
    first_object = np.searchsorted(objects, detections) - gt_start[image]
    return start[image] + (row - dt_start[image]) * sizes[image, 1] + first_object


def _outside(areas: FloatArray, ranges: FloatArray) -> BoolArray:
    """Returns whether each area lies outside each range, (A, n)."""
    return (areas < ranges[:, :1]) | (areas > ranges[:, 1:])
