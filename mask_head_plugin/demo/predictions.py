"""Converts detections to COCO records, and recognises objects from frame to frame in videos.

Shape alphabet: N detections of an image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from ..durable_files import write_durably
from ..evaluation.matching import SAME_OBJECT_IOU

FRAMES_REMEMBERED = 8  # as in detectron2's VideoVisualizer


@dataclass(frozen=True)
class Detections:
    """The detections in one image, best first.

    Attributes:
        classes: N class numbers, counted from 0.
        scores: N scores.
        mask_scores: N mask scores if the model has mask scoring; otherwise None.
        boxes: (N, 4) XYXY in pixels.
        rles: N run lengths of masks, with counts as text; None if the model has no masks.
    """

    classes: list[int]
    scores: list[float]
    mask_scores: list[float] | None
    boxes: npt.NDArray[np.float64]
    rles: list[dict[str, Any]] | None

    @property
    def boxes_xywh(self) -> npt.NDArray[np.float64]:
        return np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)


@dataclass(frozen=True)
class Categories:
    """Name and id of each class. In semantic maps, class k has the value k + 1; 0 is background."""

    names: list[str]
    ids: list[int]

    def records(self) -> list[dict[str, Any]]:
        """Returns the list for the ``categories`` of a COCO file."""
        pairs = enumerate(zip(self.ids, self.names, strict=True))
        return [{"id": i, "name": name, "semantic_value": k + 1} for k, (i, name) in pairs]


@dataclass
class Predictions:
    """Collects detections and writes them to a COCO file."""

    categories: Categories
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, found: Detections, image: dict[str, Any]) -> None:
        """Adds an image and its detections.

        Args:
            found: the detections.
            image: ``file_name``, ``height`` and ``width``; for a frame of a video, also ``frame``.
        """
        image = {"id": len(self.images) + 1, **image}
        self.images.append(image)
        for index, k in enumerate(found.classes):
            box = [round(x, 3) for x in found.boxes_xywh[index].tolist()]
            record: dict[str, Any] = {
                "id": len(self.annotations) + 1,
                "image_id": image["id"],
                **{key: image[key] for key in ("file_name", "frame") if key in image},
                "category_id": self.categories.ids[k],
                "category_name": self.categories.names[k],
                "score": found.scores[index],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            if found.mask_scores is not None:
                record["mask_score"] = found.mask_scores[index]
            if found.rles is not None:
                record["segmentation"] = found.rles[index]
                record["area"] = int(coco_mask.area(found.rles[index]))
            self.annotations.append(record)

    def write(self, path: Path) -> None:
        content = {
            "images": self.images,
            "categories": self.categories.records(),
            "annotations": self.annotations,
        }
        write_durably(path, json.dumps(content))


@dataclass(frozen=True)
class KnownObject:
    """An object that was detected in a video.

    Attributes:
        number: number of its colour.
        category: class number.
        shape: its last mask as run lengths or, without masks, its last box [x, y, width, height].
        missed: number of frames since it was last detected.
    """

    number: int
    category: int
    shape: Any
    missed: int = 0


class ColourKeeper:
    """Keeps the colour of an object from frame to frame.

    Otherwise, colours would change whenever the order of the scores changes. A detection is the
    same object as before if it has the same class and overlaps the object's last position. An
    object is forgotten after FRAMES_REMEMBERED frames without a detection.
    """

    def __init__(self) -> None:
        self._count = 0
        self._known: list[KnownObject] = []

    def numbers(self, found: Detections) -> list[int]:
        """Returns the colour number of each detection in the next frame."""
        shapes = found.boxes_xywh if found.rles is None else found.rles
        numbers = [-1] * len(found.classes)
        if numbers and self._known:
            overlap = _class_iou(shapes, found.classes, self._known)
            while overlap.max() >= SAME_OBJECT_IOU:
                new, old = np.unravel_index(int(overlap.argmax()), overlap.shape)
                numbers[new] = self._known[old].number
                overlap[new], overlap[:, old] = 0, 0
        for index, number in enumerate(numbers):
            if number < 0:
                numbers[index] = self._count
                self._count += 1
        taken = set(numbers)
        missed = [replace(x, missed=x.missed + 1) for x in self._known if x.number not in taken]
        self._known = [
            *map(KnownObject, numbers, found.classes, shapes),
            *(x for x in missed if x.missed <= FRAMES_REMEMBERED),
        ]
        return numbers


def _class_iou(
    shapes: Any, classes: Sequence[int], known: Sequence[KnownObject]
) -> npt.NDArray[np.float64]:
    """Returns the (N, len(known)) IoU of masks or, without masks, of boxes.

    The IoU is 0 if the classes differ.
    """
    others: Any = [x.shape for x in known]
    if not isinstance(shapes, list):
        others = np.array(others)
    overlap = np.array(coco_mask.iou(shapes, others, [0] * len(known)))
    overlap[np.not_equal.outer(classes, [x.category for x in known])] = 0
    return overlap
