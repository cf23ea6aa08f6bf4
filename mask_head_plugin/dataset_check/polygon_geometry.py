"""Geometry of a mask's polygons: bounding boxes, areas, and which polygons lie inside others.

Shape alphabet: P points of a polygon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""


SOME_POINTS = 16
"""Number of points that are enough to decide whether a polygon lies inside another."""


class Outline(NamedTuple):
    """A valid polygon: its bounding box and its area."""

    box: Box
    area: float


def outline(polygon: Any) -> Outline | None:
    """Returns the outline of a list or array of coordinates; None if not all are finite."""
    try:
        points = _points(polygon)
    except OverflowError:
        return None
    x0, y0 = points.min(0).tolist()
    x1, y1 = points.max(0).tolist()
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        return None
    x, y = points[:, 0] - x0, points[:, 1] - y0
    with np.errstate(over="ignore", invalid="ignore"):  # coordinates may be as large as 1e200
        # The shoelace formula.
        double = x[:-1] @ y[1:] - x[1:] @ y[:-1] + x[-1] * y[0] - x[0] * y[-1]
    return Outline((x0, y0, x1, y1), abs(float(double)) / 2)


def around(boxes: Sequence[Box]) -> Box:
    """Returns the bounding box of several boxes."""
    if len(boxes) == 1:
        return boxes[0]
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def areas(polygons: Sequence[Any], outlines: Sequence[Outline]) -> tuple[float, float]:
    """Returns two areas of a mask in pixels: filled, as in detectron2, and hollow.

    For the hollow area, a polygon inside another is a hole, and a polygon inside a hole is filled.
    Without nesting, both areas are the sum over the polygons; overlapping parts count twice.

    Args:
        polygons: coordinates of each polygon.
        outlines: outlines of the same polygons.
    """
    total = sum(x.area for x in outlines)
    if len(outlines) == 1:
        return total, total
    depths = _depths(polygons, outlines)
    if not any(depths):
        return total, total
    hollow = sum((-1) ** depth * x.area for depth, x in zip(depths, outlines, strict=True))
    filled = sum(x.area for depth, x in zip(depths, outlines, strict=True) if depth == 0)
    return filled, hollow


def _depths(polygons: Sequence[Any], outlines: Sequence[Outline]) -> list[int]:
    """Returns, for each polygon, the number of polygons that contain it."""
    x0, y0, x1, y1 = np.array([x.box for x in outlines]).T
    sizes = np.array([x.area for x in outlines])
    # [k, j]: whether the box of polygon k lies inside the box of polygon j.
    boxed = (x0[:, None] >= x0) & (y0[:, None] >= y0) & (x1[:, None] <= x1) & (y1[:, None] <= y1)
    depths = [0] * len(polygons)
    for k, j in np.argwhere(boxed & (sizes[:, None] < sizes)).tolist():
        depths[k] += _lies_within(_points(polygons[k]), _points(polygons[j]))
    return depths


def _lies_within(inner: Points, outer: Points) -> bool:
    """Returns whether most points of a polygon lie inside another; a few may lie on its edge."""
    some = inner[:: max(1, len(inner) // SOME_POINTS)]
    return bool(np.mean([_is_inside(point, outer) for point in some]) > 0.5)


def _is_inside(point: Points, polygon: Points) -> bool:
    """Returns whether a point (2,) lies inside a polygon (P, 2).

    This is the case if a ray from the point crosses the polygon's edges an odd number of times.
    """
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
    x, y = point
    crossed = (y0 > y) != (y1 > y)
    at = x0[crossed] + (y - y0[crossed]) / (y1 - y0)[crossed] * (x1 - x0)[crossed]
    return bool(np.count_nonzero(at > x) % 2)


def _points(polygon: Any) -> Points:
    return np.asarray(polygon, np.float64).reshape(-1, 2)
