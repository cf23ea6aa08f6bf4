"""RoIAlign from all feature maps of a pyramid in one CUDA kernel, forward and backward.

torchvision's operator pools from a single map, so detectron2 runs it once per level and each time
waits for the device to find out how many RoIs the level has. Here, every RoI selects its map inside
the kernel, so one launch handles all levels without synchronising. Sums are kept in float32
regardless of the maps' dtype. Channels are distributed over the threads, so that a channels_last
map is read, and its gradient is updated, in vectors of 16 bytes. The compiler can do so only if
all addresses are known to be multiples of 16 bytes. The maps are therefore passed to the kernel as
arguments rather than as a table of addresses.

Each program of the grid handles one row of bins of one RoI, for one block of channels. Samples that
share cells are merged along both axes. Along y, the samples of a row of bins become weights of the
cells in a column. Along x, the program steps from sample to sample and keeps the sums of the two
columns around the current sample. Neighbouring samples share these columns, even across bins. The
forward pass therefore reads each column of the row once. The backward pass visits the columns in
the same order with the bins' gradients and updates each column once. It adds with atomics, so its
sums may differ in the last bits from run to run.

Sample coordinates and the border rule are the same as in ops.axis_weights and in torchvision.

Shape alphabet: N images, C channels, L feature maps, Hi and Wi sides of map i, R RoIs, P and Q
pooled height and width, Y rows in a tile of cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .axis_weights import MAX_MAP_SIZES

MAX_MAPS = 5
"""Largest number of maps in one launch: the levels P2 to P6 of a pyramid."""

MAX_BLOCK_BYTES = 512
"""Largest number of bytes that a program reads from each cell: 16 for each thread of a warp."""

TILE_ROWS = 4
"""Y: number of rows of cells that are read together. A bin of up to 3 x 3 cells touches at most
this many rows.
"""

COMPILER_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
"""Options of Triton's compiler. Without fusion, sample coordinates are rounded as in axis_weights.
"""

_MAX_MAP_SIZES = tl.constexpr(MAX_MAP_SIZES)


def pool(
    maps: Sequence[Tensor],
    pooled: Tensor,
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Writes the bins of all RoIs.

    Args:
        maps: L channels_last maps (N, C, Hi, Wi) of one floating-point dtype.
        pooled: (R, P, Q, C), contiguous.
        rois: (R, 5) float32, contiguous: image index, x0, y0, x1, y1.
        levels: (R,) int32 in [0, L).
        scales: cells per pixel of each map.
        sampling_ratio: samples per bin and axis; 0 means ``ceil(RoI side / P)``.
        aligned: whether pixel centres are at +0.5.
    """
    _launch(maps, pooled, rois, levels, scales, sampling_ratio, aligned, backward=False)


def add_gradients(
    maps: Sequence[Tensor],
    pooled: Tensor,
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Adds the gradients of the bins to the gradients of the maps.

    Args: see pool. ``pooled`` contains the gradients of the bins, and ``maps`` contains float32
        gradients, which are updated in place.
    """
    _launch(maps, pooled, rois, levels, scales, sampling_ratio, aligned, backward=True)


def _launch(
    maps: Sequence[Tensor],
    pooled: Tensor,
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    *,
    backward: bool,
) -> None:
    if pooled.numel() == 0:
        return
    num_rois, height, width, num_channels = pooled.shape
    block = min(triton.next_power_of_2(num_channels), MAX_BLOCK_BYTES // maps[0].element_size())
    unused = MAX_MAPS - len(maps)
    filled, scales = [*maps, *[maps[0]] * unused], [*scales, *[scales[0]] * unused]
    # Triton launches on the current device, which may not be the tensors' device.
    with torch.cuda.device_of(pooled):
        roi_align_kernel[(num_rois * height, triton.cdiv(num_channels, block))](
            *filled,
            *(x.shape[2] for x in filled),
            *(x.shape[3] for x in filled),
            *scales,
            pooled,
            rois,
            levels,
            num_channels,
            pooled_height=height,
            pooled_width=width,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
            block_channels=block,
            tile_rows=TILE_ROWS,
            backward=backward,
            **COMPILER_OPTIONS,
        )


# Without this, the kernel is recompiled for map sides that are 1 or multiples of 16.
_SIDES = [f"{side}{i}" for side in ("height", "width") for i in range(MAX_MAPS)]


@triton.jit(do_not_specialize=_SIDES)
def roi_align_kernel(
    map0,
    map1,
    map2,
    map3,
    map4,
    height0,
    height1,
    height2,
    height3,
    height4,
    width0,
    width1,
    width2,
    width3,
    width4,
    scale0,
    scale1,
    scale2,
    scale3,
    scale4,
    pooled,
    rois,
    levels,
    num_channels,
    pooled_height: tl.constexpr,
    pooled_width: tl.constexpr,
    sampling_ratio: tl.constexpr,
    aligned: tl.constexpr,
    block_channels: tl.constexpr,
    tile_rows: tl.constexpr,
    backward: tl.constexpr,
):
    r = (tl.program_id(0) // pooled_height).to(tl.int64)
    p = tl.program_id(0) % pooled_height
    level = tl.load(levels + r)
    cells = _choose(level, map0, map1, map2, map3, map4)
    height = _choose(level, height0, height1, height2, height3, height4)
    width = _choose(level, width0, width1, width2, width3, width4)
    scale = _choose(level, scale0, scale1, scale2, scale3, scale4)
    box = rois + 5 * r
    y0, y1 = tl.load(box + 2) * scale, tl.load(box + 4) * scale
    x0, x1 = tl.load(box + 1) * scale, tl.load(box + 3) * scale
    y_start, y_bin, y_grid = _axis(y0, y1, pooled_height, height, sampling_ratio, aligned)
    x_start, x_bin, x_grid = _axis(x0, x1, pooled_width, width, sampling_ratio, aligned)
    num_samples = tl.maximum(y_grid * x_grid, 1)
    channels = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    used = channels < num_channels
    image = tl.load(box).to(tl.int64) * height * width
    cells = cells + image * num_channels + channels
    bins = pooled + (r * pooled_height + p) * pooled_width * num_channels + channels
    row, last_row = _window(y_start, y_bin, y_grid, p, height)
    weights = _weights(row, tile_rows, y_start, y_bin, y_grid, p, height)
    nothing = tl.full((block_channels,), 0.0, dtype=tl.float32)
    # Sums of cells (in backward, of gradients) in the column at `low` and in the one to its right.
    low, left, right = tl.full((), -2, dtype=tl.int32), nothing, nothing
    for q in range(pooled_width):
        total = nothing
        if backward:
            total = tl.load(bins + q * num_channels, mask=used, other=0.0).to(tl.float32)
            total = _divide(total, num_samples)
        for k in range(x_grid):
            inside, x, fraction = _sample(x_start, x_bin, x_grid, q, k, width)
            if inside:
                if x != low:
                    left, right = _move(low, x, left, right, cells, used, num_channels, width,
                                        row, last_row, weights, y_start, y_bin, y_grid, p, height,
                                        backward)  # fmt: skip
                    low = x
                if backward:
                    left += (1 - fraction) * total
                    right += fraction * total
                else:
                    total += (1 - fraction) * left + fraction * right
        if not backward:
            tl.store(bins + q * num_channels, _divide(total, num_samples), mask=used)
    if backward:
        _move(low, -2, left, right, cells, used, num_channels, width, row, last_row, weights,
              y_start, y_bin, y_grid, p, height, backward)  # fmt: skip


@triton.jit
def _move(low, x, left, right, cells, used, num_channels, width, row, last_row, weights,
          start, bin_size, grid, bin, height, backward: tl.constexpr):  # fmt: skip
    """Moves from the two columns at low to the two columns at x.

    Reads the new columns or, in backward, updates the gradients of the old columns.
    """
    nothing = tl.full((left.shape[0],), 0.0, dtype=tl.float32)
    if backward:
        _add_column(low, left, cells, used, num_channels, width, row, last_row, weights,
                    start, bin_size, grid, bin, height)  # fmt: skip
        if x == low + 1:
            left = right
        else:
            _add_column(low + 1, right, cells, used, num_channels, width, row, last_row, weights,
                        start, bin_size, grid, bin, height)  # fmt: skip
            left = nothing
        right = nothing
    else:
        if x == low + 1:
            left = right
        else:
            left = _column(x, nothing, cells, used, num_channels, width, row, last_row, weights,
                           start, bin_size, grid, bin, height)  # fmt: skip
        right = _column(x + 1, nothing, cells, used, num_channels, width, row, last_row, weights,
                        start, bin_size, grid, bin, height)  # fmt: skip
    return left, right


@triton.jit
def _column(x, total, cells, used, num_channels, width, row, last_row, weights,
            start, bin_size, grid, bin, height):  # fmt: skip
    """Adds the cells of a column to a total, weighted by a bin's samples along y.

    Columns off the map are skipped.
    """
    if (x >= 0) & (x < width):
        tile, mask = _tile(x, cells, used, num_channels, width, row, weights)
        values = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(values * weights[:, None], axis=0)
        for below in range(row + weights.shape[0], last_row + 1, weights.shape[0]):
            more = _weights(below, weights.shape[0], start, bin_size, grid, bin, height)
            tile, mask = _tile(x, cells, used, num_channels, width, below, more)
            values = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(values * more[:, None], axis=0)
    return total


@triton.jit
def _add_column(x, values, cells, used, num_channels, width, row, last_row, weights,
                start, bin_size, grid, bin, height):  # fmt: skip
    """Adds values to the gradients of the cells that _column reads."""
    if (x >= 0) & (x < width):
        tile, mask = _tile(x, cells, used, num_channels, width, row, weights)
        tl.atomic_add(tile, weights[:, None] * values[None, :], mask=mask, sem="relaxed")
        for below in range(row + weights.shape[0], last_row + 1, weights.shape[0]):
            more = _weights(below, weights.shape[0], start, bin_size, grid, bin, height)
            tile, mask = _tile(x, cells, used, num_channels, width, below, more)
            tl.atomic_add(tile, more[:, None] * values[None, :], mask=mask, sem="relaxed")


@triton.jit
def _tile(x, cells, used, num_channels, width, row, weights):
    """Returns the addresses of a column's cells from a row on, and a mask of the cells needed."""
    cell = (row + tl.arange(0, weights.shape[0])).to(tl.int64) * width + x
    tile = cells[None, :] + cell[:, None] * num_channels
    return tile, (weights != 0)[:, None] & used[None, :]


@triton.jit
def _choose(i, x0, x1, x2, x3, x4):
    x = tl.where(i == 1, x1, x0)
    x = tl.where(i == 2, x2, x)
    x = tl.where(i == 3, x3, x)
    return tl.where(i == 4, x4, x)


@triton.jit
def _axis(start, end, num_bins, num_cells, sampling_ratio: tl.constexpr, aligned: tl.constexpr):
    """Returns the start (with cell centres at whole numbers), bin size and samples per bin."""
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
    """Returns whether a sample counts, the cell below it, and the weight of the cell above it."""
    t = start + bin * bin_size + _divide((k + 0.5) * bin_size, grid)
    inside = (t >= -1.0) & (t <= num_cells)
    t = tl.where(t > 0.0, t, 0.0)  # this also replaces values that overflowed to NaN
    t = tl.where(t < num_cells - 1.0, t, num_cells - 1.0)
    low = tl.floor(t).to(tl.int32)
    return inside, low, t - low


@triton.jit
def _window(start, bin_size, grid, bin, num_cells):
    """Returns the first and the last cell that the samples of a bin touch."""
    grid = tl.maximum(grid, 1)  # a RoI may have no samples
    _, one_end, _ = _sample(start, bin_size, grid, bin, 0, num_cells)
    _, other_end, _ = _sample(start, bin_size, grid, bin, grid - 1, num_cells)
    # A RoI that ends before it starts is mirrored.
    return tl.minimum(one_end, other_end), tl.maximum(one_end, other_end) + 1


@triton.jit
def _weights(first, num_rows: tl.constexpr, start, bin_size, grid, bin, num_cells):
    """Returns the sums of the weights of a bin's samples, for num_rows cells from first on."""
    row = first + tl.arange(0, num_rows)
    weights = tl.full((num_rows,), 0.0, dtype=tl.float32)
    # If there are many samples, the loop covers only those near the cells.
    spacing, offset = _divide(bin_size, tl.maximum(grid, 1)), first - start - bin * bin_size
    ordered = spacing > 0
    spacing = tl.where(ordered, spacing, 1.0)
    near = tl.where(ordered, tl.floor(_divide(offset - 1, spacing)) - 1, 0.0)
    far = tl.where(ordered, tl.ceil(_divide(offset + num_rows, spacing)) + 1, grid)
    near, far = tl.maximum(near, 0.0), tl.minimum(far, grid)
    for k in range(tl.minimum(near, grid).to(tl.int32), far.to(tl.int32)):
        inside, low, fraction = _sample(start, bin_size, grid, bin, k, num_cells)
        if inside:
            weights += tl.where(row == low, 1 - fraction, 0.0)
            weights += tl.where(row == low + 1, fraction, 0.0)
    return weights


@triton.jit
def _divide(x, y):
    """Divides with IEEE 754 rounding. ``/`` would become a product with 1 / y, which rounds twice.

    With 7 bins, a RoI side of exactly 7 k cells needs k samples per bin, but 7 k * (1 / 7), rounded
    up, can be k + 1.
    """
    return tl.div_rn(x, y * 1.0)
