"""Compares boxes and masks of annotations with each other and with the image.

Run lengths are decoded with NumPy. Only masks that are known to be valid are passed to
pycocotools, because its C code does not check run lengths.

Shape alphabet: H, W sides of the image in pixels; n runs of a mask.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util

from ..run_lengths import annotation_rle, polygons_rle
from .findings import Findings, Place, errors_of, quote
from .polygon_geometry import Box as Box
from .polygon_geometry import Outline, areas, around, outline
from .records import Sizes, is_finite, listed_id

IntArray = npt.NDArray[np.int64]

# COCO's coordinates have two decimals, so smaller distances outside the image are rounding errors.
ROUNDING = 0.01
# Tools that write whole pixels, or treat the last pixel differently, are off by one. So are COCO's
# crowds, whose boxes end one pixel before their masks.
ONE_PIXEL = 1.01
# If the IoU of an object's box and its mask's box is below this, a perfect proposal for the mask
# does not count as this object in the RPN (MODEL.RPN.IOU_THRESHOLDS). Two pixels are always
# accepted, because the IoU of small objects falls quickly.
LEAST_IOU, TWO_PIXELS = 0.7, 2.01
# detectron2 drops boxes with a side of at most this length (filter_empty_instances).
NO_LENGTH = 1e-5
MAX_CHARACTERS = 7
"""Maximum length of a number in compressed run lengths: counts are below 2^32, and each
character has five bits."""


@dataclass
class MaskFormats:
    """The formats of single objects' masks, with the id of an annotation for each format."""

    examples: dict[str, Any] = field(default_factory=dict)

    def note(self, annotation: Mapping[str, Any]) -> None:
        mask = annotation.get("segmentation")
        if mask and not annotation.get("iscrowd"):
            for kind, name in ((list, "polygons"), (dict, "run lengths")):
                if isinstance(mask, kind):
                    self.examples.setdefault(name, annotation.get("id"))

    def check(self, found: Findings) -> None:
        """Adds a finding if a file uses both formats."""
        if len(self.examples) == 2:
            of = " and ".join(
                f"{name} (annotation {quote(i)})" for name, i in self.examples.items()
            )
            found.add("mixed-formats", f"masks of single objects are {of}")


class Mask(NamedTuple):
    """A valid mask.

    Attributes:
        box: bounding box.
        area: area in pixels, filled as in detectron2.
        hollow_area: area in pixels if polygons inside others are holes.
        flat: whether the mask has no height or no width, like a line.
        inside: whether the mask lies inside the image, give or take a pixel.
    """

    box: Box
    area: float
    hollow_area: float
    flat: bool = False
    inside: bool = True


def check_box_and_mask(
    annotation: Mapping[str, Any],
    index: int,
    found: Findings,
    sizes: Sizes,
    *,
    lvis: bool,
    masks: bool,
) -> Mask | None:
    """Checks an annotation's box and mask, and compares them with the image if its size is known.

    Args:
        annotation: the record.
        index: index of the record in its section.
        found: list to which findings are added.
        sizes: sizes of the images.
        lvis: whether the file is in LVIS format, which has only polygons.
        masks: whether each annotation must have a mask.

    Returns:
        The mask if it is valid, even if it extends beyond the image or does not fit the box;
        otherwise None.
    """
    checker = _Checker(annotation, index, found)
    box = checker.box() if annotation.get("bbox") is not None else None
    image_hw = sizes.get(listed_id(annotation.get("image_id"), sizes))
    given = annotation.get("segmentation")
    mask = checker.mask(image_hw, lvis) if given or (masks and given is not None) else None
    if box is not None and image_hw is not None:
        checker.compare(box, mask if mask and mask.inside else None, image_hw)
    return mask


def checked_mask(
    annotation: Mapping[str, Any], image_hw: tuple[int, int]
) -> tuple[Box, Any] | None:
    """Returns the part of a mask's box inside the image, and the mask as pycocotools' run lengths.

    Args:
        annotation: an annotation with a mask.
        image_hw: H, W.

    Returns:
        The box and the run lengths, or None if the mask has errors or no pixels, or cannot be
        encoded.
    """
    found = Findings("")
    checker = _Checker({**annotation, "iscrowd": 0}, -1, found)
    mask = checker.mask(image_hw, lvis=False) if annotation.get("segmentation") else None
    if mask is None or mask.flat or not mask.inside or errors_of(found):
        return None
    try:
        return _clip(mask.box, image_hw), annotation_rle(annotation["segmentation"], image_hw)
    except ValueError:  # a corner is too far from the image
        return None


class _Checker:
    """Checks one annotation."""

    def __init__(self, annotation: Mapping[str, Any], index: int, found: Findings) -> None:
        self._annotation, self._index, self._found = annotation, index, found

    def _note(self, kind: str, message: str) -> None:
        annotation = self._annotation
        ids = (annotation.get("image_id"), annotation.get("id"))
        self._found.add(kind, message, Place("annotations", self._index, *ids))

    def box(self) -> Box | None:
        """Returns the box if it is valid, even if its area is 0."""
        box = self._annotation["bbox"]
        if type(box) is not list or len(box) != 4 or not {int, float}.issuperset(map(type, box)):
            self._note("box-malformed", f"the box is {quote(box)}, not four numbers")
            return None
        if not all(map(is_finite, box)):
            self._note("box-not-finite", f"the box {quote(box)} contains NaN or infinity")
            return None
        x, y, width, height = box
        if width < 0 or height < 0:
            self._note("box-negative", f"the box is {width} wide and {height} high")
            return None
        return x, y, x + width, y + height

    def mask(self, image_hw: tuple[int, int] | None, lvis: bool) -> Mask | None:
        """Returns the mask if it is valid; without an image size, skips the checks that need it."""
        mask = self._annotation["segmentation"]
        if isinstance(mask, dict) and lvis:
            self._note(
                "segmentation-type",
                "the mask is given as run lengths, but detectron2 expects polygons in LVIS files",
            )
        elif isinstance(mask, list | dict) and not mask:
            self._note("segmentation-empty", f"the mask is empty: {mask}")
        elif isinstance(mask, list):
            return self._polygons(mask, image_hw)
        elif isinstance(mask, dict):
            return self._run_lengths(mask, image_hw)
        else:
            self._note("segmentation-type", f"the mask is {quote(mask)}, not a list or object")
        return None

    def _polygons(self, polygons: list[Any], image_hw: tuple[int, int] | None) -> Mask | None:
        if self._annotation.get("iscrowd") == 1:
            self._note("crowd-polygon", "a crowd is given as polygons")
        if all(type(x) in (int, float) for x in polygons):
            self._note("polygons-not-nested", f"the mask is a flat list: {quote(polygons)}")
            return None
        outlines = [self._outline(polygon, k) for k, polygon in enumerate(polygons)]
        sound = [x for x in outlines if x is not None]
        if len(sound) < len(outlines):
            return None
        box = around([x.box for x in sound])
        mask = Mask(box, *areas(polygons, sound))
        sides = (box[2] - box[0], box[3] - box[1])
        if image_hw is None:
            return mask._replace(flat=min(sides) <= NO_LENGTH)
        height, width = image_hw
        over = max(-box[0], -box[1], box[2] - width, box[3] - height)
        if over > ROUNDING:
            message = f"a polygon extends {over:.4g} pixels beyond the image of {width} x {height}"
            self._note("polygon-outside" if over > ONE_PIXEL else "polygon-over-edge", message)
            if over > ONE_PIXEL:
                return mask._replace(inside=False)
        if min(sides) <= NO_LENGTH:
            return mask._replace(flat=True)
        # A mask can miss every pixel centre only if its mean width is below a pixel.
        if mask.area < max(sides) and not mask_util.area(polygons_rle(polygons, image_hw)):
            if mask.area < ROUNDING**2:
                self._note("polygon-without-area", "all points of the mask are on a line")
            else:
                self._note(
                    "mask-below-a-pixel",
                    f"the mask has an area of {mask.area:.2g} pixels and covers no pixel centre",
                )
        return mask

    def _outline(self, polygon: Any, k: int) -> Outline | None:
        """Returns a polygon of the mask if it is valid."""
        if not isinstance(polygon, list | array):
            self._note("polygon-not-numbers", f"polygon {k} is {quote(polygon)}")
        elif not polygon:
            self._note("polygon-empty", f"polygon {k} is empty")
        elif type(polygon) is list and not {int, float}.issuperset(map(type, polygon)):
            of_points = all(type(x) is list for x in polygon)
            kind = "polygon-of-points" if of_points else "polygon-not-numbers"
            self._note(kind, f"polygon {k} is {quote(polygon)}")
        elif len(polygon) % 2:
            self._note("polygon-odd", f"polygon {k} has {len(polygon)} numbers")
        elif len(polygon) < 6:
            self._note("polygon-short", f"polygon {k} has {len(polygon) // 2} points")
        else:
            sound = outline(polygon)
            if sound is None:
                message = f"polygon {k} has coordinates that are NaN or infinite"
                self._note("polygon-not-finite", message)
            return sound
        return None

    def _run_lengths(self, rle: dict[str, Any], image_hw: tuple[int, int] | None) -> Mask | None:
        size: Any = rle.get("size")
        counts: Any = rle.get("counts")
        two = type(size) is list and len(size) == 2 and all(type(x) is int for x in size)
        if not two or not isinstance(counts, list | str):
            self._note("rle-malformed", f"the mask is {quote(rle)}")
            return None
        if image_hw is None and min(size) > 0:
            image_hw = (size[0], size[1])
        if tuple(size) != image_hw:
            message = f"the mask has size {quote(size)}, but the image has {list(image_hw or ())}"
            self._note("rle-size", message)
            return None
        runs = decode_counts(counts) if isinstance(counts, str) else self._plain_counts(counts)
        if runs is None:
            if isinstance(counts, str):
                self._note("rle-corrupt", f"the run lengths {quote(counts)} cannot be decoded")
            return None
        if (runs < 0).any():
            self._note("rle-counts", f"a run has length {runs.min()}")
            return None
        # The largest run is checked first, because a sum that overflows int64 could have any value.
        if runs.max(initial=0) > math.prod(image_hw) or runs.sum() != math.prod(image_hw):
            message = f"the runs have {runs.sum()} pixels, but the image has {math.prod(image_hw)}"
            self._note("rle-sum", message)
            return None
        box = runs_box(runs, image_hw[0])
        if box is None:
            self._note("empty-mask", "the mask has no pixels")
            return None
        area = float(runs[1::2].sum())
        return Mask(box, area, area)

    def _plain_counts(self, counts: list[Any]) -> IntArray | None:
        wrong = [x for x in counts if type(x) is not int or abs(x) >= 1 << 32]
        if wrong:
            self._note("rle-counts", f"a run has length {quote(wrong[0])}")
            return None
        return np.array(counts, np.int64)

    def compare(self, box: Box, mask: Mask | None, image_hw: tuple[int, int]) -> None:
        """Compares a box with its mask and the image, and adds findings."""
        height, width = image_hw
        sides, flat = (box[2] - box[0], box[3] - box[1]), mask is not None and mask.flat
        if min(sides) <= NO_LENGTH:
            message = f"the box is {sides[0]:.4g} wide and {sides[1]:.4g} high"
            self._note("flat-object" if flat else "box-without-area", message)
            return
        if mask is not None and flat:
            self._note("polygon-without-area", "all points of the mask are on a line")
            return
        over = max(-box[0], -box[1], box[2] - width, box[3] - height)
        if over > ONE_PIXEL:
            message = f"the box extends {over:.4g} pixels beyond the image of {width} x {height}"
            self._note("box-outside", message + self._as_corners(mask))
            return
        if mask is None:
            return
        # Some annotation tools clip boxes and masks to the image, but others do not.
        a, b = _clip(box, image_hw), _clip(mask.box, image_hw)
        off = max(abs(x - y) for x, y in zip(a, b, strict=True))
        if off > ONE_PIXEL:
            iou = box_iou(a, b)
            message = f"the box differs from its mask's box by {off:.4g} pixels (IoU {iou:.2f})"
            wrong = iou < LEAST_IOU and off > TWO_PIXELS
            hint = self._as_corners(mask) if wrong else ""
            self._note("box-mismatch" if wrong else "box-loose", message + hint)

    def _as_corners(self, mask: Mask | None) -> str:
        """Returns a hint if the box, read as [x0, y0, x1, y1], fits the mask."""
        if mask is None:
            return ""
        box = self._annotation["bbox"]
        off = max(abs(x - y) for x, y in zip(box, mask.box, strict=True))
        return " (it looks like [x0, y0, x1, y1])" if off <= ONE_PIXEL else ""


def decode_counts(text: str) -> IntArray | None:
    """Returns the (n,) run lengths of COCO's compressed string; None if it is invalid.

    A number consists of characters with five bits each, low bits first. A sixth bit is set in all
    characters but the last, whose fifth bit is the sign. From the fourth number on, each number is
    the difference from the number two positions earlier. The result may contain negative lengths,
    which also mean that the string is corrupt.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends + 1 - starts
    if lengths.max() > MAX_CHARACTERS:
        return None
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs: IntArray = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def runs_box(runs: IntArray, height: int) -> Box | None:
    """Returns the bounding box of a mask's pixels; None if there are none.

    Args:
        runs: (n,) lengths of runs that cover the whole image column by column, background first.
        height: H.
    """
    ends = np.cumsum(runs)[1::2]
    kept = runs[1::2] > 0
    starts, lasts = (ends - runs[1::2])[kept], ends[kept] - 1
    if not len(starts):
        return None
    columns = (starts // height, lasts // height)
    top, bottom = (starts % height).min(), (lasts % height).max() + 1
    if (columns[0] != columns[1]).any():  # a run continues at the top of the next column
        top, bottom = 0, height
    return float(columns[0][0]), float(top), float(columns[1][-1] + 1), float(bottom)


def box_iou(a: Box, b: Box) -> float:
    """Returns the intersection over union of two boxes; 0 if they have no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / both if both > 0 else 0.0


def _clip(box: Box, image_hw: tuple[int, int]) -> Box:
    height, width = image_hw
    if box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height:
        return box
    x0, x1 = (min(max(x, 0), width) for x in box[::2])
    y0, y1 = (min(max(y, 0), height) for y in box[1::2])
    return x0, y0, x1, y1
