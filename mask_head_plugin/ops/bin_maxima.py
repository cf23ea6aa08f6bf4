"""Pooling by the maximum of each bin's cells, or of its samples (weighted sums of four cells).

Shape alphabet: see roi_pooling; S samples of a bin, V = 4 cells of a sample.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torchvision  # noqa: F401  # registers torch.ops.torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from .bin_layout import (
    Block,
    Part,
    as_table,
    over_x,
    over_y,
    split_into_blocks,
    sum_type,
    views,
)

GROUP_ELEMENTS = 1 << 24
"""Largest number of values (samples times channels) for which several RoIs are processed together:
64 MB of float32. A single RoI with more values is processed in blocks of channels.
"""


class LargestCell(torch.autograd.Function):
    """torchvision's RoIPool with a backward pass that can be deterministic on CUDA."""

    @staticmethod
    def forward(
        ctx: Any,
        rois: Tensor,
        levels: Tensor,
        scales: list[float],
        size: tuple[int, int],
        *maps: Tensor,
    ) -> Tensor:
        pooled = maps[0].new_empty(len(rois), maps[0].shape[1], *size)
        saved = []
        for level, (feature, scale) in enumerate(zip(maps, scales, strict=True)):
            rows = torch.nonzero(levels == level)[:, 0]
            values, cells = torch.ops.torchvision.roi_pool(feature, rois[rows], scale, *size)
            pooled.index_copy_(0, rows, values)
            saved += [rows, rois[rows, 0], cells]
        ctx.save_for_backward(*saved)
        ctx.shapes = [feature.shape for feature in maps]
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        for level, shape in enumerate(ctx.shapes):
            if not ctx.needs_input_grad[4 + level]:
                grads.append(None)
                continue
            rows, images, cells = ctx.saved_tensors[3 * level : 3 * level + 3]
            dtype = torch.int32 if shape.numel() < 1 << 31 else torch.int64
            channel = torch.arange(shape[1], dtype=dtype, device=grad.device)
            plane = (images.to(dtype)[:, None] * shape[1] + channel) * math.prod(shape[2:])
            # A negative cell marks a bin that has no maximum: the bin is off the map, or all of its
            # values are NaN.
            values = grad[rows].masked_fill_(cells < 0, 0)
            places = (plane[:, :, None, None] + cells).clamp_(min=0).flatten()
            total = grad.new_zeros(shape.numel()).index_add_(0, places, values.flatten())
            grads.append(total.view(shape))
        return None, None, None, None, *grads


class Maximum(torch.autograd.Function):
    """Pooling in which each bin is the maximum of its samples."""

    @staticmethod
    def forward(
        ctx: Any, parts: list[Part], num_rois: int, num_maps: int, *inputs: Tensor
    ) -> Tensor:
        maps = inputs[:num_maps]
        pooled = maps[0].new_empty(num_rois, parts[0].num_bins, maps[0].shape[1])
        needed = any(ctx.needs_input_grad)
        winner = torch.empty_like(pooled, dtype=torch.int32) if needed else None
        blocks = split_into_blocks(parts, GROUP_ELEMENTS // pooled.shape[2])
        for view, (level, images) in enumerate(views(maps)):
            table = as_table(maps[level][images])
            for block in (block for block in blocks if block.part.view == view):
                if block.slots == 0:
                    pooled.index_fill_(0, block.rows, 0)
                    continue
                best, which = _largest(table, block, needed)
                pooled.index_copy_(0, block.rows, best.to(pooled.dtype))
                if winner is not None:
                    winner.index_copy_(0, block.rows, which.int())
        ctx.parts, ctx.blocks = parts, [block for block in blocks if block.slots]
        ctx.maps = [torch.empty_like(x, device="meta") for x in maps]
        ctx.save_for_backward(winner)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (winner,) = ctx.saved_tensors
        grads = [
            torch.empty_like(like, device=grad.device) if needed else None
            for like, needed in zip(ctx.maps, ctx.needs_input_grad[3:], strict=False)
        ]
        for view, (level, images) in enumerate(views(ctx.maps)):
            total = grads[level]
            if total is not None:
                blocks = [block for block in ctx.blocks if block.part.view == view]
                total[images] = _grad_of_view(blocks, ctx.maps[level][images], grad, winner)
        return None, None, None, *grads, *[None] * (2 * len(ctx.parts))


def _cells(block: Block) -> tuple[Tensor, Tensor]:
    """Returns the cells of all samples, (n P Q, S, V) int32, and their weights."""
    (part, places, gy, gx) = block
    cells = over_y(part.y.cell[places, :, :gy])[..., None]
    cells = cells + over_x(part.x.cell[places, :, :gx])[..., None, :]
    weights = over_y(part.y.weight[places, :, :gy])[..., None]
    weights = weights * over_x(part.x.weight[places, :, :gx])[..., None, :]
    shape = block.num_bins, block.slots, -1
    return cells.reshape(shape), weights.reshape(shape)


def _outside(block: Block) -> Tensor:
    """Returns which of the (n P Q, S) samples do not count because they are off the map."""
    part, places, gy, gx = block
    inside = over_y(part.y.inside[places, :, :gy]) & over_x(part.x.inside[places, :, :gx])
    return ~inside.flatten(3).flatten(0, 2)


def _samples(table: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """Returns the samples, (n P Q, S, C)."""
    values = embedding_bag(
        cells.flatten(0, 1), table, mode="sum", per_sample_weights=weights.flatten(0, 1)
    )
    return values.unflatten(0, cells.shape[:2])


def _largest(table: Tensor, block: Block, needed: bool) -> tuple[Tensor, Tensor]:
    """Returns the largest sample of each bin, (n, P Q, C), and, if ``needed``, its index.

    The value of a bin without samples is 0. If there are many samples, channels are processed in
    blocks.
    """
    cells, weights = _cells(block)
    outside = _outside(block)
    empty = outside.all(dim=1)[:, None]
    best, which = [], []
    for columns in table.split(max(2 * GROUP_ELEMENTS // outside.numel(), 1), dim=1):
        samples = _samples(columns, cells, weights)
        samples.masked_fill_(outside[:, :, None], float("-inf"))
        if needed:
            values, numbers = samples.max(dim=1)
            which.append(numbers)
        else:
            values = samples.amax(dim=1)
        best.append(values.masked_fill_(empty, 0))
    shape = len(block.places), -1, table.shape[1]
    largest = torch.cat(best, dim=1).view(shape)
    return largest, torch.cat(which, dim=1).view(shape) if needed else largest


def _grad_of_view(blocks: list[Block], like: Tensor, grad: Tensor, winner: Tensor) -> Tensor:
    """Adds the gradient of each bin to the cells of its largest sample.

    Args:
        blocks: the blocks of the view.
        like: a tensor with the shape and layout of the view, without values.
        grad: gradient of the bins, (R, P Q, C).
        winner: index of the largest sample of each bin, (R, P Q, C) int32.

    Returns:
        The gradient of the view.
    """
    num_channels = like.shape[1]
    table = grad.new_zeros(like.numel(), dtype=sum_type(like))
    column = torch.arange(num_channels, device=grad.device)
    for block in blocks:
        cells, weights = _cells(block)
        which = winner[block.rows].flatten(0, 1).long()
        values = grad[block.rows].flatten(0, 1).to(table.dtype)
        values = values.masked_fill(_outside(block).all(dim=1)[:, None], 0)
        for corner in range(cells.shape[2]):
            cell = cells[:, :, corner].long().gather(1, which)
            weight = weights[:, :, corner].gather(1, which)
            place = (cell * num_channels + column).flatten()
            table.scatter_add_(0, place, (values * weight).flatten())
    cells = table.view(like.shape[0], *like.shape[2:], num_channels)
    return cells.permute(0, 3, 1, 2)
