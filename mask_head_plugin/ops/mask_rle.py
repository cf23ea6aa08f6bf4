"""Turns mask probabilities into COCO's run-length encoding without drawing masks.

detectron2 pastes each (M, M) mask into a full-size image, compares it with a threshold and encodes
the image pixel by pixel. But the pasted surface is bilinear. Down a column of pixels, its value is
linear between the M rows of the mask, so between two rows it crosses the threshold at most once.
Run-length encoding also proceeds down the columns and needs exactly these crossings, which this
module computes directly. Time and memory for a mask are proportional to its width times M,
regardless of the height of its box.

Example: one column of pixels and M = 2 rows with the values 1 and 0.2, in a box from y = 0 to 4.
The centres of the rows are at y = 1 and 3, with zeros at -1 and 5 around them. At the edge of the
box, the value is therefore half that of the nearest row, as in detectron2. From top to bottom, the
value rises above 0.5 at y = 0 and falls below 0.5 between the rows, at
1 + 2 (1 - 0.5) / (1 - 0.2) = 2.25. The mask consists of pixels 0 and 1, whose centres are at 0.5
and 1.5.

Shape alphabet: R RoIs, M mask side, H and W sides of the image, J pixel columns in the boxes of all
RoIs, X crossings.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from ..run_lengths import Rle, rle_of_changes

MAX_COLUMNS = {"cpu": 1 << 14, "cuda": 1 << 18}
"""Number of columns, each of M + 2 values, processed at a time: 2 MB and 31 MB for M = 28.

On a CPU, this many columns fit into the cache. On CUDA, batches are larger, because most of the
time is spent on launching about 60 kernels per batch.
"""


def encode_masks(
    mask_probs: Tensor, boxes: Tensor, image_hw: tuple[int, int], threshold: float = 0.5
) -> list[Rle]:
    """Encodes masks at their positions in the image.

    The result equals ``pycocotools.mask.encode`` of detectron2's ``paste_masks_in_image`` byte for
    byte, except for pixels whose value equals the threshold up to rounding. If the threshold is
    below 0.5, masks extend beyond their boxes by up to half a mask pixel, as in detectron2 on CUDA.
    On the CPU, detectron2 cuts masks off one image pixel outside the box.

    Args:
        mask_probs: (R, M, M) in [0, 1]. NaN counts as 0.
        boxes: (R, 4) x0, y0, x1, y1 in pixels of the image; may extend beyond it. A box without
            area, or with a NaN or infinite coordinate, has an empty mask.
        image_hw: H, W.
        threshold: in (0, 1]. A pixel belongs to the mask if its value is at least the threshold.

    Returns:
        R encodings, with counts as bytes.

    Raises:
        ValueError: if a shape is wrong, the image has no pixels, or the threshold is out of range.
    """
    height, width = image_hw
    if mask_probs.dim() != 3 or mask_probs.shape[1] != mask_probs.shape[2]:
        raise ValueError(f"mask_probs must be (R, M, M), not {tuple(mask_probs.shape)}")
    if boxes.shape != (len(mask_probs), 4):
        raise ValueError(f"boxes must be ({len(mask_probs)}, 4), not {tuple(boxes.shape)}")
    if height < 1 or width < 1 or not 0 < threshold <= 1:
        raise ValueError(
            f"image_hw is {image_hw} and threshold {threshold}: sides must be at least 1, and the "
            "threshold must be above 0 and at most 1"
        )
    mask_probs, boxes = mask_probs.detach().float(), boxes.detach().to(mask_probs.device).float()
    first, num_columns = _pixel_columns(boxes, mask_probs.shape[1], width)
    # Padded with the zeros that grid_sample assumes around a mask. Transposed, so that each row of
    # the grid is a column of the mask.
    grid = torch.nn.functional.pad(mask_probs.nan_to_num(0.0), (1, 1, 1, 1)).transpose(1, 2)
    positions = []
    end = num_columns.cumsum(0)
    total = int(end[-1]) if len(end) else 0  # synchronises with the device, so only once
    step = MAX_COLUMNS["cuda" if boxes.is_cuda else "cpu"]
    for start in range(0, total, step):
        column = torch.arange(start, min(start + step, total), device=boxes.device)
        index = torch.searchsorted(end, column, right=True)
        x = first[index] + column - (end - num_columns)[index]
        positions.append(_crossings(grid, boxes, index, x, image_hw, threshold))
    flat = torch.cat(positions) if positions else first.new_zeros(0)
    return _runs(flat, len(boxes), image_hw)


def _pixel_columns(boxes: Tensor, side: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns each mask's first pixel column, and its number of pixel columns.

    In all other columns of the image, the mask is 0.
    """
    x0, y0, x1, y1 = boxes.unbind(1)
    reach = (x1 - x0) / (2 * side)  # half a mask pixel
    first = (x0 - reach - 0.5).floor().clamp(0, width)
    last = (x1 + reach + 0.5).ceil().clamp(0, width)
    valid = (x1 > x0) & (y1 > y0) & boxes.isfinite().all(1)
    return (
        torch.where(valid, first, 0).long(),
        torch.where(valid, (last - first).clamp(min=0), 0).long(),
    )


def _mask_coordinate(pixel: Tensor, low: Tensor, high: Tensor, side: int) -> Tensor:
    """Returns the position of a pixel's centre in mask cells, with cell centres at whole numbers.

    The operations have the same order as in detectron2's paste and then in torch's grid_sample.
    Rounding therefore puts pixels on the same side of the threshold.
    """
    return ((pixel + 0.5 - low) / (high - low) * 2 - 1 + 1) * (side / 2) - 0.5


def _crossings(
    grid: Tensor,
    boxes: Tensor,
    index: Tensor,
    x: Tensor,
    image_hw: tuple[int, int],
    threshold: float,
) -> Tensor:
    """Returns the positions at which pixels switch between mask and background.

    Pixels are visited column by column, from top to bottom.

    Args:
        grid: (R, M + 2, M + 2) masks, transposed and padded with zeros.
        boxes: (R, 4).
        index: (J,) the mask that each column of pixels belongs to; ascending.
        x: (J,) the column's position in the image.
        image_hw: H, W.
        threshold: as in encode_masks.

    Returns:
        (X,) int64 ``index * (H W + 1) + x * H + y`` of the first pixel after each switch, in
        ascending order; y can be H. Two switches with the same position have no pixel between them.
    """
    height, width = image_hw
    side = grid.shape[1] - 2
    box = boxes[index]
    u = _mask_coordinate(x.float(), box[:, 0], box[:, 2], side)
    left = u.floor()
    west = u - left
    cell = left.long().clamp(-2, side) + 1
    # Clamping is correct because everything beyond the padding is also 0.
    columns = [index * (side + 2) + k.clamp(0, side + 1) for k in (cell, cell + 1)]
    low, high = (grid.flatten(0, 1)[k] for k in columns)  # (J, M + 2) each
    above = (low * (1 - west)[:, None] + high * west[:, None]) >= threshold
    column, row = (above[:, 1:] != above[:, :-1]).nonzero(as_tuple=True)
    corners = torch.stack([low[column, row], high[column, row], low[column, row + 1],
                           high[column, row + 1]])  # fmt: skip
    new = above[column, row + 1]
    y = _first_row(corners, west[column], row - 1, new, box[column], side, threshold)
    return index[column] * (height * width + 1) + x[column] * height + y.clamp(0, height).long()


def _first_row(
    corners: Tensor,
    west: Tensor,
    row: Tensor,
    new: Tensor,
    box: Tensor,
    side: int,
    threshold: float,
) -> Tensor:
    """Returns the first row of pixels after a crossing.

    Finds the point where the line between two mask rows crosses the threshold, and rounds it up to
    a row of pixels. grid_sample rounds differently, so the value of this pixel and of the pixel
    above it are then computed as in grid_sample.

    Args:
        corners: (4, X) mask values at the upper left, upper right, lower left and lower right.
        west: (X,) distance to the left corners, in [0, 1).
        row: (X,) mask row of the upper corners; -1 if they are the zeros above the first row.
        new: (X,) bool, whether pixels after the crossing belong to the mask.
        box: (X, 4), the box of the mask that each crossing belongs to.
        side: M.
        threshold: as in encode_masks.
    """
    (y0, y1), east = (box[:, 1], box[:, 3]), 1 - west
    upper = corners[0] * east + corners[1] * west
    lower = corners[2] * east + corners[3] * west
    fraction = ((threshold - upper) / (lower - upper)).clamp(0, 1)
    y = ((row + fraction + 0.5) / side * (y1 - y0) + y0 - 0.5).ceil()

    def is_behind(y: Tensor) -> Tensor:
        south = _mask_coordinate(y, y0, y1, side) - row
        north = 1 - south
        weights = (east * north, west * north, east * south, west * south)
        products = [corner * weight for corner, weight in zip(corners, weights, strict=True)]
        value = products[0] + products[1] + products[2] + products[3]
        return (south >= 1) | ((south >= 0) & ((value >= threshold) == new))

    return torch.where(is_behind(y - 1), y - 1, torch.where(is_behind(y), y, y + 1))


def _runs(positions: Tensor, num_masks: int, image_hw: tuple[int, int]) -> list[Rle]:
    """Encodes the switches found by _crossings.

    Args:
        positions: (X,) ascending.
        num_masks: R.
        image_hw: H, W.
    """
    height, width = image_hw
    num_pixels = height * width
    # An even number of switches at one position has no effect, so they are dropped. This merges
    # runs of neighbouring columns that meet at the image's edge, and removes crossings that are
    # less than a pixel apart.
    places = positions.cpu().numpy()  # copied once; on the device, each operator would synchronise
    first = np.flatnonzero(np.diff(places, prepend=-1))
    times = np.diff(first, append=len(places))
    changes = places[first[times % 2 == 1]]
    changes = changes[changes % (num_pixels + 1) < num_pixels]
    ends = np.searchsorted(changes, np.arange(num_masks + 1) * (num_pixels + 1))
    return [
        rle_of_changes(changes[start:end] - index * (num_pixels + 1), image_hw)
        for index, (start, end) in enumerate(itertools.pairwise(ends))
    ]
