"""Matches the detections and objects of a whole data set as COCO does, greedily.

Statistics over images, such as resampling, need to know which detection found which object, but
the evaluation engine does not return its matches. This module computes them from the engine's IoUs
in arrays: it matches the k-th best detections of all images and classes at once.

Shape alphabet: D detections, G objects (ground truth), A area ranges, T IoU thresholds; B groups
(one image and one class), d and g the largest numbers of detections and objects in a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAX_ELEMENTS = 1 << 22
"""Largest number of elements of a (B, A, T, g) array; limits how many groups are in one."""

SAME_OBJECT_IOU = 0.5
"""Lowest IoU at which two masks count as the same object by default."""

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Detections and objects of one class in one image.

    Attributes:
        ious: (d, g) IoUs, with detections by falling score.
        crowd: (g,) whether an object is a crowd, which matches any number of detections and does
            not count.
        ignored: (A, g) whether an object does not count in an area range; true for crowds.
        outside: (A, d) whether a detection is ignored if it matches nothing, for example because
            its area is outside the range.
    """

    ious: FloatArray
    crowd: BoolArray
    ignored: BoolArray
    outside: BoolArray


@dataclass(frozen=True)
class Matches:
    """The matches that an AP is computed from; ``matches_<task>.npz`` contains these arrays.

    Detections are ordered by image, then class, then falling score, up to the evaluator's limit per
    image and class. A stable sort of a class's detections by score gives the engine's order,
    including ties. Detections with ``dt_ignored`` do not count; among the others, ``dt_matched``
    marks true positives. Recall is relative to the class's objects without ``gt_ignored``.

    Attributes:
        image_ids: (I,) ids in the annotation file, as text.
        class_names: (K,) names in the order of the class indices.
        area_names: (A,) "all", "small", "medium", "large".
        iou_thresholds: (T,) 0.5 to 0.95.
        dt_image: (D,) index into image_ids.
        dt_class: (D,) index into class_names.
        dt_score: (D,) score that ranks the detection.
        dt_matched: (A, T, D) whether the detection found an object.
        dt_ignored: (A, T, D) whether the detection does not count.
        gt_image: (G,) index into image_ids.
        gt_class: (G,) index into class_names.
        gt_ignored: (A, G) whether the object does not count.
    """

    image_ids: npt.NDArray[np.str_]
    class_names: npt.NDArray[np.str_]
    area_names: npt.NDArray[np.str_]
    iou_thresholds: FloatArray
    dt_image: npt.NDArray[np.int32]
    dt_class: npt.NDArray[np.int32]
    dt_score: FloatArray
    dt_matched: BoolArray
    dt_ignored: BoolArray
    gt_image: npt.NDArray[np.int32]
    gt_class: npt.NDArray[np.int32]
    gt_ignored: BoolArray

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Matches:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{f.name: arrays[f.name] for f in fields(cls)})


def match(groups: Sequence[Group], thresholds: FloatArray) -> tuple[IntArray, BoolArray]:
    """Matches the detections of each group to its objects as COCO does.

    A detection takes the free object with the highest IoU, if that reaches the threshold. Of equal
    IoUs, it takes the later object. Objects that count are preferred to those that do not.

    Args:
        groups: groups of different images or classes.
        thresholds: (T,) IoU thresholds.

    Returns:
        (A, T, D) index in the group of the object that each detection found, -1 for none; and
        ``dt_ignored`` (see Matches). Detections are in the order of the groups.
    """
    num_areas = groups[0].outside.shape[0] if groups else 1
    num_detections = [group.outside.shape[1] for group in groups]
    ends = np.cumsum(num_detections, dtype=int)
    shape = (num_areas, len(thresholds), int(ends[-1]) if len(ends) else 0)
    partner, ignored = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    for chunk in _chunks(groups, num_areas * len(thresholds)):
        chunk_partner, chunk_ignored = _match_together([groups[k] for k in chunk], thresholds)
        for row, k in enumerate(chunk):
            own = slice(ends[k] - num_detections[k], ends[k])
            partner[:, :, own] = chunk_partner[row, :, :, : num_detections[k]]
            ignored[:, :, own] = chunk_ignored[row, :, :, : num_detections[k]]
    if groups:
        outside = np.concatenate([group.outside for group in groups], axis=1)
        ignored |= (partner < 0) & outside[:, None]
    return partner, ignored


def _chunks(groups: Sequence[Group], size_of_pair: int) -> Iterator[list[int]]:
    """Yields indices of groups of similar size that have something to match."""
    todo = [k for k, group in enumerate(groups) if group.ious.size]
    todo.sort(key=lambda k: groups[k].ious.shape)
    chunk: list[int] = []
    most_objects = 0
    for k in todo:
        num_detections, num_objects = groups[k].ious.shape
        most_objects = max(most_objects, num_objects)
        is_full = (len(chunk) + 1) * most_objects * size_of_pair > MAX_ELEMENTS
        if chunk and (is_full or num_detections > 2 * groups[chunk[0]].ious.shape[0]):
            yield chunk
            chunk, most_objects = [], num_objects
        chunk.append(k)
    if chunk:
        yield chunk


def _match_together(groups: Sequence[Group], thresholds: FloatArray) -> tuple[IntArray, BoolArray]:
    """Returns the objects found, (B, A, T, d), and whether each is an ignored one."""
    num_detections, num_objects = np.max([group.ious.shape for group in groups], axis=0)
    num_areas = len(groups[0].ignored)
    ious = np.full((len(groups), num_detections, num_objects), -1.0)
    crowd = np.zeros((len(groups), 1, 1, num_objects), bool)
    objects_ignored = np.ones((len(groups), num_areas, 1, num_objects), bool)
    for row, group in enumerate(groups):
        d, g = group.ious.shape
        ious[row, :d, :g] = group.ious
        crowd[row, ..., :g] = group.crowd
        objects_ignored[row, :, 0, :g] = group.ignored
    # As in pycocotools, an IoU of 1 reaches every threshold despite rounding.
    least = np.minimum(thresholds, 1 - 1e-10)[:, None]
    shape = (len(groups), num_areas, len(thresholds), num_objects)
    free = np.ones(shape, bool)
    partner = np.full((*shape[:3], num_detections), -1, np.int32)
    ignored = np.zeros(partner.shape, bool)
    for k in range(num_detections):
        iou = ious[:, k, None, None, :]
        is_candidate = (free | crowd) & (iou >= least)
        value = np.where(is_candidate, iou + 2 * ~objects_ignored, -1)
        best = num_objects - 1 - value[..., ::-1].argmax(-1, keepdims=True)  # last one of a tie
        found = np.take_along_axis(is_candidate, best, -1)
        partner[..., k] = np.where(found, best, -1)[..., 0]
        ignored[..., k] = (found & np.take_along_axis(objects_ignored, best, -1))[..., 0]
        np.put_along_axis(free, best, np.take_along_axis(free, best, -1) & ~found, -1)
    return partner, ignored
