"""Converts the pixels of an image to a model's input: channel order and size.

Reproduces detectron2's values in NumPy, for models that run without detectron2. If Pillow is
installed, 8-bit images are resized with Pillow, which is faster than NumPy and returns the same
values as detectron2. The results of NumPy and Pillow differ by at most one grey level, and only
where Pillow resizes columns before rows.

Shape alphabet: H, W image height and width in pixels; C channels; T taps of a resampling filter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    from PIL import Image
except ImportError:
    Image = None  # type: ignore[assignment]

ByteArray = npt.NDArray[np.uint8]

IMAGE_FORMATS = ("BGR", "RGB", "L", "YUV-BT.601")
"""Values of INPUT.FORMAT that detectron2 supports."""

LARGEST_UNSCALED = 3
"""With INPUT.MIN_SIZE_TEST 0, an image keeps its size unless its area is larger than that of a
square whose sides are this many times INPUT.MAX_SIZE_TEST. Larger images would need too much
memory, for example 14 GB for 12,000 x 9,000 pixels.
"""

YUV_OF_RGB = ((0.299, 0.587, 0.114), (-0.14713, -0.28886, 0.436), (0.615, -0.51499, -0.10001))
GREY_OF_RGB = (19595, 38470, 7471)
"""Pillow's weights, in units of 2^-16."""
WEIGHT_BITS = 22
"""Number of fractional bits in the weights with which Pillow resizes 8-bit images."""


def rgb_in_format(rgb: ByteArray, image_format: str) -> npt.NDArray[Any]:
    """Converts an (H, W, 3) RGB image to (H, W, C) in one of IMAGE_FORMATS.

    The result is uint8. For YUV-BT.601, it is float32 with Y from 0 to 1.
    """
    match image_format:
        case "RGB":
            return rgb
        case "BGR":
            return rgb[:, :, ::-1]
        case "L":
            grey = rgb.astype(np.int32) @ np.array(GREY_OF_RGB, np.int32)
            return ((grey + (1 << 15)) >> 16).astype(np.uint8)[..., None]
        case "YUV-BT.601":
            return np.dot(rgb / 255.0, np.array(YUV_OF_RGB).T).astype(np.float32)
    raise ValueError(f"image format {image_format!r} is not one of {IMAGE_FORMATS}")


def is_scaled_down(image_hw: tuple[int, int], min_size: int, max_size: int) -> bool:
    """Returns whether an image is scaled to ``max_size`` even though ``min_size`` is 0."""
    largest = (LARGEST_UNSCALED * max_size) ** 2
    return min_size == 0 and image_hw[0] * image_hw[1] > largest


def model_hw(
    image_hw: tuple[int, int], min_size: int, max_size: int, room: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Returns the height and width to which an image is resized, as in ResizeShortestEdge.

    Args:
        image_hw: H, W.
        min_size: length of the shorter side; 0 keeps the size, but see LARGEST_UNSCALED.
        max_size: upper limit for the longer side.
        room: height and width of the input of a model with a fixed input size, into which the image
            must fit; None for other models.
    """
    height, width = float(image_hw[0]), float(image_hw[1])
    shortest = max_size if is_scaled_down(image_hw, min_size, max_size) else min_size
    if shortest > 0:
        # The operations have the same order as in detectron2, because their rounding decides on
        # sizes that end in half a pixel.
        scale = float(shortest) / min(image_hw)
        if height < width:
            height, width = float(shortest), scale * width
        else:
            height, width = scale * height, float(shortest)
        if max(height, width) > max_size:
            scale = max_size * 1.0 / max(height, width)
            height, width = height * scale, width * scale
    if room is not None:
        scale = min(1.0, room[0] / height, room[1] / width)
        height, width = height * scale, width * scale
    return max(int(height + 0.5), 1), max(int(width + 0.5), 1)


def resized(image: npt.NDArray[Any], hw: tuple[int, int]) -> npt.NDArray[Any]:
    """Resizes an image bilinearly, like detectron2's ResizeTransform.

    Args:
        image: (H, W, C). When a uint8 image is shrunk, it is low-pass filtered, as in Pillow. A
            float32 image is not, as in torch's interpolate.
        hw: height and width of the result.

    Returns:
        The resized image. It can be read-only.
    """
    if image.shape[:2] == hw:
        return image
    if image.dtype != np.uint8:
        for axis in (0, 1):
            image = _interpolated(image, hw[axis], axis)
        return image
    if Image is None or image.shape[2] not in (1, 3):
        for axis in (1, 0):
            image = _filtered(image, hw[axis], axis)
        return image
    plain = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))
    scaled = plain.resize((hw[1], hw[0]), Image.Resampling.BILINEAR)
    return np.asarray(scaled).reshape(*hw, image.shape[2])


def _filtered(image: ByteArray, after: int, axis: int) -> ByteArray:
    """Resizes one axis with Pillow's triangular filter, in the same integer arithmetic."""
    before = image.shape[axis]
    if before == after:
        return image
    cells, weights = _filter_taps(before, after)
    shape = [1, 1, 1]
    shape[axis] = after
    total: Any = np.int32(1 << (WEIGHT_BITS - 1))
    for cell, weight in zip(cells, weights, strict=True):
        total = total + image.take(cell, axis).astype(np.int32) * weight.reshape(shape)
    return (total >> WEIGHT_BITS).clip(0, 255).astype(np.uint8)


def _filter_taps(before: int, after: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Returns the (T, after) old pixels that contribute to each new pixel, and their weights."""
    scale = before / after
    reach = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + reach + 0.5).astype(np.int64), before)
    cells = first + np.arange(math.ceil(reach) * 2 + 1)[:, None]
    weights = np.maximum(1 - np.abs((cells - centre + 0.5) * (1 / reach)), 0)
    weights[cells >= end] = 0
    weights /= weights.sum(0)
    return cells.clip(0, before - 1), (weights * (1 << WEIGHT_BITS) + 0.5).astype(np.int32)


def _interpolated(image: npt.NDArray[Any], after: int, axis: int) -> npt.NDArray[Any]:
    """Resizes one axis by linear interpolation between the centres of the two nearest pixels."""
    before = image.shape[axis]
    place = np.maximum((np.arange(after, dtype=np.float32) + 0.5) * np.float32(before / after), 0.5)
    place -= np.float32(0.5)
    low = np.minimum(place.astype(np.int64), before - 1)
    shape = [1, 1, 1]
    shape[axis] = after
    share = (place - low).astype(image.dtype).reshape(shape)
    high = np.minimum(low + 1, before - 1)
    return image.take(low, axis) * (1 - share) + image.take(high, axis) * share
