"""Measures the quality of the masks and boxes of found objects, and maps the errors of masks.

Objects and detections are paired by their boxes (IoU 0.5, the right class). Pairing by masks would
leave out bad masks, which this module is meant to measure.

Shape alphabet: P pairs; S side of the error map.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from ..evaluation.boundary import boundary_distance, boundary_iou, window_boundary
from ..evaluation.mask_window import MaskWindow, mask_window
from ..evaluation.matching import BoolArray, FloatArray
from ..progress import progress
from .assignment import AREAS, Assignment
from .scene import IntArray, Scene

PAIR_IOU = 0.5
MAP_SIDE = 36
"""S: cells along each side of the error map."""
MAP_MARGIN = 0.25
"""How far the map extends beyond each side of the box, as a share of its width or height."""
MOST_PAIRS = 10_000
"""Largest number of pairs whose masks are compared. If there are more pairs, only every second,
third, ... pair is used, which hardly changes the means."""
FILLS = {"thin, below 0.4": (0, 0.4), "0.4 to 0.7": (0.4, 0.7), "full, from 0.7": (0.7, 1.01)}
"""Ranges of fill, the share of the true box that the true mask covers."""
SHAPES = ("one part", "several parts", "holes")
SMALLEST_PART = 4
"""Smallest area of a part or hole in pixels; anything smaller is likely an annotation error."""


@dataclass(frozen=True, eq=False)
class BoxOffsets:
    """Positions of the detected boxes of found objects, relative to the true boxes.

    Attributes:
        objects: (P,) indices of the objects in the scene.
        rows: (P,) indices of their detections in the scene.
        iou: (P,) IoU of the two boxes.
        edges: (P, 4) offsets of the left, top, right and bottom edges from the true ones, in
            pixels; positive to the right and down.
    """

    objects: IntArray
    rows: IntArray
    iou: FloatArray
    edges: FloatArray


@dataclass(frozen=True, eq=False)
class MaskQuality:
    """Quality of the masks of found objects.

    Attributes:
        objects: (P,) indices of the objects in the scene.
        iou: (P,) mask IoU.
        boundary: (P,) boundary IoU.
        area_ratio: (P,) predicted area divided by true area.
        fill: (P,) share of the true box that the true mask covers.
        shape: (P,) index of SHAPES; an object with several parts and a hole counts as "holes".
        missing: (S, S) share of pairs whose predicted mask wrongly leaves out a cell of the error
            map, which shows the true box and a margin around it.
        extra: (S, S) share of pairs whose predicted mask wrongly covers a cell of the error map.
    """

    objects: IntArray
    iou: FloatArray
    boundary: FloatArray
    area_ratio: FloatArray
    fill: FloatArray
    shape: IntArray
    missing: FloatArray
    extra: FloatArray


@dataclass(frozen=True)
class QualityRow:
    """Mask quality of a group of pairs: mean IoUs and the median ratio of areas."""

    group: str
    name: str
    count: int
    iou: float
    boundary: float
    area_ratio: float


def box_offsets(scene: Scene, boxes: Assignment) -> BoxOffsets:
    """Measures how far the detected boxes of found objects are from the true boxes."""
    partner = np.where(boxes.at(PAIR_IOU).dt_ignored[0, 0], -1, boxes.partner_at(PAIR_IOU))
    paired = np.flatnonzero(partner >= 0)
    rows, objects = boxes.rows[paired], partner[paired].astype(np.int64)
    dt, gt = (
        np.concatenate([x[:, :2], x[:, :2] + x[:, 2:]], 1)
        for x in (scene.dt_box[rows], scene.gt_box[objects])
    )
    starts = [x.start for x in scene.dt_slices], [x.start for x in scene.gt_slices]
    images = scene.dt_image[rows]
    places = rows - np.array(starts[0])[images], objects - np.array(starts[1])[images]
    iou = [boxes.ious[i][d, g] for i, d, g in zip(images, *places, strict=True)]
    return BoxOffsets(objects, rows, np.array(iou, float), dt - gt)


def mask_quality(scene: Scene, offsets: BoxOffsets) -> MaskQuality:
    """Compares the masks of all pairs, or of a part of the pairs if there are too many.

    Args:
        scene: all detections and objects, with masks.
        offsets: the pairs, from ``box_offsets``.
    """
    assert scene.dt_mask is not None and scene.gt_mask is not None
    chosen = slice(None, None, max(-(-len(offsets.objects) // MOST_PAIRS), 1))
    rows, objects = offsets.rows[chosen], offsets.objects[chosen]
    count = len(objects)
    numbers = np.zeros((count, 4))
    shape = np.zeros(count, np.int64)
    maps = np.zeros((2, MAP_SIDE, MAP_SIDE))
    pairs = zip(rows.tolist(), objects.tolist(), strict=True)
    for k, (row, g) in enumerate(progress(pairs, "masks of found objects", total=count)):
        true, found = mask_window(scene.gt_mask[g]), mask_window(scene.dt_mask[row])
        if not true.bits.size:
            continue
        box = scene.gt_box[g]
        image_hw = scene.image_hw[scene.gt_image[g]].tolist()
        distance = boundary_distance(image_hw)
        edges = [window_boundary(x, distance) for x in (found, true)]
        numbers[k] = [
            _iou(found, true),
            boundary_iou(*edges),
            found.bits.sum() / true.bits.sum(),
            true.bits.sum() / max(box[2] * box[3], 1),
        ]
        shape[k] = _shape(true)
        maps += _error_maps(found, true, box)
    maps /= max(count, 1)
    iou, boundary, ratio, fill = numbers.T
    return MaskQuality(
        objects=objects,
        iou=iou,
        boundary=boundary,
        area_ratio=ratio,
        fill=fill.clip(0, 1),
        shape=shape,
        missing=maps[0],
        extra=maps[1],
    )


def _iou(a: MaskWindow, b: MaskWindow) -> float:
    common = int(cv2.countNonZero(a.within(b.top, b.left, b.bits.shape) & b.bits))
    return common / max(int(a.bits.sum()) + int(b.bits.sum()) - common, 1)


def _shape(true: MaskWindow) -> int:
    """Returns the mask's shape as an index of SHAPES."""
    contours, hierarchy = cv2.findContours(true.bits, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    inner = [x >= 0 for x in hierarchy[0, :, 3].tolist()]
    large = [cv2.contourArea(x) >= SMALLEST_PART for x in contours]
    if any(a and b for a, b in zip(inner, large, strict=True)):
        return SHAPES.index("holes")
    return int(sum(b and not a for a, b in zip(inner, large, strict=True)) > 1)


def _error_maps(found: MaskWindow, true: MaskWindow, box: FloatArray) -> npt.NDArray[np.float32]:
    """Returns the share of each cell that is missing and the share that is extra, (2, S, S)."""
    low = box[:2] - MAP_MARGIN * box[2:]
    size = np.maximum(box[2:] * (1 + 2 * MAP_MARGIN), 1e-3)
    left, top = np.floor(low).astype(int).tolist()
    right, bottom = np.ceil(low + size).astype(int).tolist()
    hw = max(bottom - top, 1), max(right - left, 1)
    bits = [x.within(top, left, hw) for x in (found, true)]
    errors = np.stack([bits[1] & ~bits[0], bits[0] & ~bits[1]], axis=-1).astype(np.float32)
    return np.moveaxis(_resampled(errors), -1, 0)


def _resampled(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    size = (MAP_SIDE, MAP_SIDE)
    is_larger = min(values.shape[:2]) > MAP_SIDE
    kind = cv2.INTER_AREA if is_larger else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(values, size, interpolation=kind), np.float32)


def quality_rows(scene: Scene, quality: MaskQuality) -> list[QualityRow]:
    """Returns the quality of all pairs, and of the pairs of each size, shape, fill and class."""
    return [_row(group, name, of, quality) for group, name, of in quality_groups(scene, quality)]


def quality_groups(scene: Scene, quality: MaskQuality) -> list[tuple[str, str, BoolArray]]:
    """Returns the groups of pairs: criterion, name, and the (P,) pairs that belong to the group."""
    area, classes = scene.gt_area[quality.objects], scene.gt_class[quality.objects]
    groups = [("all", "all", np.ones(len(area), bool))]
    # COCO's ranges overlap at their borders; here each object belongs to only one range.
    ranges = [(name, *AREAS[name]) for name in ("small", "medium", "large")]
    groups += [("size", name, (area >= low) & (area < high)) for name, low, high in ranges]
    groups += [("shape", name, quality.shape == k) for k, name in enumerate(SHAPES)]
    fills = FILLS.items()
    groups += [
        ("fill", x, (quality.fill >= low) & (quality.fill < high)) for x, (low, high) in fills
    ]
    if len(scene.class_names) > 1:
        groups += [("class", name, classes == k) for k, name in enumerate(scene.class_names)]
    return [x for x in groups if x[2].any()]


def _row(group: str, name: str, chosen: BoolArray, quality: MaskQuality) -> QualityRow:
    return QualityRow(
        group,
        name,
        count=int(chosen.sum()),
        iou=float(quality.iou[chosen].mean()),
        boundary=float(quality.boundary[chosen].mean()),
        area_ratio=float(np.median(quality.area_ratio[chosen])),
    )
