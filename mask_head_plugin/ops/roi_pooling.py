"""RoI pooling as a sparse matrix product: every bin is a weighted sum of a few cells.

Sampling on a RoI is separable (see axis_weights): the weight of cell (y, x) in bin (p, q) is
``Wy[p, y] Wx[q, x]``. Samples that share cells are merged along each axis before the map is read,
so a bin of 4 x 4 cells reads each cell once, regardless of the number of samples. The product is
computed by ``embedding_bag``, with the channels-last map as the table and each bin as a bag. On
x86, this is a vectorized kernel (FBGEMM) that uses all threads. The backward pass is a product with
the transposed matrix, in which each cell is a bag. It therefore adds in a fixed order and writes
each cell once. Measurements showed that these alternatives are slower: two dense products per RoI,
one RoI at a time or in batches; a sparse CSR matrix; the backward pass of embedding_bag.

The functions call few operators, each on large tensors. PyTorch splits each operator over all
threads. If another process is busy, one delayed thread therefore makes the others wait for about
8 ms per operator.

A channels-last map of float32 or float64 needs one product, which is split only if the number of
matrix entries or bins is large (see bin_sums.LIST_ENTRIES and bin_sums.MAX_BATCHES). Other maps are
copied first. A large map is copied in parts (a few images or, if one image is too large, a block of
channels), and each part needs a separate product. The matrix is built in pieces of bin_layout.PIECE
entries, which PyTorch processes on one thread. Each image is also copied on one thread.

``reduction="max"`` needs the individual samples, so it computes them in groups. RoIPool uses
torchvision's operator.

All functions run on any device and are deterministic (maxima on CUDA only with
torch.use_deterministic_algorithms). In addition to the result, they need memory for:

- lists of about bin_sums.LIST_ENTRIES cells and weights;
- copies of bin_layout.MAX_COPY elements of a map that is not channels-last or has half precision
  (for maxima, copies of at least one complete image);
- bin_sums.BATCH_ELEMENTS elements of bins (more for large results, see bin_sums.MAX_BATCHES);
- for maxima, up to twice bin_maxima.GROUP_ELEMENTS elements of samples. If a RoI has more samples
  than that, they are in memory for one channel at a time.

Shape alphabet: N images, C channels, H and W sides of a feature map, L feature maps, R RoIs (r in a
part, n in a block or matrix), P and Q pooled height and width, K slots for the cells of a bin along
one axis (Ky, Kx), E entries of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .axis_weights import (
    MAX_CELL,
    AxisSamples,
    AxisWeights,
    precise_roi_pool_weights,
    roi_align_samples,
    roi_align_weights,
    round_to_cells,
)
from .bin_layout import Axis, lay_out
from .bin_maxima import LargestCell, Maximum
from .bin_sums import WeightedSum


def roi_align(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    reduction: str = "mean",
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """RoIAlign (Mask R-CNN section 3): bilinear samples in each bin, without any rounding.

    With ``reduction="mean"``, the result equals ``torchvision.ops.roi_align`` up to rounding.
    Differs from torchvision in three ways: ``aligned`` has a different default, RoIs that end
    before they start are not an error, and the adaptive grid, and therefore the memory needed,
    stops growing for RoIs longer than axis_weights.MAX_MAP_SIZES times the map.

    Args:
        features: (N, C, H, W), or a list of L such maps that differ in H and W. A channels_last map
            of float32 or float64 is read without a copy; float16 and bfloat16 are computed in
            float32.
        rois: (R, 5): image index, x0, y0, x1, y1 in pixels of the model's input.
        output_size: P, or (height, width).
        spatial_scale: cells per pixel, for each map.
        sampling_ratio: samples per bin and axis; 0 or less means ``ceil(RoI side / P)``. The paper
            uses 2, which is four samples per bin.
        aligned: True puts pixel centres at +0.5 (detectron2's ROIAlignV2). False is Detectron's
            RoIAlign, which widens sides below one cell to one cell.
        reduction: ``mean`` or ``max`` of the samples in a bin (Table 2c). Samples off the map count
            as 0 in the mean and are ignored by the maximum. The value of a bin without samples is
            0.
        levels: (R,) integers in [0, L): the map that each RoI is pooled from; required if L > 1.

    Returns:
        (R, C, P, P) in the dtype of ``features`` and in channels_last layout, differentiable in
        ``features``.

    Raises:
        ValueError: if a shape is wrong, a coordinate is NaN or infinite, an image index is not in
            [0, N), a level is not in [0, L), or ``reduction`` is unknown.
    """
    function, axis = _reducer(reduction)
    axis = partial(axis, sampling_ratio=sampling_ratio, aligned=aligned)
    arguments = (features, rois.detach(), output_size, spatial_scale, levels, function, axis)
    return _pool(*arguments, sampling_ratio)


def roi_warp(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int = 0,
    reduction: str = "mean",
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """RoIWarp as described in Mask R-CNN section 3: bilinear samples in a quantized RoI.

    The RoI is quantized as in RoIPool: edges are rounded half away from zero, the cell of the upper
    edge is included, and there is at least one cell (axis_weights.round_to_cells; Fast R-CNN).
    Within the RoI, samples are placed as in ``roi_align(aligned=True)``, with cell centres at +0.5.
    With one sample per bin, the result for a RoI of P x P cells is therefore exactly these cells,
    as in RoIPool.

    Differs from the formula in the paper that introduced RoIWarp (Instance-aware Semantic
    Segmentation via Multi-task Network Cascades, arXiv 1512.04412), which does not quantize. The
    code released with that paper does round the RoI. However, it includes the upper cell only in
    its backward pass, and takes one sample at a bin's corner, with cell centres at whole numbers.
    As in that code, the maximum ignores samples off the map.

    Args and Returns: see roi_align.
    """
    function, align = _reducer(reduction)

    def axis(start: Tensor, end: Tensor, bins: int, cells: int) -> AxisWeights | AxisSamples:
        return align(*round_to_cells(start, end), bins, cells, sampling_ratio)

    arguments = (features, rois.detach(), output_size, spatial_scale, levels, function, axis)
    return _pool(*arguments, sampling_ratio)


def precise_roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float] = 1.0,
    aligned: bool = True,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """PrROIPool (arXiv 1807.11590): the exact mean of the bilinear surface over each bin.

    This is the limit of ``roi_align`` as ``sampling_ratio`` goes to infinity. Differs from the
    original implementation in three ways. The original has no ``aligned``. At the border, this
    function follows the rule of ``roi_align``, whereas the original treats the map as 0 from one
    cell beyond the centres of its border cells. For a bin without area, this function returns the
    map's value at the bin's position, whereas the original returns 0.

    Args: see roi_align.

    Returns:
        (R, C, P, P) in the dtype of ``features`` and in channels_last layout, differentiable in
        ``features`` and in the coordinates in ``rois``.
    """
    axis = partial(precise_roi_pool_weights, aligned=aligned)
    return _pool(features, rois, output_size, spatial_scale, levels, WeightedSum, axis)


def roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float] = 1.0,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """RoIPool (Fast R-CNN section 2.1): the maximum of the cells in each bin of a quantized RoI.

    Runs the forward pass of ``torchvision.ops.roi_pool``, in which NaN is never the maximum.
    Differs from torchvision in three ways: the gradient on CUDA is deterministic under
    torch.use_deterministic_algorithms, half precision is pooled in float32, and edges beyond
    axis_weights.MAX_CELL cells are clamped.

    Args: see roi_align.

    Returns:
        (R, C, P, P) in the dtype of ``features``, differentiable in ``features``.
    """
    maps, rois, levels, scales, size = _check(features, rois, output_size, spatial_scale, levels)
    limit = MAX_CELL / max(scales)
    rois = torch.cat([rois[:, :1], rois[:, 1:].detach().clamp(-limit, limit)], dim=1)
    pooled: Tensor = LargestCell.apply(
        rois, levels, scales, size, *(x.to(rois.dtype) for x in maps)
    )
    return pooled.to(maps[0].dtype)


def _reducer(reduction: str) -> tuple[type[torch.autograd.Function], Callable[..., Any]]:
    if reduction not in ("mean", "max"):
        raise ValueError(f"reduction must be 'mean' or 'max', not {reduction!r}")
    if reduction == "mean":
        return WeightedSum, roi_align_weights
    return Maximum, roi_align_samples


def _pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    levels: Tensor | None,
    function: Any,
    axis: Axis,
    sampling_ratio: int = 0,
) -> Tensor:
    maps, rois, levels, scales, size = _check(features, rois, output_size, spatial_scale, levels)
    if len(rois) == 0:  # expanded views keep the result in the graph without reading the maps
        return torch.cat([x[:0, :, :1, :1].expand(-1, -1, *size) for x in maps])
    parts = lay_out(maps, rois, levels, scales, size, axis, max(sampling_ratio, 2))
    # Weights are passed as separate inputs so that they can get a gradient.
    weights = [axis.weight for part in parts for axis in (part.y, part.x)]
    pooled: Tensor = function.apply(parts, len(rois), len(maps), *maps, *weights)
    return pooled.unflatten(1, size).permute(0, 3, 1, 2)


def _check(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    levels: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor, list[float], tuple[int, int]]:
    """Returns maps, RoIs in the dtype used for computation, levels, scales and (P, Q).

    Raises:
        ValueError: if the inputs are invalid or do not match each other.
    """
    maps = [features] if isinstance(features, Tensor) else list(features)
    scales = [spatial_scale] if isinstance(spatial_scale, int | float) else list(spatial_scale)
    height, width = (output_size,) * 2 if isinstance(output_size, int) else output_size
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise ValueError(f"output_size must be one or two positive integers, not {output_size}")
    if len(maps) != len(scales) or not maps:
        raise ValueError(f"got {len(scales)} spatial scales for {len(maps)} feature maps")
    if not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"spatial scales must be finite and above 0, not {scales}")
    first = maps[0]
    for x in maps:
        if x.dim() != 4 or not x.is_floating_point() or 0 in x.shape[1:]:
            raise ValueError(
                f"features must be non-empty floating-point (N, C, H, W), not {x.dtype} "
                f"{tuple(x.shape)}"
            )
        if x.shape[:2] != first.shape[:2] or x.dtype != first.dtype:
            raise ValueError(
                f"feature maps differ in N, C or type: {first.dtype} {tuple(first.shape)}, "
                f"{x.dtype} {tuple(x.shape)}"
            )
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must be (R, 5): image, x0, y0, x1, y1; not {tuple(rois.shape)}")
    rois = rois.to(torch.promote_types(first.dtype, torch.float32))
    bad = len(rois) - int(torch.isfinite(rois.detach() * max(scales)).all(dim=1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(rois)} RoIs have NaN or infinite coordinates")
    if len(rois) and not 0 <= int(rois[:, 0].min()) <= int(rois[:, 0].max()) < len(first):
        raise ValueError(f"image indices of the RoIs are not all in [0, {len(first)})")
    if levels is None and len(maps) == 1:
        levels = torch.zeros(len(rois), dtype=torch.int32, device=rois.device)
    if levels is None or levels.shape != rois.shape[:1]:
        raise ValueError(
            f"{len(maps)} feature maps need levels of shape ({len(rois)},), not "
            f"{None if levels is None else tuple(levels.shape)}"
        )
    if levels.is_floating_point():
        raise ValueError(f"levels must be integers, not {levels.dtype}")
    if len(rois) and not 0 <= int(levels.min()) <= int(levels.max()) < len(maps):
        raise ValueError(f"levels are not all in [0, {len(maps)})")
    return maps, rois, levels, scales, (height, width)
