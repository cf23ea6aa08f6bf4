"""Chooses the size at which a model sees images, from the sizes of the objects.

Shape alphabet: N images, R objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .data_facts import DataFacts, FloatArray
from .device import Device

SMALLEST = 16
"""Pixels that the side of all but the smallest tenth of objects should have: four cells of a map of
stride 4, and the M / 2 = 14 pixels that a mask of 28 x 28 is drawn from."""
MOST_MAGNIFIED = 4
CONTEXT = 3
"""How many times the side of a large object (the 90th percentile) a crop must have."""
LARGEST_CROP = 0.75
"""Largest crop, as a share of the image's side; larger ones save nothing."""
STEP = 32
USUAL_ELONGATION = 5 / 3
MOST_ELONGATED = 3.0
WHOLE_JITTER = (0.8, 0.85, 0.9, 0.95, 1.0)
"""Like detectron2's 640 to 800 pixels."""
CROP_JITTER = (0.8, 0.9, 1.0, 1.1, 1.2)


@dataclass(frozen=True)
class InputSize:
    """How images are scaled and cropped.

    Attributes:
        short_edge: that images are scaled to; 0 keeps their size.
        longest: limit of the longer side.
        crop: share of height and width that training sees, or pixels where ``short_edge`` is 0;
            None for whole images.
        view_pixels: pixels of an image that training sees, on average.
        image_pixels: pixels of a whole image in evaluation, on average.
        object_scale: (R,) pixels seen for each pixel of an object's image.
        smallest: side, in pixels seen, below which a tenth of the objects are.
        wanted: the short edge at which that would be SMALLEST, 0 if images need not be scaled.
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
        """INPUT.MIN_SIZE_TRAIN: those of a crop, where there is one, so that scales are kept."""
        if not self.short_edge:
            return [0]
        jitter = WHOLE_JITTER if self.crop is None else CROP_JITTER
        return [round(share * self.short_edge * (self.crop or 1)) for share in jitter]


def choose_input_size(facts: DataFacts, device: Device) -> InputSize:
    """Returns the size for a data set on a device.

    Images keep their size if it is large enough for the objects and small enough for the device,
    unless object sizes vary less relative to their images. Otherwise all get one short edge.

    Args:
        facts: of the training data.
        device: to train on.
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
    """Returns the share of height and width of a crop; None if none is small or large enough."""
    most = math.sqrt(device.view_pixels / elongation) / edge
    share = round(min(_crop_side(large_object, device) / edge, most), 2)
    return (
        share if CONTEXT * large_object <= share * edge * 1.05 and share <= LARGEST_CROP else None
    )


def _scaled(facts: DataFacts, edge: int, crop: float | None, wanted: int) -> InputSize:
    # A few panoramas among other images are scaled down, so that they do not fill the memory.
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
