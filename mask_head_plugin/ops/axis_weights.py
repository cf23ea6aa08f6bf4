"""RoI sampling along one axis, as small weight matrices.

ROIAlign averages bilinear samples on a regular grid in each bin. A bilinear sample at (y, x) is
``sum_i sum_j hat(y - i) hat(x - j) F[i, j]`` with ``hat(t) = max(0, 1 - |t|)``: a product of a
factor in y and a factor in x. The samples of a bin are all pairs of its y and x coordinates, so
their mean is a product too, and a whole RoI is ``Wy F Wx^T`` with

    W[p, i] = mean over the samples t of bin p of hat(t - i).

By hand: P = 1, a RoI from 1.0 to 3.0, two samples, pixel centres at integers (the shift of 0.5 is
done): samples at 1.5 and 2.5, hats (1/2, 1/2) on cells 1, 2 and on cells 2, 3, so W is
(1/4, 1/2, 1/4) on cells 1, 2, 3.

Border rule of torchvision and detectron2: a sample below -1 or above the size contributes 0;
otherwise it is clamped into [0, size - 1].

Shape alphabet: R RoIs, P pooled side, G samples per bin (of the RoI with most), L cells (of the RoI
that touches most).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_IMAGE_SIZES = 8
"""The adaptive sampling grid stops growing for RoIs longer than this many feature maps."""


@dataclass(frozen=True)
class AxisWeights:
    """Weights of R RoIs along one axis, over only the cells that each touches.

    Attributes:
        weights: (R, P, L); row r holds cells ``first[r]`` to ``first[r] + count[r] - 1``, zeros
            behind.
        first: the first cell that each RoI touches.
        count: how many it touches; 0 where no sample lies on the map.
    """

    weights: Tensor
    first: list[int]
    count: list[int]


def roi_align_weights(
    start: Tensor,
    end: Tensor,
    output_size: int,
    feature_size: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> AxisWeights:
    """Weights of ROIAlign along one axis (Mask R-CNN section 3).

    Args:
        start: (R,) lower box edges, in pixels of the network's input.
        end: (R,) upper box edges. Below ``start``: zeros with an adaptive grid, otherwise mirrored
            samples.
        output_size: P.
        feature_size: cells of the feature map along this axis, at least 1.
        spatial_scale: cells per pixel.
        sampling_ratio: G; 0 and below for ``ceil(RoI side / P)``, at most as much as a RoI of
            MAX_IMAGE_SIZES feature maps has.
        aligned: True shifts by half a cell (pixel centres at +0.5); False does not, and takes sides
            below one cell as one cell.

    Returns:
        AxisWeights of the dtype of ``start``. At R = 0 all parts are empty.
    """
    shift = 0.5 if aligned else 0.0
    start, end = start * spatial_scale - shift, end * spatial_scale - shift
    side = end - start if aligned else (end - start).clamp(min=1.0)
    low, high, fraction, share = _samples(start, side, output_size, feature_size, sampling_ratio)
    inside = share > 0
    first = torch.where(inside, low, feature_size).flatten(1).amin(1)
    last = torch.where(inside, high, -1).flatten(1).amax(1)
    count = (last - first + 1).clamp(min=0)
    num_cells = max(int(count.max()), 1) if len(count) else 1
    weights = start.new_zeros(len(start), output_size, num_cells)
    offset = first[:, None, None]
    for cell, part in ((low, (1 - fraction) * share), (high, fraction * share)):
        # Samples off the map have weight 0; their cell only has to be valid.
        weights.scatter_add_(2, (cell - offset).clamp(0, num_cells - 1), part)
    return AxisWeights(weights, first.tolist(), count.tolist())


def _samples(
    start: Tensor, side: Tensor, output_size: int, feature_size: int, sampling_ratio: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lays out the samples of RoIs given in cells, pixel centres at integers.

    Coordinates are computed in torchvision's order of operations: rounded otherwise, a sample next
    to -1 or to the map's size may fall on the other side of the jump to 0.

    Returns:
        Each (R, P, G): cell below, cell above, fraction between them, weight in the bin's mean.
    """
    bin_size = side / output_size
    if sampling_ratio > 0:
        grid = torch.full_like(side, sampling_ratio)
    else:
        limit = -(-MAX_IMAGE_SIZES * feature_size // output_size)
        grid = torch.ceil(bin_size).clamp(0, limit)
    num_samples = max(int(grid.max()), 1) if len(grid) else 1
    bins = torch.arange(output_size, dtype=side.dtype, device=side.device)[None, :, None]
    samples = torch.arange(num_samples, dtype=side.dtype, device=side.device)[None, None, :]
    bin_size, grid = bin_size[:, None, None], grid[:, None, None]
    t = start[:, None, None] + bins * bin_size + (samples + 0.5) * bin_size / grid.clamp(min=1)
    used = (samples < grid) & (t >= -1.0) & (t <= feature_size)
    # Off the map t does not matter, and may have overflowed.
    t = torch.where(used, t.clamp(0, feature_size - 1), 0)
    low = t.floor()
    high = (low + 1).clamp(max=feature_size - 1)
    return low.long(), high.long(), t - low, used / grid.clamp(min=1)
