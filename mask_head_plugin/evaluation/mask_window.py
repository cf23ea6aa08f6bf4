"""Decodes only the part of an image that a mask occupies.

Shape alphabet: h, w height and width of a window, in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval.mask_api_new_cpp import toUncompressedRLE
from pycocotools import mask as coco_mask

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class MaskWindow:
    """A mask's pixels inside its bounding box.

    Attributes:
        top: first row of the box.
        left: first column of the box.
        bits: (h, w) uint8, 0 or 1; empty for an empty mask.
    """

    top: int
    left: int
    bits: ByteArray

    def within(self, top: int, left: int, hw: tuple[int, int]) -> ByteArray:
        """Returns the mask's (h, w) pixels inside another window of the image."""
        found = np.zeros(hw, np.uint8)
        y0, x0 = max(self.top, top), max(self.left, left)
        y1 = min(self.top + self.bits.shape[0], top + hw[0])
        x1 = min(self.left + self.bits.shape[1], left + hw[1])
        if y1 > y0 and x1 > x0:
            own = self.bits[y0 - self.top : y1 - self.top, x0 - self.left : x1 - self.left]
            found[y0 - top : y1 - top, x0 - left : x1 - left] = own
        return found


def mask_window(rle: Mapping[str, Any]) -> MaskWindow:
    """Returns the window of a mask that is given as compressed run lengths in COCO's format."""
    left, top, width, height = (int(x) for x in coco_mask.toBbox(rle))
    image_height = int(rle["size"][0])
    counts = np.array(toUncompressedRLE([rle])[0]["counts"], np.int64)
    # Decodes only the window's columns. Every second run belongs to the mask.
    first, last = left * image_height, (left + width) * image_height
    ends = np.minimum(np.maximum(np.cumsum(counts), first), last)
    runs = ends.copy()
    runs[1:] -= ends[:-1]
    runs[0] -= first
    inside = np.zeros(len(runs), np.uint8)
    inside[1::2] = 1
    bits = np.repeat(inside, runs).reshape(width, image_height)[:, top : top + height].T
    return MaskWindow(top, left, np.ascontiguousarray(bits))
