"""COCO's run-length encoding: of places where a mask changes, and of annotations.

Shape alphabet: H, W height and width of the image in pixels; X changes of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Rle = dict[str, Any]
"""``size`` [H, W] and compressed ``counts``, as bytes or, as in JSON, as text."""


def rle_of_changes(changes: npt.NDArray[np.int64], image_hw: tuple[int, int]) -> Rle:
    """Returns the encoding, counts as bytes, of a mask that changes at given places.

    Args:
        changes: (X,) ``x * H + y`` of each pixel that differs from the one before it, going down
            the columns from left to right; ascending. The pixel before the first is outside.
        image_hw: H, W.
    """
    counts = np.diff(changes, prepend=0, append=image_hw[0] * image_hw[1])
    return coco_mask.frPyObjects({"counts": counts, "size": list(image_hw)}, *image_hw)


def as_text(rle: Mapping[str, Any]) -> Rle:
    """Returns an encoding whose counts are text, which JSON can hold."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def annotation_rle(segmentation: Any, image_hw: tuple[int, int]) -> Any:
    """Returns an annotation's segmentation as one compressed RLE, None where it has none.

    Args:
        segmentation: polygons, or an RLE with compressed or uncompressed counts.
        image_hw: H, W.

    Raises:
        ValueError: if the size of an RLE is not image_hw or its counts do not add up to it.
    """
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        # Fewer than six numbers enclose nothing, and pycocotools takes four for a box.
        polygons = [x for x in segmentation if len(x) >= 6 and len(x) % 2 == 0]
        return polygons_rle(polygons, image_hw) if polygons else None
    check_rle_size(segmentation, image_hw)
    if not isinstance(segmentation["counts"], list):
        return segmentation
    if sum(segmentation["counts"]) != image_hw[0] * image_hw[1]:
        # pycocotools would leave the rest of the mask as it is in memory.
        raise ValueError(f"the counts of an RLE do not add up to an image of {image_hw}")
    return coco_mask.frPyObjects(segmentation, *image_hw)


def check_rle_size(rle: Mapping[str, Any], image_hw: tuple[int, int]) -> None:
    """Raises ValueError if a run-length encoding is not of an image's size, H and W."""
    if tuple(rle["size"]) != tuple(image_hw):
        raise ValueError(f"an RLE has the size {tuple(rle['size'])}, the image {tuple(image_hw)}")


def polygons_rle(polygons: Sequence[Sequence[float]], image_hw: tuple[int, int]) -> Any:
    """Returns the union of polygons of three corners or more as one compressed RLE."""
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *image_hw))
