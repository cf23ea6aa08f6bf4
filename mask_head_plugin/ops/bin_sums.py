"""Pooling by weighted sums of cells: a sparse matrix times the table of a map's cells.

Shape alphabet: see roi_pooling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from .bin_layout import (
    PIECE,
    Block,
    Part,
    as_table,
    channel_blocks,
    over_x,
    over_y,
    split_into_blocks,
    sum_type,
    transposed,
    views,
)

LIST_ENTRIES = 1 << 22
"""Number of matrix entries from which a product is split to save memory: 32 MB. A thousand RoIs
usually stay below it.
"""

BATCH_ELEMENTS = 1 << 22
"""Number of elements of bins in memory at a time, in addition to the result: 16 MB of float32,
which the allocator reuses. For a large result, see MAX_BATCHES.
"""

MAX_BATCHES = 4
"""A result with more than MAX_BATCHES * BATCH_ELEMENTS elements is computed in larger batches, each
with 1 / MAX_BATCHES of its elements.
"""


class WeightedSum(torch.autograd.Function):
    """Pooling in which each bin is the sum of its cells, weighted along both axes."""

    @staticmethod
    def forward(
        ctx: Any, parts: list[Part], num_rois: int, num_maps: int, *inputs: Tensor
    ) -> Tensor:
        maps, blocks = inputs[:num_maps], split_into_blocks(parts, PIECE)
        shape = num_rois, parts[0].num_bins, maps[0].shape[1]
        max_elements = max(BATCH_ELEMENTS, math.prod(shape) // MAX_BATCHES)
        pooled: Tensor | None = None
        cut = views(maps)
        for view, (level, images) in enumerate(cut):
            feature = maps[level][images]
            columns = channel_blocks(feature)
            max_bins = max_elements / columns[0].stop if len(cut) > 1 else math.inf
            of_view = [block for block in blocks if block.part.view == view]
            for batch in _batches(of_view, max_bins):
                matrix = _Matrix(batch, map(_weights, batch))
                for channels in columns:
                    sums = matrix.times(as_table(feature[:, channels])).to(feature.dtype)
                    sums = sums.view(-1, shape[1], sums.shape[1])
                    if sums.shape == shape:
                        pooled = sums
                        continue
                    pooled = sums.new_empty(shape) if pooled is None else pooled
                    pooled[:, :, channels].index_copy_(0, matrix.rows, sums)
        assert pooled is not None, "there must be a RoI"
        ctx.parts, ctx.blocks = parts, blocks
        ctx.maps = [torch.empty_like(x, device="meta") for x in maps]
        if any(ctx.needs_input_grad[3 + num_maps :]):
            ctx.save_for_backward(*maps)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _grads_of_maps(ctx, grad)
        if ctx.saved_tensors:
            grads += _grads_of_weights(ctx, grad)
        else:
            grads += [None] * (2 * len(ctx.parts))
        return None, None, None, *grads


def _batches(blocks: list[Block], max_bins: float = math.inf) -> Iterator[list[Block]]:
    """Splits blocks into lists that end when they reach LIST_ENTRIES entries or max_bins bins."""
    batch: list[Block] = []
    entries = bins = 0
    for block in blocks:
        batch.append(block)
        bins += block.num_bins
        entries += block.num_bins * block.slots
        if entries >= LIST_ENTRIES or bins >= max_bins:
            yield batch
            batch, entries, bins = [], 0, 0
    if batch:
        yield batch


def _cells(block: Block) -> Tensor:
    """Returns the cells that the bins of a block read, (n, P, Q, Ky, Kx) int32."""
    y, x = (axis.cell[block.places] for axis in (block.part.y, block.part.x))
    return over_y(y[:, :, : block.y_slots]) + over_x(x[:, :, : block.x_slots])


def _weights(block: Block) -> Tensor:
    """Returns the weights of the cells, (n, P, Q, Ky, Kx)."""
    y, x = (axis.weight[block.places] for axis in (block.part.y, block.part.x))
    return over_y(y[:, :, : block.y_slots]) * over_x(x[:, :, : block.x_slots])


def _off_map(block: Block) -> Tensor:
    """Returns which bins of a block lie off the map, (n, P, Q)."""
    if block.part.off_map is None:
        shape = len(block.places), block.part.num_bins
        return torch.zeros(shape, dtype=torch.bool, device=block.places.device)
    y, x = (axis[block.places] for axis in block.part.off_map)
    return y[:, :, None] | x[:, None, :]


class _Matrix:
    """Rows of the sparse matrix: each bin of n RoIs on one map is a bag of cells."""

    def __init__(self, batch: list[Block], weights: Iterable[Tensor]) -> None:
        """
        Args:
            batch: blocks of the map.
            weights: weights of each block, (n, P, Q, Ky, Kx).
        """
        self.rows, order = torch.cat([block.rows for block in batch]).sort()  # among all RoIs
        places = order.tolist()

        def join(values: Iterable[Tensor]) -> Tensor:
            pieces = [piece for value in values for piece in value.flatten(1).unbind()]
            return torch.cat([pieces[place] for place in places])

        self._cells, self._weights = join(map(_cells, batch)), join(weights)
        each = [block.slots for block in batch for _ in range(len(block.places))]
        slots = torch.tensor([each[place] for place in places], dtype=torch.int32).to(order.device)
        bins = torch.arange(batch[0].part.num_bins, dtype=torch.int32, device=order.device)
        start = (slots.cumsum(0, dtype=torch.int32) - slots) * len(bins)
        self._offsets = torch.addcmul(start[:, None], slots[:, None], bins).flatten()
        self._off_map: Tensor | None = None
        if any(block.part.off_map is not None for block in batch):
            self._off_map = torch.nonzero(join(map(_off_map, batch)))[:, 0]

    def times(self, table: Tensor) -> Tensor:
        """Returns the bins (n P Q, C) from the table of cells (N H W, C)."""
        bags = embedding_bag(
            self._cells, table, self._offsets, mode="sum", per_sample_weights=self._weights
        )
        if self._off_map is not None:  # a weight of 0 times NaN would be NaN
            bags = bags.index_fill(0, self._off_map, 0)
        return bags


def _grads_of_maps(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Returns the gradient of each map, or None if it is not needed.

    The gradient is the product with the transposed matrix, in which each cell is a bag of bins.

    Args:
        ctx: the autograd context, with ``blocks`` and ``maps``.
        grad: gradient of the bins, (R, P Q, C).
    """
    needed = ctx.needs_input_grad[3:]
    cut = [(view, *source) for view, source in enumerate(views(ctx.maps)) if needed[source[0]]]
    sizes = {view: ctx.maps[level][images, 0].numel() for view, level, images in cut}
    totals: dict[int, Tensor] = {}
    batches = _batches([block for block in ctx.blocks if block.part.view in sizes])
    for number, batch in enumerate(batches):
        lists = _transposed(batch, sizes)
        for level, of_level in groupby(cut, key=itemgetter(1)):
            like, of_map = ctx.maps[level], list(of_level)
            for channels in channel_blocks(like[of_map[0][2]]):
                rows = grad[:, :, channels].to(sum_type(like)).flatten(0, 1).contiguous()
                for view, _, images in of_map:
                    cells = _sums_of_bins(rows, like[images], *lists[view])
                    if number > 0:
                        totals[level][images, channels] += cells
                    elif cells.shape == like.shape:
                        totals[level] = cells
                    else:
                        empty = partial(torch.empty_like, dtype=cells.dtype, device=cells.device)
                        totals.setdefault(level, empty(like))[images, channels] = cells
    return [
        totals[level].to(grad.dtype)
        if level in totals
        else (torch.zeros_like(like, device=grad.device) if needed[level] else None)
        for level, like in enumerate(ctx.maps)
    ]


def _sums_of_bins(
    rows: Tensor, like: Tensor, bins: Tensor, weights: Tensor, offsets: Tensor
) -> Tensor:
    """Returns the gradient (N, C, H, W) of a view from the gradient of the bins (R P Q, C)."""
    sums = embedding_bag(bins, rows, offsets, mode="sum", per_sample_weights=weights)
    if like.is_contiguous(memory_format=torch.channels_last):
        return sums.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2)
    return transposed(sums.view(len(like), -1, sums.shape[1])).unflatten(2, like.shape[2:])


def _transposed(
    batch: list[Block], sizes: dict[int, int]
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Sorts the entries of a batch by cell.

    Args:
        batch: blocks of any views.
        sizes: number of cells in each view, in the order of the views.

    Returns:
        For each view, the bins (int32, numbered among all R P Q) and the weights of its entries,
        and the index at which the entries of each cell begin. Entries with weight 0 are left out.
    """
    numbers, num_cells = list(sizes), sum(sizes.values())
    first_cells = list(accumulate(sizes.values(), initial=0))
    all_cells, all_weights, all_bins = [], [], []
    for block in batch:
        part, weights = block.part, _weights(block)
        cells = _cells(block).add_(first_cells[numbers.index(part.view)])
        cells.masked_fill_(weights == 0, num_cells)  # sorts them to the end
        number = torch.arange(part.num_bins, dtype=torch.int32, device=cells.device)
        bins = block.rows.int()[:, None, None] * part.num_bins + number[:, None]
        all_cells.append(cells.flatten())
        all_weights.append(weights.flatten())
        all_bins.append(bins.expand(-1, -1, block.slots).flatten())
    cells, order = torch.sort(torch.cat(all_cells), stable=True)
    bins, weights = torch.cat(all_bins).take(order), torch.cat(all_weights).take(order)
    ends = torch.bincount(cells, minlength=num_cells + 1).cumsum(0, dtype=torch.int32)
    starts = torch.cat([ends.new_zeros(1), ends])
    lists = {}
    for view, (first, last) in zip(numbers, pairwise(first_cells), strict=True):
        entries = slice(int(starts[first]), int(starts[last]))
        lists[view] = bins[entries], weights[entries], starts[first:last] - starts[first]
    return lists


def _grads_of_weights(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Returns the gradients of the weights of each part, along y and along x.

    Args:
        ctx: the autograd context, with ``blocks``, ``parts`` and the maps as saved tensors.
        grad: gradient of the bins, (R, P Q, C).
    """
    grads = {
        part: [torch.zeros_like(axis.weight) for axis in (part.y, part.x)] for part in ctx.parts
    }
    for view, (level, images) in enumerate(views(ctx.saved_tensors)):
        for batch in _batches([block for block in ctx.blocks if block.part.view == view]):
            weights = [_weights(block).requires_grad_() for block in batch]
            with torch.enable_grad():
                matrix = _Matrix(batch, weights)
                bins = matrix.times(as_table(ctx.saved_tensors[level][images]))
            rows = grad[matrix.rows].flatten(0, 1).to(bins.dtype)
            d_weights = torch.autograd.grad(bins, weights, rows)
            for (part, places, ky, kx), d in zip(batch, d_weights, strict=True):
                grad_y, grad_x = grads[part]
                # Only products and sums are used, because autocast does not change their dtype.
                grad_y[places, :, :ky] += (d * over_x(part.x.weight[places, :, :kx])).sum((2, 4))
                grad_x[places, :, :kx] += (d * over_y(part.y.weight[places, :, :ky])).sum((1, 3))
    return [axis for part in ctx.parts for axis in grads[part]]
