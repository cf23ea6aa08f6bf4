"""Computes the AP with one branch of the model perfect and the others unchanged.

A better box branch cannot repair errors of the mask branch, and vice versa. Each oracle therefore
evaluates the detections again with the true masks (cut to the predicted boxes, because the mask
branch draws nothing outside them), the true boxes, or the true classes. A last oracle sends the
true objects through the mask branch's grid, to see what a finer grid could gain.

A detection that found an object (COCO's matching of boxes at IoU 0.5) is paired with that object.
Any other detection is paired with the object of its class whose box it overlaps most, if their IoU
is at least TIDE's background IoU. A detection without a partner stays unchanged. Only perfect
classes pair detections with objects of other classes; see ``perfect_classes``.

Shape alphabet: D detections, G objects, T IoU thresholds, M side of the mask branch's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from ..evaluation.mask_window import MaskWindow, mask_window
from ..evaluation.matching import FloatArray, Matches
from ..ops import crop_masks, encode_masks
from ..progress import progress
from .assignment import Assignment, assign
from .errors import BACKGROUND_IOU, CLASS, RIGHT, Errors
from .scene import IntArray, Scene, mask_areas

MEANINGS = {
    "perfect masks": "the true mask in each predicted box",
    "perfect boxes": "the true box for each detection, whose mask is then no longer cut off",
    "perfect classes": "the true class for each box, and no second box of the same object",
}
MOST_THROUGH_GRID = 5_000
"""Largest number of objects sent through the grid. If there are more objects, only every second,
third, ... object is used, which changes the AP by about 0.1."""
GRID = "grid only"
WINDOWS_TOGETHER = 64
"""Number of objects of similar size that are sent through the grid at once."""


def perfect_boxes(scene: Scene, objects: IntArray) -> Scene:
    """Returns the scene with each detection moved to its object's box; masks are unchanged.

    Args:
        scene: all detections and objects.
        objects: (D,) result of ``nearest_objects``.
    """
    return replace(
        scene, dt_box=np.where((objects >= 0)[:, None], scene.gt_box[objects], scene.dt_box)
    )


def ious_in_perfect_boxes(
    scene: Scene, objects: IntArray, cut: Sequence[Any], ious: Sequence[FloatArray]
) -> list[FloatArray]:
    """Returns the IoUs that masks would have with their objects if the boxes were the true ones.

    Repairs only what the predicted box made wrong: a mask gains the true pixels outside the
    predicted box, which the mask branch could not draw, and loses its own pixels outside the true
    box. All other pixels, and overlaps with other objects, are unchanged.

    Args:
        scene: all detections and objects, with masks.
        objects: (D,) result of ``nearest_objects``.
        cut: D true masks cut to the predicted boxes, from ``perfect_masks``.
        ious: mask IoUs of each image.
    """
    assert scene.dt_mask is not None and scene.gt_mask is not None
    repaired = [x.copy() for x in ious]
    dt_start, gt_start = (
        [x.start for x in slices] for slices in (scene.dt_slices, scene.gt_slices)
    )
    true_areas = mask_areas(scene.gt_mask).tolist()
    paired = np.flatnonzero(objects >= 0)
    own = cut_to_boxes([scene.dt_mask[k] for k in paired.tolist()], scene.gt_box[objects[paired]])
    triples = zip(paired.tolist(), objects[paired].tolist(), own, strict=True)
    for k, g, in_true_box in progress(triples, "perfect boxes", total=len(paired)):
        image = int(scene.dt_image[k])
        place = k - dt_start[image], g - gt_start[image]
        true_area, area = true_areas[g], float(coco_mask.area(scene.dt_mask[k]))
        lost = true_area - float(coco_mask.area(cut[k]))
        common = ious[image][place] * (area + true_area) / (1 + ious[image][place]) + lost
        kept = float(coco_mask.area(in_true_box)) + lost
        common = min(common, true_area, kept)
        repaired[image][place] = common / max(kept + true_area - common, 1)
    return repaired


def perfect_masks(scene: Scene, objects: IntArray) -> Scene:
    """Returns the scene with each detection's mask replaced by the true mask in its box."""
    assert scene.dt_mask is not None and scene.gt_mask is not None
    masks = list(scene.dt_mask)
    paired = np.flatnonzero(objects >= 0)
    true = [scene.gt_mask[g] for g in objects[paired].tolist()]
    cut = cut_to_boxes(true, scene.dt_box[paired])
    for k, rle in zip(
        paired.tolist(), progress(cut, "perfect masks", total=len(paired)), strict=True
    ):
        masks[k] = rle
    return replace(scene, dt_mask=masks)


def cut_to_boxes(rles: Sequence[Any], boxes: FloatArray) -> Iterator[Any]:
    """Yields the part of each mask inside its box: the pixels whose centres lie inside.

    Args:
        rles: n compressed RLEs.
        boxes: (n, 4) x, y, width, height.
    """
    width_height = np.array([x["size"][::-1] for x in rles]).reshape(-1, 2)
    low = np.round(boxes[:, :2]).clip(0, width_height)
    high = np.round(boxes[:, :2] + boxes[:, 2:]).clip(0, width_height)
    pixels = np.concatenate([low, np.maximum(high - low, 0)], axis=1)
    for k, rle in enumerate(rles):
        box = coco_mask.frPyObjects(pixels[k : k + 1], *rle["size"])
        yield coco_mask.merge([rle, *box], intersect=True)


def perfect_classes(scene: Scene, boxes: Assignment, errors: Errors) -> tuple[Scene, IntArray]:
    """Returns the scene with all class errors repaired, and the indices of its detections.

    A class error is a box in the right place (IoU 0.5) with the wrong class. A perfect classifier
    would give it the object's class, and the model's NMS within each class would then leave one of
    the boxes on an object. Kept is the detection that found the object or, if there is none, the
    class error with the highest score. It gets the highest score of all of them, because the model
    scores the classes of a proposal together. The other class errors are removed. So the AP50 of
    boxes gains at least as much as by TIDE's repair of class errors.

    Args:
        scene: all detections and objects.
        boxes: the assignment of the task "bbox".
        errors: its errors at IoU 0.5.

    Returns:
        The new scene, and for each of its detections the index in the old scene.
    """
    is_wrong = errors.kind == CLASS
    kept = errors.repaired & is_wrong
    about = errors.about
    classes = scene.dt_class.copy()
    classes[boxes.rows[kept]] = scene.gt_class[about[kept]]
    finds = kept | (errors.kind == RIGHT)
    scores = [x.copy() for x in (scene.dt_score, scene.dt_mask_score)]
    for score in scores:
        highest = np.zeros(len(scene.gt_image))
        np.maximum.at(highest, about[is_wrong], score[boxes.rows[is_wrong]])
        rows = boxes.rows[finds]
        score[rows] = np.maximum(score[rows], highest[about[finds]])
    is_left = np.ones(len(classes), bool)
    is_left[boxes.rows[is_wrong & ~kept]] = False
    order = np.lexsort((classes, scene.dt_image))
    order = order[is_left[order]]
    scored = replace(scene, dt_score=scores[0], dt_mask_score=scores[1])
    return scored.with_classes(classes, order), order


def nearest_objects(scene: Scene, boxes: Assignment) -> IntArray:
    """Returns the scene index of the object paired with each detection, (D,); -1 if unpaired.

    Args:
        scene: all detections and objects.
        boxes: the assignment of the task "bbox".
    """
    objects = np.full(len(scene.dt_image), -1, np.int64)
    pairs = zip(scene.dt_slices, scene.gt_slices, boxes.ious, strict=True)
    for dt, gt, ious in pairs:
        if not ious.size:
            continue
        same_class = scene.dt_class[dt, None] == scene.gt_class[gt]
        allowed = same_class & ~scene.gt_crowd[gt]
        iou = np.where(allowed, ious, 0)
        nearest = iou.argmax(1)
        near = iou[np.arange(len(iou)), nearest] >= BACKGROUND_IOU
        objects[dt] = np.where(near, gt.start + nearest, -1)
    found = np.where(boxes.at(0.5).dt_ignored[0, 0], -1, boxes.partner_at(0.5))
    objects[boxes.rows[found >= 0]] = found[found >= 0]
    return objects


def grid_matches(scene: Scene, assignment: Assignment, sides: Sequence[int]) -> Iterator[Matches]:
    """Yields the matches of the true objects after they were sent through M x M grids.

    Boxes, classes and ranking are perfect. Each object's mask is cropped like a training target of
    the mask branch and pasted like the branch's output. An object counts as found if the result
    still overlaps its mask enough.

    Args:
        scene: all objects, with masks.
        assignment: the assignment of masks, for the order of the objects.
        sides: M of each grid.
    """
    assert scene.gt_mask is not None
    base = assignment.matches
    counted = np.flatnonzero(~base.gt_ignored[0])
    counted = counted[:: max(-(-len(counted) // MOST_THROUGH_GRID), 1)]
    left_out = np.ones(len(scene.gt_image), bool)
    left_out[counted] = False
    masks = [scene.gt_mask[k] for k in counted.tolist()]
    for iou in grid_ious(masks, scene.gt_box[counted], sides):
        matched = iou >= np.minimum(base.iou_thresholds, 1 - 1e-10)[:, None]
        yield replace(
            base,
            area_names=base.area_names[:1],
            dt_image=base.gt_image[counted],
            dt_class=base.gt_class[counted],
            dt_score=iou,
            dt_matched=matched[None],
            dt_ignored=np.zeros((1, *matched.shape), bool),
            gt_ignored=left_out[None],
        )


def grid_ious(masks: Sequence[Any], boxes: FloatArray, sides: Sequence[int]) -> FloatArray:
    """Returns each mask's IoU with the result of each M x M grid, (number of sides, n).

    Args:
        masks: n compressed RLEs.
        boxes: (n, 4) x, y, width, height.
        sides: M of each grid.
    """
    windows = [mask_window(rle) for rle in progress(masks, "true masks")]
    largest = np.array([max(x.bits.shape) for x in windows])
    order = np.argsort(largest, kind="stable")
    ious = np.zeros((len(sides), len(masks)))
    chunks = range(0, len(order), WINDOWS_TOGETHER)
    for start in progress(chunks, "true masks through the grid"):
        chunk = order[start : start + WINDOWS_TOGETHER]
        ious[:, chunk] = _grid_ious([windows[k] for k in chunk.tolist()], boxes[chunk], sides)
    return ious


def _grid_ious(
    windows: Sequence[MaskWindow], boxes: FloatArray, sides: Sequence[int]
) -> list[list[float]]:
    height, width = (max(x.bits.shape[axis] for x in windows) + 2 for axis in (0, 1))
    bits = np.zeros((len(windows), height, width), np.uint8)
    for row, window in zip(bits, windows, strict=True):
        h, w = window.bits.shape
        row[1 : 1 + h, 1 : 1 + w] = window.bits
    corner = np.array([[x.left - 1, x.top - 1] for x in windows], float)
    low = boxes[:, :2] - corner
    xyxy = torch.from_numpy(np.concatenate([low, low + boxes[:, 2:]], 1)).float()
    true = coco_mask.encode(np.asfortranarray(bits.transpose(1, 2, 0)))
    ious = []
    for side in sides:
        targets = crop_masks(torch.from_numpy(bits), xyxy, side)
        pasted = encode_masks(targets.float(), xyxy, (height, width))
        pairs = zip(pasted, true, strict=True)
        ious.append([float(coco_mask.iou([a], [b], [0])[0, 0]) for a, b in pairs])
    return ious


def oracle_matches(
    scene: Scene,
    found: dict[str, Assignment],
    box_errors: Errors,
    max_detections: int,
    mask_side: int,
) -> Iterator[tuple[str, str, Matches]]:
    """Yields task, name and matches of each oracle.

    Args:
        scene: all detections and objects.
        found: the assignment of each task.
        box_errors: the errors of the task "bbox" at IoU 0.5.
        max_detections: how many detections count per image and class; negative for no limit.
        mask_side: M of the model.
    """

    def matches(perfect: Scene, task: str, ious: list[FloatArray] | None = None) -> Matches:
        return assign(perfect, task, max_detections, ious, areas=("all",)).matches

    objects = nearest_objects(scene, found["bbox"])
    yield "bbox", "perfect boxes", matches(perfect_boxes(scene, objects), "bbox")
    if "segm" in found:
        with_masks = perfect_masks(scene, objects)
        yield "segm", "perfect masks", matches(with_masks, "segm")
        assert with_masks.dt_mask is not None
        ious = ious_in_perfect_boxes(scene, objects, with_masks.dt_mask, found["segm"].ious)
        yield "segm", "perfect boxes", matches(scene, "segm", ious)
    reclassed, order = perfect_classes(scene, found["bbox"], box_errors)
    slices = list(zip(scene.dt_slices, reclassed.dt_slices, strict=True))
    for task, assignment in found.items():
        ious = [
            x[order[new] - old.start] for x, (old, new) in zip(assignment.ious, slices, strict=True)
        ]
        yield task, "perfect classes", matches(reclassed, task, ious)
    if "segm" in found:
        sides = (mask_side, 2 * mask_side)
        for side, of_side in zip(sides, grid_matches(scene, found["segm"], sides), strict=True):
            yield "segm", grid_name(side), of_side


def grid_name(side: int) -> str:
    return f"{side} x {side} {GRID}"
