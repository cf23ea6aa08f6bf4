"""Turns mask probabilities into COCO's run-length encoding without drawing masks.

detectron2 pastes each (M, M) mask into a full-size image, compares it with a threshold and encodes
the image pixel by pixel. But the pasted surface is bilinear: down a column of pixels its value is
linear between the M rows of the mask, so between two of them it crosses the threshold at most once.
Run-length encoding also goes down the columns and needs exactly these crossings. They are computed
here: the work and memory of a mask are its width times M, however tall its box.

By hand, for one column of pixels and M = 2 rows of value 1 and 0.2, in a box from y = 0 to 4: the
rows lie at y = 1 and 3, with zeros at -1 and 5 around them (half of what is 1 reaches the box's
edge, as in detectron2). The values cross 0.5 at y = 0 upwards and, between the rows, at
1 + 2 (1 - 0.5) / (1 - 0.2) = 2.25 downwards: pixels 0 and 1, whose centres are 0.5 and 1.5.

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
"""Columns of pixels whose (M + 2) values are held at a time, by device: 2 MB and 31 MB for M = 28.

On a CPU they stay in its cache. On CUDA, launching some 60 kernels each time takes most of the
time.
"""


def encode_masks(
    mask_probs: Tensor, boxes: Tensor, image_hw: tuple[int, int], threshold: float = 0.5
) -> list[Rle]:
    """Encodes masks at their places in the image; equal to detectron2's pasting and encoding.

    Equal byte for byte to ``pycocotools.mask.encode`` of ``paste_masks_in_image``, except pixels
    whose value lies within rounding of the threshold. A threshold below 0.5 widens masks beyond
    their boxes, by up to half a mask pixel, as in detectron2 on CUDA; on the CPU, detectron2 cuts
    them one image pixel outside the box.

    Args:
        mask_probs: (R, M, M) in [0, 1]. NaN counts as 0.
        boxes: (R, 4) x0, y0, x1, y1 in pixels of the image; may reach beyond it. A box without
            area, or with a NaN or infinite coordinate, has an empty mask.
        image_hw: H, W.
        threshold: above 0 and up to 1; a pixel belongs to the mask if its value is not below.

    Returns:
        R encodings, counts as bytes.

    Raises:
        ValueError: if shapes are not as above, the image has no pixels, or the threshold is out of
            its range.
    """
    height, width = image_hw
    if mask_probs.dim() != 3 or mask_probs.shape[1] != mask_probs.shape[2]:
        raise ValueError(f"mask_probs must be (R, M, M), not {tuple(mask_probs.shape)}")
    if boxes.shape != (len(mask_probs), 4):
        raise ValueError(f"boxes must be ({len(mask_probs)}, 4), not {tuple(boxes.shape)}")
    if height < 1 or width < 1 or not 0 < threshold <= 1:
        raise ValueError(
            f"image_hw is {image_hw} and threshold {threshold}: sides must be above "
            f"0, the threshold above 0 and up to 1"
        )
    mask_probs, boxes = mask_probs.detach().float(), boxes.detach().to(mask_probs.device).float()
    first, num_columns = _pixel_columns(boxes, mask_probs.shape[1], width)
    # The zeros around a mask that grid_sample reads; rows of the transpose are columns of the mask.
    grid = torch.nn.functional.pad(mask_probs.nan_to_num(0.0), (1, 1, 1, 1)).transpose(1, 2)
    positions = []
    end = num_columns.cumsum(0)
    total = int(end[-1]) if len(end) else 0  # only once, since it waits for the device
    step = MAX_COLUMNS["cuda" if boxes.is_cuda else "cpu"]
    for start in range(0, total, step):
        column = torch.arange(start, min(start + step, total), device=boxes.device)
        index = torch.searchsorted(end, column, right=True)
        x = first[index] + column - (end - num_columns)[index]
        positions.append(_crossings(grid, boxes, index, x, image_hw, threshold))
    flat = torch.cat(positions) if positions else first.new_zeros(0)
    return _runs(flat, len(boxes), image_hw)


def _pixel_columns(boxes: Tensor, side: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns the first column, and the number of columns, where each mask may be above 0."""
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
    """Returns the position of a pixel's centre between the centres of the mask's cells.

    It follows the order of operations of detectron2's paste and then of torch's grid_sample, so
    that pixels are rounded to the same side of the threshold.
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
    """Returns where the state of pixels changes, going down the columns from left to right.

    Args:
        grid: (R, M + 2, M + 2) masks, transposed, with zeros around.
        boxes: (R, 4).
        index: (J,) the mask that a column of pixels belongs to; ascending.
        x: (J,) the column's place in the image.
        image_hw: H, W.
        threshold: as in encode_masks.

    Returns:
        (X,) int64 ``index * (H W + 1) + x * H + y`` of the first pixel of the new state, y up to H;
        ascending. It includes pairs of the same position, which enclose no pixel.
    """
    height, width = image_hw
    side = grid.shape[1] - 2
    box = boxes[index]
    u = _mask_coordinate(x.float(), box[:, 0], box[:, 2], side)
    left = u.floor()
    west = u - left
    cell = left.long().clamp(-2, side) + 1
    # Beyond the zeros around the mask are more zeros.
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

    Takes the point where the line between two mask rows meets the threshold, rounded up; then
    computes the pixel there and the one above like grid_sample, which rounds differently.

    Args:
        corners: (4, X) mask values above left, above right, below left, below right.
        west: (X,) distance to the left ones, in [0, 1).
        row: (X,) mask row of the upper ones; -1 for the zeros before the first.
        new: (X,) bool, state after the crossing.
        box: (X, 4), the box of each crossing.
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
    """Encodes the changes of state that _crossings found.

    Args:
        positions: (X,) ascending.
        num_masks: R.
        image_hw: H, W.
    """
    height, width = image_hw
    num_pixels = height * width
    # An even number of changes at one place encloses no pixel: runs of neighbouring columns that
    # meet at the image's edge merge, and crossings closer together than a pixel vanish.
    places = positions.cpu().numpy()  # all at once: each operator below would wait for the device
    first = np.flatnonzero(np.diff(places, prepend=-1))
    times = np.diff(first, append=len(places))
    changes = places[first[times % 2 == 1]]
    changes = changes[changes % (num_pixels + 1) < num_pixels]
    ends = np.searchsorted(changes, np.arange(num_masks + 1) * (num_pixels + 1))
    return [
        rle_of_changes(changes[start:end] - index * (num_pixels + 1), image_hw)
        for index, (start, end) in enumerate(itertools.pairwise(ends))
    ]
