"""Computes boundary IoU (arXiv 2103.16562), which compares outlines; mask IoU compares areas.

The boundary of a mask consists of the pixels that an erosion removes: those within a distance d of
the mask's contour or of the image's edge. d is 2% of the image's diagonal. Boundary AP is COCO's AP
with the minimum of mask IoU and boundary IoU.

Boundaries are computed only in the window that a mask occupies, and only for pairs whose mask IoU
reaches the lowest threshold, because other pairs cannot match anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .mask_window import ByteArray, MaskWindow, mask_window

DILATION_RATIO = 0.02
"""Width of a boundary as a share of the image's diagonal (section 4)."""

MIN_IOU = 0.5
"""The lowest threshold of COCO's AP."""


@dataclass(frozen=True)
class Boundary:
    """The boundary of a mask, cropped from the image.

    Attributes:
        top: first row of the crop.
        left: first column of the crop.
        bits: (h, w) uint8, 0 or 1.
    """

    top: int
    left: int
    bits: ByteArray


def mask_boundary(rle: Any) -> Boundary:
    """Returns the boundary of a mask that is given as compressed run lengths in COCO's format.

    The mask is eroded d times by a 3x3 square. Pixels outside the image count as zeros.
    """
    return window_boundary(mask_window(rle), boundary_distance(rle["size"]))


def boundary_distance(image_hw: Sequence[int]) -> int:
    """Returns d, the width of boundaries in pixels."""
    return max(round(DILATION_RATIO * float(np.hypot(image_hw[0], image_hw[1]))), 1)


def window_boundary(mask: MaskWindow, distance: int) -> Boundary:
    """Returns the boundary of a mask.

    Args:
        mask: window of the mask.
        distance: d in pixels.
    """
    bits = mask.bits
    if bits.size == 0:
        return Boundary(mask.top, mask.left, bits)
    # All pixels around the window are zero, so one row of zeros on each side is enough.
    padded = cv2.copyMakeBorder(bits, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inside: Any = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)
    return Boundary(mask.top, mask.left, np.ascontiguousarray(bits - inside[1:-1, 1:-1]))


def boundary_iou(a: Boundary, b: Boundary) -> float:
    """Returns the IoU of two boundaries in one image; 0 if both are empty."""
    top, left = max(a.top, b.top), max(a.left, b.left)
    bottom = min(a.top + a.bits.shape[0], b.top + b.bits.shape[0])
    right = min(a.left + a.bits.shape[1], b.left + b.bits.shape[1])
    common = 0
    if bottom > top and right > left:
        cuts = [
            x.bits[top - x.top : bottom - x.top, left - x.left : right - x.left] for x in (a, b)
        ]
        common = cv2.countNonZero(cv2.bitwise_and(*cuts))
    union = sum(cv2.countNonZero(x.bits) if x.bits.size else 0 for x in (a, b)) - common
    return common / union if union else 0.0


def limit_by_boundary(
    ious: npt.NDArray[np.float64],
    detections: Sequence[Any],
    objects: Sequence[Any],
    crowd: Sequence[bool],
) -> npt.NDArray[np.float64]:
    """Returns the mask IoU or the boundary IoU of each pair, whichever is lower.

    Args:
        ious: (d, g) mask IoUs of the detections and objects of an image and class.
        detections: d compressed RLEs.
        objects: g compressed RLEs.
        crowd: (g,) whether an object is a crowd. For crowds, only mask IoU counts, because their
            outlines are not exact.

    Returns:
        (d, g) IoUs. Mask IoUs below MIN_IOU are unchanged.
    """
    limited = ious.copy()
    of_detections: dict[int, Boundary] = {}
    of_objects: dict[int, Boundary] = {}
    for d, g in np.argwhere((ious >= MIN_IOU) & ~np.asarray(crowd, bool)[None]).tolist():
        if d not in of_detections:
            of_detections[d] = mask_boundary(detections[d])
        if g not in of_objects:
            of_objects[g] = mask_boundary(objects[g])
        limited[d, g] = min(ious[d, g], boundary_iou(of_detections[d], of_objects[g]))
    return limited
