"""All detections and objects of a data set, and their overlaps.

Shape alphabet: I images, K classes; D detections and G objects of all images; d detections and g
objects of one image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from ..evaluation.matching import BoolArray, FloatArray
from ..progress import progress

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Scene:
    """Detections and objects, ordered by image and then by class.

    Attributes:
        image_ids: I ids from the annotation file, ascending.
        file_names: I names of image files.
        image_hw: (I, 2) height and width in pixels; 0 where the annotation file lacks them.
        class_names: K names.
        dt_image: (D,) index of the image.
        dt_class: (D,) index of the class.
        dt_score: (D,) score of the detection.
        dt_mask_score: (D,) score by which masks are ranked.
        dt_box: (D, 4) x, y, width, height in pixels.
        dt_mask: D compressed RLEs; None without masks.
        gt_image: (G,) index of the image.
        gt_class: (G,) index of the class.
        gt_crowd: (G,) whether the object is a crowd, a region of many objects.
        gt_area: (G,) area in pixels, which decides whether an object is small, medium or large.
        gt_box: (G, 4) x, y, width, height in pixels.
        gt_mask: G compressed RLEs; None without masks.
        lenient: pairs of indices of an image and a class that LVIS did not annotate exhaustively.
    """

    image_ids: Sequence[Any]
    file_names: Sequence[str]
    image_hw: IntArray
    class_names: Sequence[str]
    dt_image: IntArray
    dt_class: IntArray
    dt_score: FloatArray
    dt_mask_score: FloatArray
    dt_box: FloatArray
    dt_mask: Sequence[Any] | None
    gt_image: IntArray
    gt_class: IntArray
    gt_crowd: BoolArray
    gt_area: FloatArray
    gt_box: FloatArray
    gt_mask: Sequence[Any] | None
    lenient: frozenset[tuple[int, int]] = frozenset()

    @property
    def tasks(self) -> tuple[str, ...]:
        """What can be evaluated: "bbox", and "segm" if detections and objects have masks."""
        return ("bbox",) if self.dt_mask is None or self.gt_mask is None else ("bbox", "segm")

    @property
    def dt_slices(self) -> list[slice]:
        return image_slices(self.dt_image, len(self.image_ids))

    @property
    def gt_slices(self) -> list[slice]:
        return image_slices(self.gt_image, len(self.image_ids))

    def score(self, task: str) -> FloatArray:
        """Returns the scores by which a task ranks detections, (D,)."""
        return self.dt_score if task == "bbox" else self.dt_mask_score

    def dt_area(self, task: str) -> FloatArray:
        """Returns the areas of the detections in pixels, (D,)."""
        if task == "bbox":
            return self.dt_box[:, 2] * self.dt_box[:, 3]
        assert self.dt_mask is not None
        return mask_areas(self.dt_mask)

    def ious(self, task: str) -> list[FloatArray]:
        """Returns the (d, g) IoUs of each image.

        For a crowd, the value is the share of the detection that lies in the crowd.
        """
        pairs = zip(self.dt_slices, self.gt_slices, strict=True)
        what = {"bbox": "IoU of boxes", "segm": "IoU of masks"}[task]
        told = progress(pairs, what, "image", len(self.image_ids))
        return [self._image_ious(task, dt, gt) for dt, gt in told]

    def _image_ious(self, task: str, dt: slice, gt: slice) -> FloatArray:
        if dt.start == dt.stop or gt.start == gt.stop:
            return np.zeros((dt.stop - dt.start, gt.stop - gt.start))
        crowd = self.gt_crowd[gt].astype(np.uint8).tolist()
        if task == "bbox":
            return np.asarray(coco_mask.iou(self.dt_box[dt], self.gt_box[gt], crowd))
        assert self.dt_mask is not None and self.gt_mask is not None
        return np.asarray(coco_mask.iou(self.dt_mask[dt], self.gt_mask[gt], crowd))

    def with_classes(self, classes: IntArray, order: IntArray) -> Scene:
        """Returns the scene with new classes for the detections, sorted accordingly.

        Args:
            classes: (D,) new class of each detection, in the current order.
            order: indices of the detections to keep, sorted by image and new class.
        """
        masks = self.dt_mask
        return replace(
            self,
            dt_image=self.dt_image[order],
            dt_class=classes[order],
            dt_score=self.dt_score[order],
            dt_mask_score=self.dt_mask_score[order],
            dt_box=self.dt_box[order],
            dt_mask=None if masks is None else [masks[k] for k in order],
        )


def image_slices(images: npt.NDArray[Any], num_images: int) -> list[slice]:
    """Returns the slice of each image in a sequence sorted by image.

    Args:
        images: (n,) index of the image of each entry, ascending.
        num_images: number of images.
    """
    ends = np.searchsorted(images, np.arange(num_images + 1)).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def mask_areas(masks: Sequence[Any]) -> FloatArray:
    """Returns the pixel counts of n compressed RLEs, (n,)."""
    # One at a time, because with NumPy 2 pycocotools fails on lists of more than 255 masks.
    return np.array([float(coco_mask.area(rle)) for rle in masks])
