"""RoI sampling along one axis: the cells that each bin reads, and their weights.

A bilinear sample of a map F at (y, x) is ``sum_i sum_j hat(y - i) hat(x - j) F[i, j]`` with
``hat(t) = max(0, 1 - |t|)``: a factor in y times a factor in x. The samples of a bin are all pairs
of its y and x coordinates, so their mean also separates into two factors, and so does the integral
over the bin. A whole RoI is ``Wy F Wx^T``, where each row of W contains the weights of one bin:

    RoIAlign    W[p, i] = mean of hat(t - i) over the samples t of bin p
    RoIWarp     the same as RoIAlign, but with edges rounded to cells
    PrROIPool   W[p, i] = integral of hat(t - i) over bin p, divided by its length

Edges are given in cells: 0 is the outer edge of the first cell, so its centre is at 0.5. The
functions below shift edges by 0.5 (unless ``aligned`` is False), which puts the centre of cell i
at i.

Example, after the shift: one bin from 1.0 to 3.0. RoIAlign with two samples places them at 1.5 and
2.5. Their weights are (1/2, 1/2) on cells 1, 2 and on cells 2, 3, so W is (1/4, 1/2, 1/4) on cells
1, 2, 3. For PrROIPool, the bin contains half of the hats of cells 1 and 3 (area 1/2 each) and the
entire hat of cell 2 (area 1). Divided by the length 2, W is again (1/4, 1/2, 1/4). For a bin from
1.0 to 2.0, both methods have the weights (1/2, 1/2) on cells 1, 2.

Border rule of torchvision and detectron2: a sample below -1 or above the number of cells L counts
as 0; any other sample is clamped to [0, L - 1]. PrROIPool follows the same rule: the map keeps its
border value from -1 to 0 and from L - 1 to L, and is 0 farther out.

Shape alphabet: R RoIs, P bins, G samples per bin (the maximum over all RoIs), V cells per sample, B
cells per bin (the maximum over all RoIs), L cells of the map along this axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_MAP_SIZES = 8
"""Length of a RoI, as a multiple of the map's side, above which the adaptive sampling grid stops
growing.
"""

MAX_CELL = 1 << 22
"""Largest distance of an edge from the map's origin, in cells. Edges are clamped to it before they
are rounded.
"""


@dataclass(frozen=True)
class AxisWeights:
    """The cells that the bins of R RoIs read along one axis, and their weights.

    Attributes:
        cell: (R, P, B) int32 in [0, L). Slots after a bin's last cell repeat one of its cells.
        weight: (R, P, B), 0 in the slots after a bin's last cell.
        count: (R,) number of slots that the RoI's largest bin uses; 0 if the RoI is off the map.
    """

    cell: Tensor
    weight: Tensor
    count: Tensor


@dataclass(frozen=True)
class AxisSamples:
    """The samples of the bins of R RoIs along one axis, each a weighted mean of V = 2 cells.

    Attributes:
        cell: (R, P, G, V) int32 in [0, L): the cells below and above a sample.
        weight: (R, P, G, V) in the dtype of the edges; sums to 1 over V.
        inside: (R, P, G) whether the sample exists and counts under the border rule.
        count: (R,) number of samples per bin of each RoI; 0 if no sample is on the map.
    """

    cell: Tensor
    weight: Tensor
    inside: Tensor
    count: Tensor


def roi_align_samples(
    start: Tensor,
    end: Tensor,
    num_bins: int,
    num_cells: int,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> AxisSamples:
    """Returns the samples of RoIAlign along one axis (Mask R-CNN section 3).

    The operations on coordinates have the same order as in torchvision. With different rounding, a
    sample close to -1 or L could be on the other side of the jump to 0.

    Args:
        start: (R,) lower edges, in cells.
        end: (R,) upper edges. If an upper edge is below its lower edge, an adaptive grid has no
            samples, and a fixed grid is mirrored.
        num_bins: P.
        num_cells: L, at least 1.
        sampling_ratio: G. 0 or less means ``ceil(RoI side / P)``. This number stops growing for
            RoIs that are longer than MAX_MAP_SIZES times the feature map.
        aligned: True shifts edges by half a cell (cell centres at +0.5). False does not shift them,
            and widens sides below one cell to one cell.
    """
    shift = 0.5 if aligned else 0.0
    start, end = start - shift, end - shift
    side = end - start if aligned else (end - start).clamp(min=1.0)
    bin_size = side / num_bins
    if sampling_ratio > 0:
        grid = torch.full_like(side, sampling_ratio)
    else:
        grid = torch.ceil(bin_size).clamp(0, -(-MAX_MAP_SIZES * num_cells // num_bins))
    num_samples = max(int(grid.max()), 1) if len(grid) else 1
    bins = torch.arange(num_bins, dtype=side.dtype, device=side.device)[:, None]
    samples = torch.arange(num_samples, dtype=side.dtype, device=side.device)
    bin_size, steps = bin_size[:, None, None], grid.clamp(min=1)[:, None, None]
    t = start[:, None, None] + bins * bin_size + (samples + 0.5) * bin_size / steps
    inside = (samples < grid[:, None, None]) & (t >= -1.0) & (t <= num_cells)
    # Off the map, t is not used, and it may have overflowed.
    t = torch.where(inside, t.clamp(0, num_cells - 1), 0)
    low = t.floor()
    count = torch.where(inside.flatten(1).any(dim=1), grid, 0).int()
    fraction = t - low
    cell = torch.stack([low, (low + 1).clamp(max=num_cells - 1)], dim=3).int()
    return AxisSamples(cell, torch.stack([1 - fraction, fraction], dim=3), inside, count)


def roi_align_weights(
    start: Tensor,
    end: Tensor,
    num_bins: int,
    num_cells: int,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> AxisWeights:
    """Returns the weights of RoIAlign along one axis: the mean over the samples of each bin.

    Args: see roi_align_samples.
    """
    samples = roi_align_samples(start, end, num_bins, num_cells, sampling_ratio, aligned)
    cell, inside, grid = samples.cell, samples.inside[..., None], samples.count
    first = torch.where(inside, cell, num_cells).flatten(2).amin(2)
    last = torch.where(inside, cell, -1).flatten(2).amax(2)
    window = (last - first + 1).clamp(min=0).amax(1)
    # Samples less than a cell apart share cells, so each cell from first to last gets a slot.
    # Samples far apart leave gaps, so each cell of each sample gets a slot.
    dense = window <= 2 * grid
    count = torch.where(dense, window, 2 * grid)
    num_slots = max(int(count.max()), 1) if len(count) else 1
    first = first.clamp(max=num_cells - 1)
    cell = torch.where(inside, cell, first[:, :, None, None]).flatten(2)
    own_slot = torch.arange(cell.shape[2], dtype=cell.dtype, device=cell.device)
    slot = torch.where(dense[:, None, None], cell - first[:, :, None], own_slot).long()
    share = samples.weight * inside / grid.clamp(min=1)[:, None, None, None]
    cells = first[:, :, None].repeat(1, 1, num_slots).scatter_(2, slot, cell)
    weights = share.new_zeros(cells.shape).scatter_add_(2, slot, share.flatten(2))
    return AxisWeights(cells, weights, count)


def precise_roi_pool_weights(
    start: Tensor, end: Tensor, num_bins: int, num_cells: int, aligned: bool = True
) -> AxisWeights:
    """Returns PrROIPool's weights along one axis (arXiv 1807.11590), differentiable in the edges.

    RoIAlign's weights converge to these weights if the sampling ratio goes to infinity. As with a
    fixed sampling ratio, a RoI that ends before it starts is mirrored, and a bin of length 0 reads
    the map at a single point.

    Edges are compared with cells in float64. Everything else is computed relative to a bin's first
    cell, where float32 is precise enough. If the edges need a gradient, everything is computed in
    float64, because the gradient divides by the length of a bin.

    Args: see roi_align_samples.
    """
    shift, dtype = 0.5 if aligned else 0.0, start.dtype
    work = torch.float64 if start.requires_grad or end.requires_grad else dtype
    start, end = start.double() - shift, end.double() - shift
    side = end - start if aligned else (end - start).clamp(min=1.0)
    bins = torch.arange(num_bins + 1, dtype=side.dtype, device=side.device)
    edges = start[:, None] + bins * (side / num_bins)[:, None]
    low = torch.minimum(edges[:, :-1], edges[:, 1:])[:, :, None]
    high = torch.maximum(edges[:, :-1], edges[:, 1:])[:, :, None]
    inside = (high >= -1) & (low <= num_cells)
    first = low.detach().clamp(0, num_cells - 1).floor()
    last = high.detach().clamp(0, num_cells - 1).ceil()
    count = torch.where(inside, last - first + 1, 0).flatten(1).amax(1).int()
    num_slots = max(int(count.max()), 1) if len(count) else 1
    low, high = (low - first).to(work), (high - first).to(work)
    length = high - low
    border = (-1 - first).to(work), (num_cells - first).to(work)
    low, high = low.clamp(*border), high.clamp(*border)
    i = torch.arange(num_slots, dtype=work, device=low.device)
    cell = first.int() + i.int()
    # The hat of a cell rises over [i - 1, i] and falls over [i, i + 1], except at the border, where
    # it stays at 1. Each side is linear, so its integral is the length times the value at the
    # midpoint.
    rising = low.clamp(i - 1, i), high.clamp(i - 1, i)
    falling = low.clamp(i, i + 1), high.clamp(i, i + 1)
    rise = torch.where(cell == 0, 1.0, (rising[0] + rising[1]) / 2 - (i - 1))
    fall = torch.where(cell == num_cells - 1, 1.0, (i + 1) - (falling[0] + falling[1]) / 2)
    integral = (rising[1] - rising[0]) * rise + (falling[1] - falling[0]) * fall
    mean = integral / torch.where(length > 0, length, 1.0)
    weight = torch.where(length > 0, mean, rise * fall)
    used = inside & (cell <= last)
    cell = torch.minimum(cell, last.int())
    return AxisWeights(cell, torch.where(used, weight, 0.0).to(dtype), count)


def round_to_cells(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes RoIs as in RoIPool (Fast R-CNN and torchvision's roi_pool).

    Both edges are rounded half away from zero, and the RoI includes the cell of its upper edge. A
    RoI has at least one cell, even if it ends before it starts.

    Args:
        start: (R,) lower edges, in cells.
        end: (R,) upper edges, in cells.

    Returns:
        The outer edges of the first and the last cell: whole numbers, at least 1 apart. Edges
        beyond MAX_CELL are clamped to it.
    """
    start, end = (_round(edge.clamp(-MAX_CELL, MAX_CELL)) for edge in (start, end))
    return start, torch.maximum(start, end) + 1


def _round(x: Tensor) -> Tensor:
    """Rounds half away from zero, like C's round. torch.round would round half to even."""
    whole = x.abs().floor()  # not trunc, which ONNX does not have
    return torch.where(x.abs() - whole >= 0.5, whole + 1, whole) * torch.sign(x)
