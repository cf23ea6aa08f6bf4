"""Finds what four ways of RoI pooling read from a map by running the operators.

Each operator pools maps in which a single row or column is 1, which reveals the cells that the
operator reads. Sampling points come from ``ops.axis_weights``.

Positions are in cells. 0 is the outer edge of the first cell, so its centre is at 0.5.

Shape alphabet: P bins along an axis, G samples per bin and axis, H and W sides of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...ops import precise_roi_pool, roi_align, roi_pool, roi_warp
from ...ops.axis_weights import roi_align_samples, round_to_cells

FloatArray = npt.NDArray[np.float64]

BEYOND = 3
"""How many cells beyond the edge of a RoI an operator may read because of rounding."""

WAYS = ("RoIPool", "RoIWarp", "RoIAlign", "PrROIPool")
"""Ways of pooling, in the order in which they were published."""

ROUNDED = ("RoIPool", "RoIWarp")


@dataclass(frozen=True)
class AxisReads:
    """What one way of pooling reads along one axis.

    Attributes:
        start: lower edge of the RoI as used, possibly rounded.
        end: upper edge of the RoI as used.
        weights: (P, H or W) weight of each row or column in each bin. RoIPool, which takes a
            maximum, has weight 1 wherever it reads.
        samples: (P, G) sampling points, NaN outside the map; G is 0 if there are none.
        neighbours: (P, G, 2) cells that each point reads.
    """

    start: float
    end: float
    weights: FloatArray
    samples: FloatArray
    neighbours: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reads:
    """What one way of pooling reads from a map for one RoI."""

    way: str
    y: AxisReads
    x: AxisReads

    @property
    def box(self) -> FloatArray:
        """The RoI as used, possibly rounded: (4,) x0, y0, x1, y1."""
        return np.array([self.x.start, self.y.start, self.x.end, self.y.end])

    def bin_cells(self, row: int, column: int) -> FloatArray:
        """Returns the (H, W) weights of the cells that a bin reads."""
        return np.outer(self.y.weights[row], self.x.weights[column])

    def bin_centre(self, row: int, column: int) -> FloatArray:
        """Returns x and y of the weighted centre of the cells that a bin reads, (2,)."""
        middles = []
        for weights in (self.x.weights[column], self.y.weights[row]):
            centres = np.arange(len(weights)) + 0.5
            middles.append((weights * centres).sum() / max(weights.sum(), 1e-12))
        return np.array(middles)


def pooling_reads(
    way: str, box: FloatArray, map_hw: tuple[int, int], num_bins: int, sampling_ratio: int
) -> Reads:
    """Finds what one way of pooling reads.

    Args:
        way: one of WAYS.
        box: (4,) x0, y0, x1, y1 of the RoI.
        map_hw: H and W.
        num_bins: P.
        sampling_ratio: G of RoIWarp and RoIAlign; 0 for one sample per cell of a bin.
    """
    operators: dict[str, Callable[..., Tensor]] = {
        "RoIPool": roi_pool,
        "RoIWarp": partial(roi_warp, sampling_ratio=sampling_ratio),
        "RoIAlign": partial(roi_align, sampling_ratio=sampling_ratio, aligned=True),
        "PrROIPool": precise_roi_pool,
    }
    roi = torch.tensor([[0.0, *box]])
    by_axis = []
    for axis, (start, end, length) in enumerate(
        ((box[1], box[3], map_hw[0]), (box[0], box[2], map_hw[1]))
    ):
        lines = range(max(math.floor(start) - BEYOND, 0), min(math.ceil(end) + BEYOND, length))
        weights = np.zeros((num_bins, length))
        pooled = operators[way](_lit_lines(lines, axis, map_hw), roi, num_bins)[0]
        # Along the other axis, each bin reads a whole line with weights that add up to 1.
        weights[:, lines] = pooled.amax(2 - axis).T.numpy()
        edges = torch.tensor([start], dtype=torch.float32), torch.tensor([end], dtype=torch.float32)
        used = round_to_cells(*edges) if way in ROUNDED else edges
        samples, neighbours = np.empty((num_bins, 0)), np.empty((num_bins, 0, 2), np.int64)
        if way in ("RoIWarp", "RoIAlign"):
            table = roi_align_samples(*used, num_bins, length, sampling_ratio)
            # A sample's position relative to cell centres follows from its two cells' weights.
            place = (table.cell * table.weight).sum(3)[0] + 0.5
            samples = torch.where(table.inside[0], place, torch.nan).double().numpy()
            neighbours = table.cell[0].long().numpy()
        by_axis.append(AxisReads(float(used[0]), float(used[1]), weights, samples, neighbours))
    return Reads(way, *by_axis)


def _lit_lines(lines: range, axis: int, map_hw: tuple[int, int]) -> Tensor:
    """Returns a (1, C, H, W) map whose channel c is 1 in the c-th of ``lines`` and 0 elsewhere."""
    lit = torch.zeros(1, len(lines), *map_hw)
    for channel, line in enumerate(lines):
        lit[0, channel].select(axis, line).fill_(1)
    return lit
