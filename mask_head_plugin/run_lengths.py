"""COCO's run-length encoding: encodes masks and annotations, and finds damaged encodings.

Shape alphabet: H, W height and width of the image in pixels; X changes between mask and background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Rle = dict[str, Any]
"""``size`` [H, W] and compressed ``counts``, either bytes or, as in JSON, text."""

LARGEST_COORDINATE = 1e6
"""How far from the image a corner of a polygon may be, in pixels. pycocotools needs memory and time
in proportion to the length of the outline, and does not return if a coordinate is NaN or infinite.
"""


def rle_of_changes(changes: npt.NDArray[np.int64], image_hw: tuple[int, int]) -> Rle:
    """Returns the encoding of a mask, with counts as bytes, from the pixels at which it changes.

    Args:
        changes: (X,) positions ``x * H + y``, in ascending order, of all pixels that differ from
            the previous one. Pixels are visited column by column, from top to bottom, and the first
            pixel is compared with background.
        image_hw: H, W.
    """
    counts = np.diff(changes, prepend=0, append=image_hw[0] * image_hw[1])
    return coco_mask.frPyObjects({"counts": counts, "size": list(image_hw)}, *image_hw)


def as_text(rle: Mapping[str, Any]) -> Rle:
    """Returns an encoding with its counts as text, which JSON can represent."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def annotation_rle(segmentation: Any, image_hw: tuple[int, int]) -> Any:
    """Returns an annotation's segmentation as one compressed RLE, or None if it has no mask.

    Args:
        segmentation: polygons, or an RLE with compressed or uncompressed counts; may be missing.
        image_hw: H, W.

    Raises:
        ValueError: if the size of an RLE is not image_hw, its counts are invalid or do not add
            up to that size, or a polygon has a corner that is not finite or more than
            LARGEST_COORDINATE away.
    """
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        # Fewer than six numbers enclose no area, and pycocotools would interpret four as a box.
        polygons = [x for x in segmentation if len(x) >= 6 and len(x) % 2 == 0]
        if not all(abs(x) <= LARGEST_COORDINATE for x in chain.from_iterable(polygons)):
            raise ValueError(
                "its polygons have coordinates that are not finite or exceed a million"
            )
        return polygons_rle(polygons, image_hw) if polygons else None
    check_rle_size(segmentation, image_hw)
    if not isinstance(segmentation["counts"], list):
        return segmentation
    if not all(x >= 0 and x % 1 == 0 for x in segmentation["counts"]):
        raise ValueError("the counts of an RLE must be whole numbers of 0 or more")
    if sum(segmentation["counts"]) != image_hw[0] * image_hw[1]:
        # pycocotools would leave the rest of the mask uninitialised.
        raise ValueError(f"the counts of an RLE do not add up to an image of {image_hw}")
    return coco_mask.frPyObjects(segmentation, *image_hw)


def check_rle_size(rle: Mapping[str, Any], image_hw: tuple[int, int]) -> None:
    """Raises ValueError if a run-length encoding does not have the image's size, H and W."""
    if tuple(rle["size"]) != tuple(image_hw):
        raise ValueError(
            f"an RLE has the size {tuple(rle['size'])}, but the image has {tuple(image_hw)}"
        )


def polygons_rle(polygons: Sequence[Sequence[float]], image_hw: tuple[int, int]) -> Any:
    """Returns the union of polygons with at least three corners each as one compressed RLE."""
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *image_hw))


def first_broken(rles: Sequence[Mapping[str, Any]]) -> int | None:
    """Returns the index of the first encoding whose compressed counts do not add up to its image.

    pycocotools does not check counts. If they are damaged, it reads and writes beyond the mask, or
    never returns. In the format, a number consists of one or more characters. Each is the character
    "0" plus 6 bits: 5 bits of the value, starting with the lowest, and one bit that is set if more
    characters follow. Negative numbers are in two's complement. From the fourth number on, each
    number is stored as the difference from the number two positions earlier.

    Args:
        rles: encodings with compressed counts, as bytes or text.
    """
    texts = [x["counts"] for x in rles]
    texts = [x if isinstance(x, bytes) else str(x).encode("utf-8") for x in texts]
    step = 4096  # encodings checked at a time, which takes a few MB
    for start in range(0, len(texts), step):
        chunk = slice(start, start + step)
        areas = np.array([x["size"][0] * x["size"][1] for x in rles[chunk]], np.int64)
        broken = np.flatnonzero(~_make_up(texts[chunk], areas))
        if len(broken):
            return start + int(broken[0])
    return None


MOST_CHARACTERS = 8
"""Largest number of characters in one number: 40 bits, more than any image needs."""


def _make_up(texts: Sequence[bytes], areas: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Returns, for each text, whether its counts are non-negative and add up to the area."""
    lengths = np.array([len(x) for x in texts])
    fits = lengths > 0
    owner = np.repeat(np.arange(len(texts)), lengths)
    values = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    fits[owner[(values < 0) | (values > 63)]] = False
    is_last = values & 32 == 0
    ends = np.cumsum(lengths)[fits] - 1
    fits[owner[ends[~is_last[ends]]]] = False  # the last number is incomplete
    # For each number: where it begins, how many characters it has, and its value.
    starts_text = np.zeros(len(values), bool)
    starts_text[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    begins = np.flatnonzero(starts_text | np.concatenate([[True], is_last[:-1]])[: len(values)])
    size = np.diff(begins, append=len(values))
    number_owner = owner[begins]
    fits[number_owner[size > MOST_CHARACTERS]] = False
    place = np.arange(len(values)) - np.repeat(begins, size)
    parts = (values & 31) << (5 * np.minimum(place, MOST_CHARACTERS))
    numbers = np.add.reduceat(parts, begins) if len(begins) else parts[:0]
    negative = values[begins + size - 1] & 16 != 0
    numbers = numbers - (negative.astype(np.int64) << (5 * np.minimum(size, MOST_CHARACTERS)))
    # A count is the sum of its own number and of every second number before it, down to the second
    # or third number.
    first = np.searchsorted(number_owner, np.arange(len(texts)))
    index = np.arange(len(numbers)) - first[number_owner]
    counts = numbers.copy()
    for parity in (0, 1):
        chain = np.flatnonzero((index % 2 == parity) & (index > 0))
        sums = np.cumsum(numbers[chain])
        begin = np.searchsorted(number_owner[chain], number_owner[chain])  # of each text
        counts[chain] = sums - np.concatenate([[0], sums])[begin]
    fits[number_owner[counts < 0]] = False
    totals = np.bincount(number_owner, counts, len(texts))
    return fits & (totals == areas)
