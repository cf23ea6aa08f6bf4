"""The cells that the bins of RoIs read from a feature map, grouped into RoIs of similar size.

Shape alphabet: see roi_pooling.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .axis_weights import MAX_MAP_SIZES, AxisSamples, AxisWeights

PIECE = (1 << 15) - 1
"""Largest number of elements that a PyTorch operator processes on a single thread."""

MAX_COPY = 9 << 19
"""Largest number of elements of a map that are copied at a time: 18 MB of float32. The allocator
reuses the memory of two copies of this size. Memory for larger copies would come from the system,
which takes longer than copying.
"""

Axis = Callable[[Tensor, Tensor, int, int], AxisWeights | AxisSamples]


@dataclass(frozen=True, eq=False)
class Part:
    """r RoIs of similar size that are pooled from the same view (all or some images of a map)."""

    view: int  # index in the result of views
    rows: Tensor  # (r,) indices among all RoIs
    y: Any  # AxisWeights or AxisSamples; cells along y are row starts in the table of cells
    x: Any

    @property
    def num_bins(self) -> int:
        """Number of bins per RoI, P Q."""
        return int(self.y.cell.shape[1] * self.x.cell.shape[1])

    @cached_property
    def off_map(self) -> tuple[Tensor, Tensor] | None:
        """Whether all weights of a bin are 0: (r, P) along y and (r, Q) along x.

        None if there is no such bin.
        """
        y, x = ((axis.weight == 0).all(dim=2) for axis in (self.y, self.x))
        return (y, x) if y.any() or x.any() else None


class Block(NamedTuple):
    """n RoIs of a part whose bins have about the same number of cells or samples."""

    part: Part
    places: Tensor  # (n,) indices within the part
    y_slots: int  # number of slots per bin along each axis; both are 0 if the RoIs are off the map
    x_slots: int

    @property
    def rows(self) -> Tensor:
        """(n,) indices among all RoIs."""
        return self.part.rows[self.places]

    @property
    def num_bins(self) -> int:
        """Number of bins of all RoIs in the block, n P Q."""
        return len(self.places) * self.part.num_bins

    @property
    def slots(self) -> int:
        """Number of cells or samples per bin, Ky Kx."""
        return self.y_slots * self.x_slots


def lay_out(
    maps: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    axis: Axis,
    num_samples: int,
) -> list[Part]:
    """Computes weights or samples along both axes, split into parts of RoIs of similar size.

    Args:
        maps: L feature maps.
        rois: (R, 5).
        levels: (R,) the map of each RoI.
        scales: cells per pixel of each map.
        output_size: (P, Q).
        axis: returns weights or samples, given the edges in cells, the number of bins and the
            number of cells.
        num_samples: samples per bin and axis of a RoI whose bins are smaller than a cell.
    """
    parts, image = [], rois[:, 0].int()
    for view, (level, images) in enumerate(views(maps)):
        height, width = maps[level].shape[2:]
        here = (levels == level) & (image >= images.start) & (image < images.stop)
        rows = torch.nonzero(here)[:, 0]
        boxes = rois[rows, 1:] * scales[level]
        first_row = (image[rows] - images.start) * height
        # Longer side in cells. Clamped because the adaptive grid does not grow for larger RoIs.
        spans = (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(0, MAX_MAP_SIZES * max(height, width))
        entries = 2 * (spans + max(output_size) * num_samples)
        for index in _split_by_size(entries):
            x0, y0, x1, y1 = boxes[index].unbind(1)
            y, x = axis(y0, y1, output_size[0], height), axis(x0, x1, output_size[1], width)
            row = first_row[index].view(-1, *[1] * (y.cell.dim() - 1))
            y = dataclasses.replace(y, cell=(row + y.cell) * width)
            parts.append(Part(view, rows[index], y, x))
    return parts


def _split_by_size(entries: Tensor) -> Iterator[Tensor]:
    """Yields the indices of each part, largest RoIs first.

    RoIs of similar size belong together because every RoI of a part takes as much space as the
    largest one.

    Args:
        entries: (r,) number of samples and cells along the longer axis.
    """
    entries, order = entries.sort(descending=True, stable=True)
    steps, start = (PIECE // entries).clamp(min=1).tolist(), 0
    while start < len(order):
        step = int(steps[start])
        yield order[start : start + step]
        start += step


def split_into_blocks(parts: Sequence[Part], max_entries: int) -> list[Block]:
    """Groups RoIs that use about the same number of slots per bin.

    Args:
        parts: the parts of all maps.
        max_entries: largest number of entries in a block; a block of one RoI can have more.
    """
    blocks = []
    for part in parts:
        places = defaultdict(list)
        for place, slots in enumerate(zip(_slots(part.y), _slots(part.x), strict=True)):
            places[slots if all(slots) else (0, 0)].append(place)
        for (y_slots, x_slots), index in sorted(places.items()):
            step = max(max_entries // max(part.num_bins * y_slots * x_slots, 1), 1)
            for piece in torch.tensor(index, device=part.rows.device).split(step):
                blocks.append(Block(part, piece, y_slots, x_slots))
    return blocks


def _slots(axis: AxisWeights | AxisSamples) -> list[int]:
    """Returns the number of slots per bin of each RoI, rounded up to 0, 1, 2, 3, 4, 6, 8, 12, …"""
    mantissa, exponent = torch.frexp(axis.count.float())
    slots = torch.ldexp((mantissa * 4).ceil() / 4, exponent)
    rounded: list[int] = slots.clamp(max=axis.cell.shape[2]).int().tolist()
    return rounded


def over_y(x: Tensor) -> Tensor:
    """(n, P, K, ...) -> (n, P, 1, K, 1, ...)"""
    return x[:, :, None, :, None]


def over_x(x: Tensor) -> Tensor:
    """(n, Q, K, ...) -> (n, 1, Q, 1, K, ...)"""
    return x[:, None, :, None, :]


def sum_type(feature: Tensor) -> torch.dtype:
    """Returns the dtype for sums: at least float32, because half precision would round each sum."""
    return torch.promote_types(feature.dtype, torch.float32)


def is_copied(feature: Tensor) -> bool:
    """Returns whether as_table has to copy this map."""
    last = feature.is_contiguous(memory_format=torch.channels_last)
    return not last or feature.dtype != sum_type(feature)


def views(maps: Sequence[Tensor]) -> list[tuple[int, slice]]:
    """Splits maps into views to pool from.

    A view is an entire map or, if the map must be copied, a few of its images.

    Returns:
        For each view, the index of its map and the range of its images.
    """
    cut = []
    for level, feature in enumerate(maps):
        step = num_images = len(feature)
        if is_copied(feature):
            step = max(MAX_COPY // feature.shape[1:].numel(), 1)
        for first in range(0, num_images, step):
            cut.append((level, slice(first, min(first + step, num_images))))
    return cut


def channel_blocks(feature: Tensor) -> list[slice]:
    """Splits the channels of a view into blocks that are copied one at a time.

    Block sizes are multiples of a cache line of 16 float32. If a view does not have to be split,
    all channels are in one block.

    Args:
        feature: the view; a single image if it must be split.
    """
    step = num_channels = feature.shape[1]
    if is_copied(feature) and feature.numel() > MAX_COPY:
        step = max(MAX_COPY // feature.shape[2:].numel() // 16 * 16, 16)
    return [slice(k, min(k + step, num_channels)) for k in range(0, num_channels, step)]


def as_table(feature: Tensor) -> Tensor:
    """Returns a map as a table of cells, (N H W, C). It is a copy if ``is_copied(feature)``."""
    feature = feature.to(sum_type(feature))
    if is_copied(feature):
        return transposed(feature.flatten(2)).flatten(0, 1)
    return feature.permute(0, 2, 3, 1).flatten(0, 2)


def transposed(matrices: Tensor) -> Tensor:
    """Returns a contiguous, transposed copy (n, b, a) of matrices (n, a, b).

    Each matrix is passed to channel_shuffle as one pixel of a channels-last image. channel_shuffle
    copies in blocks, which is faster on one thread than ``contiguous`` on two.
    """
    num_matrices, a, b = matrices.shape
    pixels = matrices.contiguous().flatten(1)[:, None, None].permute(0, 3, 1, 2)
    return torch.channel_shuffle(pixels, a).view(num_matrices, b, a)
