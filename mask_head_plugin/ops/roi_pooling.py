"""RoI pooling as a sparse matrix product: every bin is a weighted sum of a few cells.

Sampling on a RoI is separable (see axis_weights): the weight of cell (y, x) in bin (p, q) is
``Wy[p, y] Wx[q, x]``. Samples that share cells are merged along each axis before the map is read,
so a bin of 4 x 4 cells reads each once, however many samples lie in it. The product runs in
``embedding_bag``, with the channels-last map as the table and a bin as a bag: on x86 a vectorized
kernel (FBGEMM) on all threads. Backward is the product with the transposed matrix, a cell as a bag,
so it adds in a fixed order and writes each cell once. Measured beside it and left, being slower:
two dense products per RoI, one RoI at a time or in batches; a sparse CSR matrix; embedding_bag's
own backward.

A maximum needs its samples one by one: ROIPool and ``reduction="max"`` compute them, group by
group.

All functions run on any device and are deterministic (maxima on CUDA only where
torch.use_deterministic_algorithms asks for it). Beside the result they hold lists of at most
about LIST_ENTRIES cells and their weights, tables of TABLE_ELEMENTS (the map itself if it is
channels-last), and intermediate results of GROUP_ELEMENTS, or those of one RoI if these are more.

Shape alphabet: N images, C channels, H and W sides of a feature map, L feature maps, R RoIs (r of
one map, n of one group), P and Q pooled height and width, K slots for the cells of a bin along one
axis (Ky, Kx), c channels of one table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from .axis_weights import (
    MAX_MAP_SIZES,
    AxisSamples,
    AxisWeights,
    precise_roi_pool_weights,
    roi_align_samples,
    roi_align_weights,
    roi_pool_samples,
    round_to_cells,
)

LIST_ENTRIES = 1 << 22
"""Entries of the sparse matrix held at a time: 32 MB."""

GROUP_ELEMENTS = 1 << 20
"""Elements of the intermediate result of one group of RoIs: 4 MB of float32."""

TABLE_ELEMENTS = 1 << 20
"""Elements of a table that is a copy, because its map is not channels-last: 4 MB of float32."""

SAMPLE_ENTRIES = 1 << 18
"""Samples along one axis that are laid out at a time for RoIs larger than their map."""

SLOTS = (0, 1, *(size << power for power in range(20) for size in (2, 3)))
"""Slots per bin are rounded up to one of 0, 1, 2, 3, 4, 6, 8, 12, …, so that RoIs share groups."""

Axis = Callable[[Tensor, Tensor, int, int], AxisWeights | AxisSamples]


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
    """ROIAlign of Mask R-CNN section 3: bilinear samples in each bin, nothing rounded.

    With ``reduction="mean"`` equal to ``torchvision.ops.roi_align`` up to rounding. Differs from it
    in the default of ``aligned``, where a RoI ends before it starts (no crash), and for RoIs longer
    than axis_weights.MAX_MAP_SIZES feature maps (the adaptive grid, and with it memory, stops
    growing).

    Args:
        features: (N, C, H, W), or a list of L such maps that differ in H and W. A channels_last map
            of float32 or float64 is read without a copy; float16 and bfloat16 are computed in
            float32.
        rois: (R, 5): image index, x0, y0, x1, y1 in pixels of the network's input.
        output_size: P, or (height, width).
        spatial_scale: cells per pixel, for each map.
        sampling_ratio: samples per bin and axis; 0 and below for ``ceil(RoI side / P)``. 2 makes
            the paper's four points.
        aligned: True puts pixel centres at +0.5 (detectron2's ROIAlignV2); False is detectron's
            ROIAlign, which takes sides below one cell as one cell.
        reduction: ``mean`` or ``max`` of the samples of a bin (Table 2c). Samples outside the map
            count as 0 in the mean and do not enter the maximum; a bin without any is 0.
        levels: (R,) integers in [0, L): the map that each RoI is pooled from; needed for L > 1.

    Returns:
        (R, C, P, P) of the type of ``features`` in channels_last layout, with a gradient to them.

    Raises:
        ValueError: if a shape is not as above, a coordinate is NaN or infinite, an image index is
            not in [0, N), a level not in [0, L), or ``reduction`` is neither name.
    """
    function, axis = _reducer(reduction)
    axis = partial(axis, sampling_ratio=sampling_ratio, aligned=aligned)
    return _pool(features, rois.detach(), output_size, spatial_scale, levels, function, axis)


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
    """ROIWarp as Mask R-CNN section 3 describes it: a quantized RoI, then bilinear samples.

    The RoI is quantized as in ROIPool: edges rounded half away from zero, the cell of the upper
    edge included, at least one cell (axis_weights.round_to_cells; Fast R-CNN). Within it samples
    lie as in ``roi_align(aligned=True)``, cell centres at +0.5: a RoI of P cells a side with one
    sample a bin gives just these cells, as ROIPool does.

    Differs from the formula of its paper (Instance-aware Semantic Segmentation via Multi-task
    Network Cascades, arXiv 1512.04412), which quantizes nothing. That paper's released code does
    round, includes the upper cell in its backward pass only, and takes one sample, from a bin's
    corner, with cell centres at whole numbers. As there, samples outside the map do not enter a
    maximum.

    Args and Returns: see roi_align.
    """
    function, align = _reducer(reduction)

    def axis(start: Tensor, end: Tensor, bins: int, cells: int) -> AxisWeights | AxisSamples:
        return align(*round_to_cells(start, end), bins, cells, sampling_ratio)

    return _pool(features, rois.detach(), output_size, spatial_scale, levels, function, axis)


def precise_roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float] = 1.0,
    aligned: bool = True,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """PrROIPool (arXiv 1807.11590): the mean of the bilinear surface over each bin, no samples.

    The limit of ``roi_align`` for a growing fixed sampling ratio, with its border rule. Differs
    from the original there (which takes the map as 0 beyond its border cells' centres plus one), in
    ``aligned`` and for bins without area (0 in the original, the value at their place here).

    Args: see roi_align.

    Returns:
        (R, C, P, P) of the type of ``features`` in channels_last layout, with gradients to them and
        to the coordinates in ``rois``.
    """
    axis = partial(precise_roi_pool_weights, aligned=aligned)
    return _pool(features, rois, output_size, spatial_scale, levels, _WeightedSum, axis)


def roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float] = 1.0,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """ROIPool (Fast R-CNN section 2.1): the maximum of the cells in each bin of a quantized RoI.

    Equal to ``torchvision.ops.roi_pool``, the gradient to the first of equal maxima included, for
    any type and strides, and deterministic on CUDA where torch.use_deterministic_algorithms asks
    for it; where torchvision's can be used it is faster (see modeling.MultiLevelRoIPooler). Differs
    in NaN and infinite features, which it passes on, and in edges of over axis_weights.MAX_CELL
    cells.

    Args and Returns: see roi_align.
    """
    axis = roi_pool_samples
    return _pool(features, rois.detach(), output_size, spatial_scale, levels, _Maximum, axis)


def _reducer(reduction: str) -> tuple[type[torch.autograd.Function], Callable[..., Any]]:
    if reduction not in ("mean", "max"):
        raise ValueError(f"reduction must be 'mean' or 'max', not {reduction!r}")
    if reduction == "mean":
        return _WeightedSum, roi_align_weights
    return _Maximum, roi_align_samples


class _Part(NamedTuple):
    """r RoIs that are pooled from one map."""

    level: int  # index of the map
    rows: Tensor  # (r,) their places among all RoIs
    first_cell: Tensor  # (r,) int32, where the image of each begins in the table of N H W cells
    y: Any  # AxisWeights or AxisSamples
    x: Any


class _Group(NamedTuple):
    """n RoIs of a part whose bins have about the same number of cells."""

    places: Tensor  # (n,) in the part
    cells: Tensor  # (n, P, Q, Ky, Kx) int32, places in the table of cells
    weights: Tensor  # (n, P, Q, Ky, Kx)
    empty: Tensor | None  # (n, P Q) bins off the map, if there are any: 0 times NaN would be NaN


def _pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    levels: Tensor | None,
    function: Any,
    axis: Axis,
) -> Tensor:
    maps = [features] if isinstance(features, Tensor) else list(features)
    scales = [spatial_scale] if isinstance(spatial_scale, int | float) else list(spatial_scale)
    height, width = (output_size,) * 2 if isinstance(output_size, int) else output_size
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise ValueError(f"output_size must be whole numbers above 0, not {output_size}")
    levels = _check(maps, rois, scales, levels)
    if len(rois) == 0:  # views keep the graph without reading the maps
        return torch.cat([x[:0, :, :1, :1].expand(-1, -1, height, width) for x in maps])
    rois = rois.to(torch.promote_types(maps[0].dtype, torch.float32))
    parts = []
    for level, (feature, scale) in enumerate(zip(maps, scales, strict=True)):
        rows = torch.nonzero(levels == level)[:, 0]
        boxes = rois[rows, 1:] * scale
        first_cell = rois[rows, 0].int() * (feature.shape[2] * feature.shape[3])
        for index in _split_by_size(boxes, feature):
            x0, y0, x1, y1 = boxes[index].unbind(1)
            y = axis(y0, y1, height, feature.shape[2])
            x = axis(x0, x1, width, feature.shape[3])
            parts.append(_Part(level, rows[index], first_cell[index], y, x))
    # Weights are inputs of their own, for their gradient.
    weights = [axis.weight for part in parts for axis in (part.y, part.x)]
    pooled: Tensor = function.apply(parts, len(rois), len(maps), *maps, *weights)
    return pooled.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _split_by_size(boxes: Tensor, feature: Tensor) -> list[Tensor]:
    """Keeps RoIs larger than the map, whose many samples would be laid out for all, to themselves.

    Args:
        boxes: (r, 4) in cells.
        feature: their map.

    Returns:
        Indices of boxes; no empty ones.
    """
    cells = boxes.new_tensor(feature.shape[:1:-1])
    large = ((boxes[:, 2:] - boxes[:, :2]) > cells).any(dim=1)
    step = max(SAMPLE_ENTRIES // (MAX_MAP_SIZES * max(feature.shape[2:])), 1)
    groups = [torch.nonzero(~large)[:, 0], *torch.nonzero(large)[:, 0].split(step)]
    return [group for group in groups if len(group)]


def _check(maps: list[Tensor], rois: Tensor, scales: list[float], levels: Tensor | None) -> Tensor:
    """Raises ValueError for inputs that do not fit, and returns the levels."""
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
    # In the type and the unit that they will be computed in.
    cells = rois.detach().to(torch.promote_types(first.dtype, torch.float32)) * max(scales)
    bad = len(rois) - int(torch.isfinite(cells).all(dim=1).sum())
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
    return levels


class _WeightedSum(torch.autograd.Function):
    """Each bin is the sum of its cells times the products of their weights along the axes."""

    @staticmethod
    def forward(
        ctx: Any, parts: list[_Part], num_rois: int, num_maps: int, *inputs: Tensor
    ) -> Tensor:
        maps = inputs[:num_maps]
        pooled = _new_result(parts, num_rois, maps[0])
        for part in parts:
            feature = maps[part.level]
            for groups in _weight_lists(part, feature):
                for channels in _channel_blocks(feature):
                    table = _table(feature, channels)
                    for group in groups:
                        bags = _bags(table, group).to(pooled)
                        pooled[part.rows[group.places], :, channels] = bags
        ctx.parts, ctx.maps = parts, [torch.empty_like(x, device="meta") for x in maps]
        if any(ctx.needs_input_grad[3 + num_maps :]):
            ctx.save_for_backward(*maps)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _grads_of_maps(ctx, grad, _add_grad_of_map)
        for part in ctx.parts:
            if ctx.saved_tensors:
                grads += _grad_of_weights(part, ctx.saved_tensors[part.level], grad)
            else:
                grads += [None, None]
        return None, None, None, *grads


def _grads_of_maps(ctx: Any, grad: Tensor, add: Callable[..., None]) -> list[Tensor | None]:
    """Returns the gradient to each map, or None where it is not needed.

    Args:
        ctx: of a Function with ``parts``, ``num_rois`` and ``num_maps`` before its maps.
        grad: to the bins, (R, P Q, C).
        add: adds the gradient of one part, ``(grad_map, part, feature, grad)``.
    """
    grads: list[Tensor | None] = []
    for level, feature in enumerate(ctx.maps):
        if not ctx.needs_input_grad[3 + level]:
            grads.append(None)
            continue
        grad_map = _MapGradient(feature, grad)
        for part in ctx.parts:
            if part.level == level:
                add(grad_map, part, feature, grad)
        grads.append(grad_map.total())
    return grads


def _weight_lists(part: _Part, feature: Tensor) -> Iterator[list[_Group]]:
    """Yields the matrix of a part, in lists of groups of at most about LIST_ENTRIES entries."""
    y, x = part.y, part.x
    bins, channels = y.cell.shape[1] * x.cell.shape[1], _block_size(feature)
    row_start = part.first_cell[:, None, None] + y.cell * feature.shape[3]
    off_map_y, off_map_x = ((axis.weight == 0).all(dim=2) for axis in (y, x))

    def group(places: Tensor, ky: int, kx: int) -> _Group:
        cells = _over_y(row_start[places, :, :ky]) + _over_x(x.cell[places, :, :kx])
        weights = _over_y(y.weight[places, :, :ky]) * _over_x(x.weight[places, :, :kx])
        off_map = off_map_y[places][:, :, None] | off_map_x[places][:, None, :]
        return _Group(places, cells, weights, off_map.flatten(1) if off_map.any() else None)

    def step(ky: int, kx: int) -> int:
        return min(GROUP_ELEMENTS // (bins * channels), LIST_ENTRIES // (bins * ky * kx))

    return _lists(y.count, x.count, step, group)


def _over_y(x: Tensor) -> Tensor:
    """(n, P, K, ...) -> (n, P, 1, K, 1, ...)"""
    return x[:, :, None, :, None]


def _over_x(x: Tensor) -> Tensor:
    """(n, Q, K, ...) -> (n, 1, Q, 1, K, ...)"""
    return x[:, None, :, None, :]


def _bags(table: Tensor, group: _Group) -> Tensor:
    """Returns the bins (n, P Q, c) of a group."""
    cells, weights = (part.flatten(3).flatten(0, 2) for part in (group.cells, group.weights))
    bags = embedding_bag(cells, table, mode="sum", per_sample_weights=weights)
    bags = bags.view(len(group.places), -1, table.shape[1])
    if group.empty is not None:
        bags = bags.masked_fill(group.empty[:, :, None], 0)
    return bags


def _add_grad_of_map(grad_map: _MapGradient, part: _Part, feature: Tensor, grad: Tensor) -> None:
    """Multiplies the gradient (R, P Q, C) with the transposed matrix: a cell is a bag of bins."""
    numbers = torch.arange(grad[:, :, 0].numel(), dtype=torch.int32, device=grad.device)
    numbers = numbers.view(grad.shape[:2])[part.rows]
    for groups in _weight_lists(part, feature):
        bins, weights, offsets = _transposed(groups, numbers, grad_map.num_cells)
        groups.clear()  # their memory is needed
        for channels in _channel_blocks(feature, grad.shape[0] * grad.shape[1]):
            rows = grad[:, :, channels].flatten(0, 1).to(weights.dtype)
            sums = partial(embedding_bag, mode="sum", per_sample_weights=weights)
            grad_map.add(channels, sums(bins, rows, offsets))


def _transposed(
    groups: list[_Group], numbers: Tensor, num_cells: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts entries of the matrix by cell.

    Args:
        groups: rows of the matrix.
        numbers: (r, P Q) the number of each bin of the part.
        num_cells: N H W.

    Returns:
        The bins and weights of all entries, and (N H W) where those of each cell begin.
    """
    cell = torch.cat([group.cells.flatten() for group in groups])
    weights = torch.cat([group.weights.flatten() for group in groups])
    bins = [numbers[g.places].flatten().repeat_interleave(g.cells[0, 0, 0].numel()) for g in groups]
    used = torch.nonzero(weights)[:, 0]
    cell, order = torch.sort(cell[used], stable=True)
    count = torch.bincount(cell, minlength=num_cells)
    order = used[order]
    return torch.cat(bins)[order], weights[order], (count.cumsum(0) - count).to(numbers.dtype)


def _grad_of_weights(part: _Part, feature: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients to ``part.y.weight`` and ``part.x.weight``."""
    y, x = part.y.weight, part.x.weight
    grad_y, grad_x = torch.zeros_like(y), torch.zeros_like(x)
    for groups in _weight_lists(part, feature):
        for channels in _channel_blocks(feature):
            table = _table(feature, channels)
            for group in groups:
                places, rows = group.places, grad[part.rows[group.places], :, channels]
                weights = group.weights.detach().requires_grad_()
                with torch.enable_grad():
                    bags = _bags(table, group._replace(weights=weights))
                (d_weights,) = torch.autograd.grad(bags, weights, rows.to(bags.dtype))
                ky, kx = weights.shape[3:]
                # Products and sums, which autocast leaves alone.
                grad_y[places, :, :ky] += (d_weights * _over_x(x[places, :, :kx])).sum((2, 4))
                grad_x[places, :, :kx] += (d_weights * _over_y(y[places, :, :ky])).sum((1, 3))
    return grad_y, grad_x


class _Maximum(torch.autograd.Function):
    """Each bin is the maximum of its samples, a sample the weighted sum of one or of four cells."""

    @staticmethod
    def forward(
        ctx: Any, parts: list[_Part], num_rois: int, num_maps: int, *inputs: Tensor
    ) -> Tensor:
        maps = inputs[:num_maps]
        pooled = _new_result(parts, num_rois, maps[0])
        needed = any(ctx.needs_input_grad)
        winner = torch.empty_like(pooled, dtype=torch.int32) if needed else None
        for part in parts:
            feature = maps[part.level]
            for groups in _sample_lists(part, feature):
                for channels in _channel_blocks(feature):
                    table = _table(feature, channels)
                    shape = pooled.shape[1], table.shape[1]
                    for group in groups:
                        rows = part.rows[group.places]
                        best, which = _largest(table, group, needed)
                        pooled[rows, :, channels] = best.view(len(rows), *shape).to(pooled)
                        if winner is not None:
                            winner[rows, :, channels] = which.view(len(rows), *shape).int()
        ctx.parts, ctx.maps = parts, [torch.empty_like(x, device="meta") for x in maps]
        ctx.save_for_backward(winner)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (winner,) = ctx.saved_tensors
        grads = _grads_of_maps(ctx, grad, partial(_add_grad_of_maximum, winner=winner))
        return None, None, None, *grads, *[None] * (2 * len(ctx.parts))


class _SampleGroup(NamedTuple):
    """n RoIs of a part whose bins have about the same number of samples, S a bin."""

    places: Tensor  # (n,) in the part
    cells: Tensor  # (n P Q, S, V) int32
    weights: Tensor  # (n P Q, S, V)
    outside: Tensor  # (n P Q, S) samples that do not count


def _sample_lists(part: _Part, feature: Tensor) -> Iterator[list[_SampleGroup]]:
    """Yields the samples of a part, in lists of groups of at most about LIST_ENTRIES cells."""
    y, x = part.y, part.x
    bins, corners = y.cell.shape[1] * x.cell.shape[1], y.cell.shape[3] * x.cell.shape[3]
    channels = _block_size(feature)
    row_start = part.first_cell[:, None, None, None] + y.cell * feature.shape[3]

    def group(places: Tensor, gy: int, gx: int) -> _SampleGroup:
        cells = _over_y(row_start[places, :, :gy])[..., None]
        cells = cells + _over_x(x.cell[places, :, :gx])[..., None, :]
        weights = _over_y(y.weight[places, :, :gy])[..., None]
        weights = weights * _over_x(x.weight[places, :, :gx])[..., None, :]
        inside = _over_y(y.inside[places, :, :gy]) & _over_x(x.inside[places, :, :gx])
        shape = (len(places) * bins, -1, corners)
        outside = ~inside.flatten(3).flatten(0, 2)
        return _SampleGroup(places, cells.reshape(shape), weights.reshape(shape), outside)

    def step(gy: int, gx: int) -> int:
        return GROUP_ELEMENTS // (bins * gy * gx * max(channels, corners))

    return _lists(y.count, x.count, step, group)


def _samples(table: Tensor, group: _SampleGroup) -> Tensor:
    """Returns the samples (n P Q, S, c) of a group, -inf where they do not count."""
    cells, weights = group.cells.flatten(0, 1), group.weights.flatten(0, 1)
    if cells.shape[1] == 1:  # the cell itself
        values = table.index_select(0, cells[:, 0])
    else:
        values = embedding_bag(cells, table, mode="sum", per_sample_weights=weights)
    values = values.view(*group.outside.shape, -1)
    return values.masked_fill_(group.outside[:, :, None], float("-inf"))


def _largest(table: Tensor, group: _SampleGroup, needed: bool) -> tuple[Tensor, Tensor]:
    """Returns the largest sample of each bin, (n P Q, c), and its number if that is needed.

    A bin without samples is 0. Channels go in turns where the samples of a single RoI are many.
    """
    step = max(2 * GROUP_ELEMENTS // group.outside.numel(), 1)
    empty = group.outside.all(dim=1)[:, None]
    best, which = [], []
    for columns in table.split(step, dim=1):
        samples = _samples(columns, group)
        if needed:
            values, numbers = samples.max(dim=1)
            which.append(numbers)
        else:
            values = samples.amax(dim=1)
        best.append(values.masked_fill_(empty, 0))
    return torch.cat(best, dim=1), torch.cat(which, dim=1) if needed else best[0]


def _add_grad_of_maximum(
    grad_map: _MapGradient, part: _Part, feature: Tensor, grad: Tensor, winner: Tensor
) -> None:
    """Hands the gradient (R, P Q, C) of each bin to the cells of its largest sample."""
    for groups in _sample_lists(part, feature):
        for channels in _channel_blocks(feature):
            num = channels.stop - channels.start
            column = torch.arange(num, device=grad.device)
            table = grad.new_zeros(grad_map.num_cells * num, dtype=_compute_type(feature))
            for group in groups:
                rows = part.rows[group.places]
                which = winner[rows, :, channels].flatten(0, 1).long()
                values = grad[rows, :, channels].flatten(0, 1).to(table.dtype)
                values = values.masked_fill(group.outside.all(dim=1)[:, None], 0)
                for corner in range(group.cells.shape[2]):
                    cell = group.cells[:, :, corner].long().gather(1, which)
                    weight = group.weights[:, :, corner].gather(1, which)
                    place = (cell * num + column).flatten()
                    table.scatter_add_(0, place, (values * weight).flatten())
            grad_map.add(channels, table.view(grad_map.num_cells, -1))


def _lists(
    y_count: Tensor, x_count: Tensor, step: Callable[[int, int], int], group: Callable[..., Any]
) -> Iterator[list[Any]]:
    """Sorts RoIs by slots per bin, cuts them into groups and the groups into lists.

    Args:
        y_count: (r,) slots per bin that each RoI uses along y; those with 0 are left out.
        x_count: (r,) along x.
        step: largest number of RoIs in a group, from the slots along y and x.
        group: makes a group from (n,) places, slots along y and slots along x.
    """
    sizes = torch.tensor(SLOTS, dtype=y_count.dtype, device=y_count.device)
    key = torch.bucketize(y_count, sizes) * len(SLOTS) + torch.bucketize(x_count, sizes)
    key, order = torch.where((y_count > 0) & (x_count > 0), key, 0).sort(stable=True)
    keys, counts = torch.unique_consecutive(key, return_counts=True)
    groups, entries = [], 0
    for key, index in zip(keys.tolist(), order.split(counts.tolist()), strict=True):
        ky, kx = divmod(key, len(SLOTS))
        if key == 0:
            continue
        for piece in index.split(max(step(SLOTS[ky], SLOTS[kx]), 1)):
            groups.append(group(piece, SLOTS[ky], SLOTS[kx]))
            entries += groups[-1].cells.numel()
            if entries >= LIST_ENTRIES:
                yield groups
                groups, entries = [], 0
    if groups:
        yield groups


def _new_result(parts: list[_Part], num_rois: int, feature: Tensor) -> Tensor:
    """Allocates the bins (R, P Q, C); those of RoIs with nothing on the map are 0."""
    bins = parts[0].y.cell.shape[1] * parts[0].x.cell.shape[1]
    pooled = feature.new_empty(num_rois, bins, feature.shape[1])
    for part in parts:
        pooled[part.rows[(part.y.count == 0) | (part.x.count == 0)]] = 0
    return pooled


def _compute_type(feature: Tensor) -> torch.dtype:
    return torch.promote_types(feature.dtype, torch.float32)


def _block_size(feature: Tensor, num_rows: int = 0) -> int:
    """Returns all channels of a map that can be read in place, else as many as are copied at once.

    Args:
        feature: the map.
        num_rows: of another table that is copied, beside the one of N H W cells.
    """
    images, channels, height, width = feature.shape
    if feature.dtype == _compute_type(feature) and feature.permute(0, 2, 3, 1).is_contiguous():
        return channels
    # Whole cache lines of 16 float32.
    step = TABLE_ELEMENTS // max(images * height * width, num_rows) // 16 * 16
    return min(channels, max(step, 16))


def _channel_blocks(feature: Tensor, num_rows: int = 0) -> Iterator[slice]:
    channels, step = feature.shape[1], _block_size(feature, num_rows)
    for start in range(0, channels, step):
        yield slice(start, min(start + step, channels))


def _table(feature: Tensor, channels: slice) -> Tensor:
    """Returns some channels of a map as a table of cells, (N H W, c)."""
    block = feature[:, channels].permute(0, 2, 3, 1).to(_compute_type(feature))
    return block.reshape(-1, block.shape[3])


class _MapGradient:
    """The gradient to a map, put together from tables of some of its channels."""

    def __init__(self, feature: Tensor, grad: Tensor) -> None:
        """
        Args:
            feature: the map; its shape, strides and type count.
            grad: to the bins; its device counts.
        """
        images, _, height, width = feature.shape
        self.num_cells = images * height * width
        self._like, self._device = feature, grad.device
        self._total: Tensor | None = None
        self._written = 0

    def add(self, channels: slice, table: Tensor) -> None:
        images, num_channels, height, width = self._like.shape
        block = table.view(images, height, width, -1).permute(0, 3, 1, 2)
        if self._total is None and block.shape[1] == num_channels:
            self._total = block  # channels-last, as the map is
        else:
            if self._total is None:  # half precision would round each sum
                self._total = torch.empty_like(self._like, dtype=table.dtype, device=self._device)
            if channels.start >= self._written:
                self._total[:, channels] = block
            else:
                self._total[:, channels] += block
        self._written = max(self._written, channels.stop)

    def total(self) -> Tensor:
        if self._total is None:
            return torch.zeros_like(self._like, device=self._device)
        return self._total.to(self._like.dtype)
