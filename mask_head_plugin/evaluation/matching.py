"""Matches the detections and objects of a data set greedily, by COCO's rules.

Statistics over images, such as bootstrap intervals, depend on which detection found which object,
but the evaluation engine does not return its matches. This module computes them from the engine's
IoUs. It works with arrays: it matches the best detections of all images and classes in one step,
then all second-best detections, and so on.

Shape alphabet: D detections, G objects (ground truth), A area ranges, T IoU thresholds; B pairs
(each of one image and one class), d and g the largest numbers of detections and objects in a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAX_ELEMENTS = 1 << 22
"""Largest number of elements of a (B, A, T, g) array. It limits the number of pairs B."""

SAME_OBJECT_IOU = 0.5
"""Lowest IoU at which two masks count as the same object, by default."""

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """The N detections and G objects of P pairs of an image and a class, one pair after another.

    The detections of a pair are ordered by falling score.

    Attributes:
        num_detections: (P,) number of detections in each pair.
        num_objects: (P,) number of objects in each pair.
        ious: all IoUs in one flat array.
        first_iou: (N,) index in ``ious`` of a detection's IoU with the first object of its pair.
            The IoUs with the pair's other objects follow it. Has no meaning if the pair has no
            objects.
        crowd: (G,) whether an object is a crowd. A crowd matches any number of detections and does
            not count.
        ignored: (A, G) whether an object does not count in an area range; true for crowds.
        outside: (A, N) whether a detection is ignored if it matches nothing, for example because
            its area is outside the range.
    """

    num_detections: npt.NDArray[np.int64]
    num_objects: npt.NDArray[np.int64]
    ious: FloatArray
    first_iou: npt.NDArray[np.int64]
    crowd: BoolArray
    ignored: BoolArray
    outside: BoolArray


@dataclass(frozen=True)
class Matches:
    """The matches that an AP is computed from. ``matches_<task>.npz`` contains these arrays.

    Detections are ordered by image, then class, then falling score, up to the evaluator's limit per
    image and class. If a class's detections are sorted by score with a stable sort, they have the
    engine's order, including ties. Detections with ``dt_ignored`` do not count; of all others,
    those with ``dt_matched`` are true positives. Recall is the share of found objects among the
    class's objects without ``gt_ignored``.

    Attributes:
        image_ids: (I,) ids in the annotation file, as text.
        class_names: (K,) names in the order of the class indices.
        area_names: (A,) "all", "small", "medium", "large".
        iou_thresholds: (T,) from 0.5 to 0.95.
        dt_image: (D,) index into image_ids.
        dt_class: (D,) index into class_names.
        dt_score: (D,) score by which the detection is ranked.
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


def match(pairs: Pairs, thresholds: FloatArray) -> tuple[IntArray, BoolArray]:
    """Matches the detections of each pair to its objects by COCO's rules.

    A detection takes the free object with the highest IoU if this IoU reaches the threshold. If
    several objects have the same IoU, it takes the last of them. Objects that count are preferred
    to objects that do not count.

    Args:
        pairs: the detections and objects.
        thresholds: (T,) IoU thresholds.

    Returns:
        The index from 0 to G - 1 of the object that each detection found, or -1 if it found none,
        (A, T, N); and ``dt_ignored``, see Matches.
    """
    num_areas, num_detections = pairs.outside.shape
    shape = (num_areas, len(thresholds), num_detections)
    partner, ignored = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    first_dt, first_gt = (np.cumsum(x) - x for x in (pairs.num_detections, pairs.num_objects))
    for chunk in _chunks(pairs, num_areas * len(thresholds)):
        dt, has_dt = _places(first_dt[chunk], pairs.num_detections[chunk])
        gt, has_gt = _places(first_gt[chunk], pairs.num_objects[chunk])
        ious = pairs.ious.take(pairs.first_iou[dt][..., None] + np.arange(gt.shape[1]), mode="clip")
        ious[~(has_dt[..., None] & has_gt[:, None])] = -1
        objects_ignored = pairs.ignored[:, gt] | ~has_gt
        found, found_ignored = _match_together(
            ious, pairs.crowd[gt] & has_gt, objects_ignored.swapaxes(0, 1), thresholds
        )
        of_found = np.take_along_axis(gt[:, None, None], np.maximum(found, 0), -1)
        own = dt[has_dt]
        partner[:, :, own] = np.where(found < 0, -1, of_found).transpose(1, 2, 0, 3)[..., has_dt]
        ignored[:, :, own] = found_ignored.transpose(1, 2, 0, 3)[..., has_dt]
    ignored |= (partner < 0) & pairs.outside[:, None]
    return partner, ignored


def _chunks(pairs: Pairs, size_of_pair: int) -> Iterator[list[int]]:
    """Yields the indices of pairs that have similar sizes and something to match."""
    todo = np.lexsort((pairs.num_objects, pairs.num_detections))
    todo = todo[(pairs.num_detections * pairs.num_objects)[todo] > 0]
    sizes = zip(pairs.num_detections[todo].tolist(), pairs.num_objects[todo].tolist(), strict=True)
    chunk: list[int] = []
    most_objects = fewest_detections = 0
    for k, (num_detections, num_objects) in zip(todo.tolist(), sizes, strict=True):
        most_objects = max(most_objects, num_objects)
        is_full = (len(chunk) + 1) * most_objects * size_of_pair > MAX_ELEMENTS
        if chunk and (is_full or num_detections > 2 * fewest_detections):
            yield chunk
            chunk, most_objects = [], num_objects
        if not chunk:
            fewest_detections = num_detections
        chunk.append(k)
    if chunk:
        yield chunk


def _places(
    first: npt.NDArray[np.int64], count: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], BoolArray]:
    """Returns a row with the numbers ``first`` to ``first + count - 1`` for each pair.

    Shorter rows are filled up with ``first``. Also returns which numbers are not filling.
    """
    offset = np.arange(count.max())
    is_real = offset < count[:, None]
    return first[:, None] + np.where(is_real, offset, 0), is_real


def _match_together(
    ious: FloatArray, crowd: BoolArray, objects_ignored: BoolArray, thresholds: FloatArray
) -> tuple[IntArray, BoolArray]:
    """Matches B pairs; see ``match``.

    Args:
        ious: (B, d, g) IoUs; -1 where a pair has fewer detections or objects.
        crowd: (B, g) whether each object is a crowd.
        objects_ignored: (B, A, g) whether each object does not count.
        thresholds: (T,) IoU thresholds.

    Returns:
        The index, within its pair, of the object that each detection found, or -1 if it found none;
        and whether this object is ignored. Both are (B, A, T, d).
    """
    num_pairs, num_detections, num_objects = ious.shape
    crowd, objects_ignored = crowd[:, None, None], objects_ignored[:, :, None]
    # As in pycocotools, an IoU of 1 reaches every threshold despite rounding.
    least = np.minimum(thresholds, 1 - 1e-10)[:, None]
    free = np.ones((num_pairs, objects_ignored.shape[1], len(thresholds), num_objects), bool)
    partner = np.full((*free.shape[:3], num_detections), -1, np.int32)
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
