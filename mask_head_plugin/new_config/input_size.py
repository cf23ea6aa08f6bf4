"""Chooses the size of a model's input images, based on the sizes of the objects.

Shape alphabet: N images, R objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .data_facts import DataFacts, FloatArray
from .device import Device

SMALLEST = 16
"""Side in pixels that nine tenths of the objects should reach. It spans four cells of a map of
stride 4, and more pixels than the M / 2 = 14 bins from which a mask of 28 x 28 is predicted."""
MOST_MAGNIFIED = 4
CONTEXT = 3
"""Smallest ratio of a crop's side to the side of a large object (the 90th percentile)."""
LARGEST_CROP = 0.75
"""Largest crop, as a share of the image; larger crops would save hardly any time."""
STEP = 32
USUAL_ELONGATION = 5 / 3
MOST_ELONGATED = 3.0
WHOLE_JITTER = (0.8, 0.85, 0.9, 0.95, 1.0)
"""Relative sizes, like the 640 to 800 pixels of detectron2."""
CROP_JITTER = (0.8, 0.9, 1.0, 1.1, 1.2)


@dataclass(frozen=True)
class InputSize:
    """How images are scaled and cropped.

    Attributes:
        short_edge: length of the shorter side after scaling; 0 keeps the size of images.
        longest: upper limit for the longer side.
        crop: size of training crops as a share of height and width, or in pixels if ``short_edge``
            is 0; None for whole images.
        view_pixels: average number of pixels in a training image or crop.
        image_pixels: average number of pixels in a whole image during evaluation.
        object_scale: (R,) scale factor of each object's image.
        smallest: 10th percentile of the sides of objects, in scaled pixels.
        wanted: the short edge that would make ``smallest`` equal to SMALLEST; 0 if images do not
            have to be scaled.
    """

    short_edge: int
    longest: int
    crop: float | int | None
    view_pixels: float
    image_pixels: float
    object_scale: FloatArray
    smallest: float
    wanted: int

    @property
    def train_sizes(self) -> list[int]:
        """Values for INPUT.MIN_SIZE_TRAIN. With crops, they are sizes of the crops."""
        if not self.short_edge:
            return [0]
        jitter = WHOLE_JITTER if self.crop is None else CROP_JITTER
        return [round(share * self.short_edge * (self.crop or 1)) for share in jitter]


def choose_input_size(facts: DataFacts, device: Device) -> InputSize:
    """Returns the input size for a data set on a device.

    Images keep their size if it is large enough for the objects and small enough for the device,
    unless object sizes relative to the image vary less than absolute sizes. Otherwise, all images
    are scaled to the same short edge.

    Args:
        facts: facts about the training data.
        device: the device to train on.
    """
    if _fits_unscaled(facts, device.image_pixels):
        return _unscaled(facts, device)
    relative = facts.object_sides / facts.short_sides[facts.image_of]
    wanted = SMALLEST / np.percentile(relative, 10)
    elongation = float(facts.elongations.mean())
    middle = float(np.median(facts.short_sides))
    usual = min(middle, device.usual_short_edge)

    def short_edge(pixels: float) -> int:
        edge = min(max(wanted, usual), math.sqrt(pixels / elongation), MOST_MAGNIFIED * middle)
        return max(round(edge / STEP), 1) * STEP

    edge, crop = short_edge(device.image_pixels), None
    if edge**2 * elongation > 1.05 * device.view_pixels:
        large = float(np.percentile(relative, 90)) * edge
        crop = _crop_share(edge, elongation, large, device)
        if crop is None:
            edge = short_edge(device.view_pixels)
    return _scaled(facts, edge, crop, math.ceil(wanted))


def _fits_unscaled(facts: DataFacts, most_pixels: float) -> bool:
    """Returns whether images can keep their size."""
    large_enough = np.percentile(facts.object_sides, 10) >= SMALLEST
    small_enough = np.percentile(facts.image_hw.prod(axis=1), 95) <= most_pixels
    own = np.log(facts.object_sides)
    relative = own - np.log(facts.short_sides[facts.image_of])
    return bool(large_enough and small_enough and own.std() <= 1.01 * relative.std())


def _unscaled(facts: DataFacts, device: Device) -> InputSize:
    pixels = facts.image_hw.prod(axis=1)
    side = math.ceil(_crop_side(float(np.percentile(facts.object_sides, 90)), device) / STEP) * STEP
    crop = None
    if np.percentile(pixels, 95) > device.view_pixels and side**2 < LARGEST_CROP * pixels.mean():
        crop = side
    seen = pixels if crop is None else np.minimum(facts.image_hw, crop).prod(axis=1)
    return InputSize(
        short_edge=0,
        longest=0,
        crop=crop,
        view_pixels=float(seen.mean()),
        image_pixels=float(pixels.mean()),
        object_scale=np.ones(len(facts.object_sides)),
        smallest=float(np.percentile(facts.object_sides, 10)),
        wanted=0,
    )


def _crop_side(large_object: float, device: Device) -> float:
    return max(CONTEXT * large_object, device.crop_side)


def _crop_share(edge: int, elongation: float, large_object: float, device: Device) -> float | None:
    """Returns a crop's share of height and width, or None if no crop is suitable.

    A crop must be large enough for the objects and small enough to save time.
    """
    most = math.sqrt(device.view_pixels / elongation) / edge
    share = round(min(_crop_side(large_object, device) / edge, most), 2)
    return (
        share if CONTEXT * large_object <= share * edge * 1.05 and share <= LARGEST_CROP else None
    )


def _scaled(facts: DataFacts, edge: int, crop: float | None, wanted: int) -> InputSize:
    # If there are only a few panoramas, they are scaled down to avoid exhausting memory.
    elongation = np.percentile(facts.elongations, 95).clip(USUAL_ELONGATION, MOST_ELONGATED)
    longest = math.ceil(edge * elongation / STEP) * STEP
    scale = np.minimum(edge / facts.short_sides, longest / facts.image_hw.max(axis=1))
    pixels = float((facts.image_hw.prod(axis=1) * scale**2).mean())
    object_scale = scale[facts.image_of]
    return InputSize(
        short_edge=edge,
        longest=longest,
        crop=crop,
        view_pixels=pixels * (crop or 1) ** 2,
        image_pixels=pixels,
        object_scale=object_scale,
        smallest=float(np.percentile(facts.object_sides * object_scale, 10)),
        wanted=wanted,
    )
