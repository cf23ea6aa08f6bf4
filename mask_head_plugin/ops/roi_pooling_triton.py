"""ROIAlign from all feature maps of a pyramid in one CUDA kernel, forward and backward.

torchvision's operator pools from one map, so detectron2 runs it once per level and waits for the
device each time to learn how many RoIs a level has. Here every RoI looks up the address, shape and
strides of its map in a small table, so one launch serves all levels and nothing waits. Sums are
kept in float32 whatever the type of the maps. Channels run along the threads: channels_last maps
are read in whole cache lines; other strides work too.

A program of the grid handles one row of bins of one RoI, for a block of channels. Backward adds
into the gradients with atomics, so its sums may differ in the last bits from run to run.

Sample coordinates and the border rule are those of ops.axis_weights (torchvision's).

Shape alphabet: N images, C channels, L feature maps, Hi and Wi the sides of map i, R RoIs, P and Q
pooled height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .axis_weights import MAX_MAP_SIZES

_TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

MAX_BLOCK_CHANNELS = 128
"""Channels of one program: a warp's 32 threads with 4 channels each."""

COMPILER_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
"""Without fusion, sample coordinates are rounded as in axis_weights."""

_MAX_MAP_SIZES = tl.constexpr(MAX_MAP_SIZES)

# Columns of the table of maps.
_ADDRESS, _HEIGHT, _WIDTH, _STRIDE_N, _STRIDE_C, _STRIDE_Y, _STRIDE_X = map(tl.constexpr, range(7))
_NUM_COLUMNS = tl.constexpr(7)


def multilevel_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """ROIAlign of each RoI from its own map; equal to ops.roi_align up to rounding.

    Nothing here looks at values, so it does not wait for the device: coordinates must be finite,
    image indices in [0, N) and levels in [0, L). RoIs get no gradient.

    Args:
        features: L maps (N, C, Hi, Wi) of float32, float16 or bfloat16, with any strides.
        rois: (R, 5): image index, x0, y0, x1, y1 in pixels of the network's input.
        levels: (R,) integers in [0, L).
        output_size: (P, Q).
        spatial_scales: cells per pixel of each map.
        sampling_ratio: samples per bin and axis; 0 and below for ``ceil(RoI side / P)``.
        aligned: True puts pixel centres at +0.5; False does not, and takes sides below one cell as
            one cell.

    Returns:
        (R, C, P, Q) of the type of ``features`` in channels_last layout, with a gradient to them.

    Raises:
        ValueError: if types, devices or shapes are not as above.
    """
    first = features[0]
    for x in features:
        alike = x.dtype == first.dtype and x.device == rois.device == levels.device
        if not alike or x.dtype not in _TRITON_TYPES or x.shape[:2] != first.shape[:2]:
            raise ValueError(
                "feature maps must agree in N, C, type (float32, float16, bfloat16) and device "
                f"(that of rois and levels), not {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    if rois.dim() != 2 or rois.shape[1] != 5 or levels.shape != rois.shape[:1]:
        raise ValueError(
            f"rois must be (R, 5) and levels (R,), not {tuple(rois.shape)}, {tuple(levels.shape)}"
        )
    options = (output_size, max(sampling_ratio, 0), aligned)
    pooled: Tensor = _MultiLevelRoIAlign.apply(
        rois.detach().float().contiguous(),
        levels.int().contiguous(),
        tuple(spatial_scales),
        options,
        *features,
    )
    return pooled


class _MultiLevelRoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rois: Tensor,
        levels: Tensor,
        scales: tuple[float, ...],
        options: tuple[tuple[int, int], int, bool],
        *features: Tensor,
    ) -> Tensor:
        (height, width), channels = options[0], features[0].shape[1]
        pooled = features[0].new_empty(len(rois), height, width, channels)
        ctx.scales = _to_device(torch.tensor(scales), rois.device)
        _launch(features, pooled, rois, levels, ctx.scales, options, backward=False)
        ctx.save_for_backward(rois, levels)
        ctx.options = options
        # The gradients have the strides of the maps.
        ctx.like = [torch.empty_like(x, device="meta", dtype=torch.float32) for x in features]
        ctx.dtype = features[0].dtype
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rois, levels = ctx.saved_tensors
        grad = grad.permute(0, 2, 3, 1).contiguous()
        # Of every map, also of those that need none: a RoI adds where its level says.
        grads = [torch.zeros_like(x, device=grad.device) for x in ctx.like]
        _launch(grads, grad, rois, levels, ctx.scales, ctx.options, backward=True)
        return None, None, None, None, *[x.to(ctx.dtype) for x in grads]


def _launch(
    maps: Sequence[Tensor],
    pooled: Tensor,
    rois: Tensor,
    levels: Tensor,
    scales: Tensor,
    options: tuple[tuple[int, int], int, bool],
    *,
    backward: bool,
) -> None:
    """Runs the kernel over all rows of bins of all RoIs.

    Args:
        maps: L maps of one type, read; backward adds to them.
        pooled: (R, P, Q, C), contiguous.
        rois: (R, 5) float32, contiguous.
        levels: (R,) int32.
        scales: (L,) float32 on the device.
        options: output size, sampling ratio, aligned.
        backward: whether ``pooled`` is the gradient and ``maps`` are those to add it to.
    """
    (height, width), sampling_ratio, aligned = options
    num_channels = pooled.shape[3]
    if pooled.numel() == 0:
        return
    rows = [[x.data_ptr(), *x.shape[2:], *x.stride()] for x in maps]
    table = _to_device(torch.tensor(rows), pooled.device)
    block = min(triton.next_power_of_2(num_channels), MAX_BLOCK_CHANNELS)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(pooled):
        _roi_align_kernel[(len(rois) * height, triton.cdiv(num_channels, block))](
            table,
            pooled,
            rois,
            levels,
            scales,
            num_channels,
            dtype=_TRITON_TYPES[maps[0].dtype],
            channels_last=all(x.stride(1) == 1 for x in maps),
            pooled_height=height,
            pooled_width=width,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
            block_channels=block,
            backward=backward,
            **COMPILER_OPTIONS,
        )


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies from pinned memory, which does not wait for the device."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@triton.jit
def _roi_align_kernel(
    table,
    pooled,
    rois,
    levels,
    scales,
    num_channels,
    dtype: tl.constexpr,
    channels_last: tl.constexpr,
    pooled_height: tl.constexpr,
    pooled_width: tl.constexpr,
    sampling_ratio: tl.constexpr,
    aligned: tl.constexpr,
    block_channels: tl.constexpr,
    backward: tl.constexpr,
):
    r = (tl.program_id(0) // pooled_height).to(tl.int64)
    p = tl.program_id(0) % pooled_height
    level = tl.load(levels + r)
    scale = tl.load(scales + level)
    row = table + level * _NUM_COLUMNS
    height, width = tl.load(row + _HEIGHT).to(tl.int32), tl.load(row + _WIDTH).to(tl.int32)
    stride_y, stride_x = tl.load(row + _STRIDE_Y), tl.load(row + _STRIDE_X)
    box = rois + 5 * r
    y_start, y_bin, y_grid = _axis(
        tl.load(box + 2) * scale,
        tl.load(box + 4) * scale,
        pooled_height,
        height,
        sampling_ratio,
        aligned,
    )
    x_start, x_bin, x_grid = _axis(
        tl.load(box + 1) * scale,
        tl.load(box + 3) * scale,
        pooled_width,
        width,
        sampling_ratio,
        aligned,
    )
    num_samples = tl.maximum(y_grid * x_grid, 1)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    used = channels < num_channels
    # A stride known to be 1 lets the compiler load neighbouring channels at once.
    stride_c = 1 if channels_last else tl.load(row + _STRIDE_C)
    image = tl.load(box).to(tl.int64) * tl.load(row + _STRIDE_N)
    cells = tl.load(row + _ADDRESS).to(tl.pointer_type(dtype)) + image + channels * stride_c
    bins = pooled + (r * pooled_height + p) * pooled_width * num_channels + channels
    for q in range(pooled_width):
        if backward:
            total = tl.load(bins + q * num_channels, mask=used, other=0.0).to(tl.float32)
            total = _divide(total, num_samples)
        else:
            total = tl.full((block_channels,), 0.0, dtype=tl.float32)
        for i in range(y_grid):
            y_inside, y0, y1, fy = _sample(y_start, y_bin, y_grid, p, i, height)
            if y_inside:
                top, bottom = cells + y0 * stride_y, cells + y1 * stride_y
                for j in range(x_grid):
                    x_inside, x0, x1, fx = _sample(x_start, x_bin, x_grid, q, j, width)
                    if x_inside:
                        left, right = x0 * stride_x, x1 * stride_x
                        total = _cell(top + left, (1 - fy) * (1 - fx), total, used, backward)
                        total = _cell(top + right, (1 - fy) * fx, total, used, backward)
                        total = _cell(bottom + left, fy * (1 - fx), total, used, backward)
                        total = _cell(bottom + right, fy * fx, total, used, backward)
        if not backward:
            tl.store(bins + q * num_channels, _divide(total, num_samples), mask=used)


@triton.jit
def _axis(start, end, num_bins, num_cells, sampling_ratio: tl.constexpr, aligned: tl.constexpr):
    """Returns the start from cell centre to cell centre, the bin size and the samples per bin."""
    if aligned:
        start, end = start - 0.5, end - 0.5
        side = end - start
    else:
        side = tl.maximum(end - start, 1.0)
    bin_size = _divide(side, num_bins)
    if sampling_ratio > 0:
        grid = sampling_ratio
    else:
        limit = ((num_cells * _MAX_MAP_SIZES + num_bins - 1) // num_bins).to(tl.float32)
        grid = tl.minimum(tl.maximum(tl.ceil(bin_size), 0.0), limit).to(tl.int32)
    return start, bin_size, grid


@triton.jit
def _sample(start, bin_size, grid, bin, k, num_cells):
    """Returns whether a sample counts, cells below and above, and the weight of the latter."""
    t = start + bin * bin_size + _divide((k + 0.5) * bin_size, grid)
    inside = (t >= -1.0) & (t <= num_cells)
    t = tl.where(inside, tl.minimum(tl.maximum(t, 0.0), num_cells - 1.0), 0.0)
    low = tl.floor(t).to(tl.int32)
    return inside, low, tl.minimum(low + 1, num_cells - 1), t - low


@triton.jit
def _cell(cell, weight, total, mask, backward: tl.constexpr):
    """Adds a cell to the total of a bin; backward, the bin's gradient to the cell's."""
    if backward:
        tl.atomic_add(cell, weight * total, mask=mask, sem="relaxed")
    else:
        total += weight * tl.load(cell, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _divide(x, y):
    """Divides as IEEE 754 says; ``/`` becomes a product with 1 / y, rounded twice.

    A RoI side of exactly 7 k cells has k samples a bin; 7 k * (1 / 7), rounded up, may be k + 1.
    """
    return tl.div_rn(x, y * 1.0)
