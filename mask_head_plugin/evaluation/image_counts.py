"""Counts the objects found in each image, and finds the images on which models differ most.

Shape alphabet: I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .matching import Matches

MIN_SCORE = 0.5
"""Lowest score of a detection that counts, by default."""
MOST_IMAGES = 8
"""Largest number of images that most_disputed returns, by default."""


@dataclass(frozen=True)
class ImageCounts:
    """Numbers of found objects, detections and all objects in each image, (I,) each, at IoU 0.5."""

    found: npt.NDArray[np.int64]
    detections: npt.NDArray[np.int64]
    objects: npt.NDArray[np.int64]

    @property
    def f1(self) -> npt.NDArray[np.float64]:
        """F1 of each image, (I,). It is 1 for images with neither objects nor detections."""
        total = self.detections + self.objects
        return np.where(total > 0, 2 * self.found / np.maximum(total, 1), 1.0)


def image_counts(matches: Matches, min_score: float = MIN_SCORE) -> ImageCounts:
    """Counts detections with at least ``min_score``, and the objects that they found, by image."""
    half = int(np.argmin(np.abs(matches.iou_thresholds - 0.5)))
    counted = ~matches.dt_ignored[0, half] & (matches.dt_score >= min_score)
    found = counted & matches.dt_matched[0, half]
    size = len(matches.image_ids)
    return ImageCounts(
        np.bincount(matches.dt_image[found], minlength=size),
        np.bincount(matches.dt_image[counted], minlength=size),
        np.bincount(matches.gt_image[~matches.gt_ignored[0]], minlength=size),
    )


def most_disputed(counts: Sequence[ImageCounts], most: int = MOST_IMAGES) -> list[int]:
    """Returns the images on which F1 differs most between variants, largest difference first.

    If the difference in F1 is the same, images are ordered by the difference in the number of found
    objects. Images on which all variants have the same F1 are left out, unless there is only one
    variant.
    """
    f1 = np.stack([c.f1 for c in counts])
    found = np.stack([c.found for c in counts])
    spread, spread_found = np.ptp(f1, axis=0), np.ptp(found, axis=0)
    order = np.lexsort((-spread_found, -spread))
    return [int(k) for k in order[:most] if len(counts) == 1 or spread[k] > 0]
