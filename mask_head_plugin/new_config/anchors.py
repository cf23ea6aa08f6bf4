"""Fits anchors to boxes with k-means. All sizes are in pixels of the model's input.

detectron2's anchors are all combinations of sizes and aspect ratios, so the two are clustered
separately. Clustering logarithms gives relative errors the same weight for small and large boxes.

Shape alphabet: R objects, S sizes, A aspect ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .data_facts import FloatArray, IntArray

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
SIZES_PER_LEVEL = 2
NUM_RATIOS = 3
COCO_SIZES, COCO_RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
SAMPLES = 4000
"""Approximate maximum number of boxes used for clustering."""
LEAST_STEP = 1.15
"""Smallest ratio of neighbouring values; with closer values, two anchors would almost be the same.
"""


@dataclass(frozen=True)
class Anchors:
    """Anchors of each level of a pyramid.

    Attributes:
        levels: names of the maps.
        sizes: sides in pixels for each level, ascending.
        ratios: height over width.
        covered: share of the boxes whose IoU with the best anchor at their centre is at least 0.5.
        covered_by_default: the same share for COCO's anchors.
    """

    levels: list[str]
    sizes: list[list[float]]
    ratios: list[float]
    covered: float
    covered_by_default: float


def choose_anchors(object_hw: FloatArray, class_of: IntArray) -> Anchors:
    """Returns anchors that are fitted to boxes.

    Each class is weighted by the square root of its number of boxes, so that a frequent class does
    not determine all anchors.

    Args:
        object_hw: (R, 2) heights and widths in pixels of the model's input.
        class_of: (R,) class of each object.
    """
    log_sides = np.log(object_hw.prod(axis=1)) / 2
    log_ratios = np.log(object_hw[:, 0] / object_hw[:, 1])
    sides = balanced_sample(log_sides, class_of)
    levels = _levels(*np.exp(np.percentile(sides, [2, 98])))
    centres = np.exp(clusters(sides, SIZES_PER_LEVEL * len(levels)))
    rounded = [round(side) if side >= 10 else round(side, 1) for side in centres.tolist()]
    sizes = [rounded[k : k + SIZES_PER_LEVEL] for k in range(0, len(rounded), SIZES_PER_LEVEL)]
    middles = np.exp(clusters(balanced_sample(log_ratios, class_of), NUM_RATIOS))
    ratios = [float(f"{ratio:.2g}") for ratio in middles]
    flat = [size for level in sizes for size in level]
    covered = covered_share(object_hw, flat, ratios)
    by_default = covered_share(object_hw, COCO_SIZES, COCO_RATIOS)
    return Anchors(levels, sizes, ratios, covered, by_default)


def balanced_sample(values: FloatArray, class_of: IntArray) -> FloatArray:
    """Returns a sample of the values in which frequent classes do not dominate.

    Each class is represented by quantiles of its values. Their number is proportional to the square
    root of the number of values.
    """
    counts = np.sqrt(np.bincount(class_of))
    wanted = np.ceil(counts / counts.sum() * min(SAMPLES, len(values))).astype(int)
    parts = [
        np.quantile(values[class_of == k], (np.arange(number) + 0.5) / number)
        for k, number in enumerate(wanted)
        if number
    ]
    sample: FloatArray = np.concatenate(parts)
    return sample


def clusters(values: FloatArray, number: int) -> FloatArray:
    """Returns the centres of one-dimensional k-means, ascending.

    If any two would be closer than LEAST_STEP, returns evenly spaced centres instead.

    Args:
        values: logarithms of sizes or ratios.
        number: number of centres.
    """
    lowest, highest = np.percentile(values, [2, 98])
    step = np.log(LEAST_STEP)
    missing = max(step * (number - 1) - (highest - lowest), 0)
    even: FloatArray = np.linspace(lowest - missing / 2, highest + missing / 2, number)
    if missing:
        return even
    order = np.argsort(values, kind="stable")
    labels = np.empty(len(values), np.int32)
    labels[order] = np.arange(len(values)) * number // len(values)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 100, 1e-4)
    data = values.astype(np.float32)[:, None]
    # Starts from quantiles, so that the same boxes always give the same anchors.
    _, _, found = cv2.kmeans(data, number, labels, stop, 1, cv2.KMEANS_USE_INITIAL_LABELS)
    centres: FloatArray = np.sort(found[:, 0].astype(float))
    return centres if np.diff(centres).min() >= step else even


def covered_share(object_hw: FloatArray, sizes: object, ratios: object) -> float:
    """Returns the share of the boxes whose IoU with some anchor at their centre is at least 0.5.

    Args:
        object_hw: (R, 2) heights and widths.
        sizes: (S,) sides.
        ratios: (A,) height over width.
    """
    grid = np.sqrt(np.asarray(ratios, float))[None, :], np.asarray(sizes, float)[:, None]
    anchor_hw = np.stack([grid[1] * grid[0], grid[1] / grid[0]], axis=-1).reshape(-1, 2)
    best = np.zeros(len(object_hw))
    areas = object_hw.prod(axis=1)
    for anchor in anchor_hw:
        shared = np.minimum(object_hw, anchor).prod(axis=1)
        best = np.maximum(best, shared / (areas + anchor.prod() - shared))
    return float((best >= 0.5).mean())


def _levels(small: float, large: float) -> list[str]:
    """Returns the maps on which objects with sides in this range span 3 to 16 cells."""
    names, strides = list(STRIDES), np.array(list(STRIDES.values()))
    top = min(int(np.searchsorted(12 * strides, large)), len(names) - 1)
    bottom = min(int(np.searchsorted(16 * strides, small, side="right")), top)
    return names[bottom : top + 1]
