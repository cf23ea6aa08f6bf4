"""Turns mask probabilities into run lengths, without PyTorch and without drawing masks.

This is ``ops.mask_rle`` in NumPy, for one mask at a time. Along each pixel column of a box, the
pasted surface is linear between the mask's rows, and runs begin and end where it crosses the
threshold. Time and memory for a mask are proportional to the width of its box times M, regardless
of the height of the box and of the image.

Differs from ``ops.mask_rle``: if a crossing is at the centre of a pixel up to rounding, the two
modules may place it on different sides of the centre.

Shape alphabet: R RoIs, M mask side, H and W sides of the image, J pixel columns of a box, X
crossings.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..run_lengths import Rle, as_text, rle_of_changes

FloatArray = npt.NDArray[np.float32]
NOTHING = np.zeros(0, np.int64)


def paste_masks(
    mask_probs: FloatArray, boxes: FloatArray, image_hw: tuple[int, int], threshold: float
) -> list[Rle]:
    """Returns the run lengths, with counts as text, of masks at their positions in the image.

    Args:
        mask_probs: (R, M, M) in [0, 1]. NaN counts as 0.
        boxes: (R, 4) x0, y0, x1, y1 in pixels of the image; may extend beyond it. A box without
            area, or with a NaN or infinite coordinate, has an empty mask.
        image_hw: H, W.
        threshold: in (0, 1]. A pixel belongs to the mask if its value is at least the threshold.
    """
    # Transposed, so that each row of a grid is a column of the mask.
    grids = np.nan_to_num(mask_probs.astype(np.float64)).transpose(0, 2, 1)
    grids = np.pad(grids, ((0, 0), (2, 2), (1, 1)))
    pairs = zip(grids, boxes.astype(np.float64), strict=True)
    changes = (_changes(grid, box, image_hw, threshold) for grid, box in pairs)
    return [as_text(rle_of_changes(x, image_hw)) for x in changes]


def _changes(
    grid: npt.NDArray[np.float64],
    box: npt.NDArray[np.float64],
    image_hw: tuple[int, int],
    threshold: float,
) -> npt.NDArray[np.int64]:
    """Returns the positions at which pixels switch between mask and background.

    The positions are the input of ``rle_of_changes``.

    Args:
        grid: (M + 4, M + 2), the transposed mask, padded with zeros.
        box: (4,).
        image_hw: H, W.
        threshold: as in paste_masks.
    """
    x0, y0, x1, y1 = box
    if not (np.isfinite(box).all() and x1 > x0 and y1 > y0):
        return NOTHING
    (height, width), side = image_hw, len(grid) - 4
    # Beyond the outermost cell centres, values fall to 0 over the length of one cell. Half of this
    # length is outside the box.
    reach = (x1 - x0) / side / 2
    first, last = np.clip([np.floor(x0 - reach - 0.5), np.ceil(x1 + reach + 0.5)], 0, width)
    x = np.arange(int(first), int(last))
    # Positions of the pixel centres, in rows of the grid.
    u = ((x + 0.5 - x0) / (x1 - x0) * side + 1.5).clip(0, side + 2.5)
    cell = u.astype(np.int64)
    share = (u - cell)[:, None]
    values = grid[cell] * (1 - share) + grid[cell + 1] * share  # (J, M + 2)
    inside = values >= threshold
    column, row = np.nonzero(inside[:, 1:] != inside[:, :-1])
    upper, lower = values[column, row], values[column, row + 1]
    place = row - 1 + (threshold - upper) / (lower - upper)  # (X,) in rows of the mask
    y = (place + 0.5) / side * (y1 - y0) + y0 - 0.5
    # A pixel whose value equals the threshold belongs to the mask.
    y = np.where(inside[column, row], np.floor(y) + 1, np.ceil(y)).clip(0, height)
    changes, times = np.unique(x[column] * height + y.astype(np.int64), return_counts=True)
    # An even number of switches at one position has no effect, so they are dropped. This merges
    # runs of neighbouring columns that meet at the image's edge, and removes crossings that are
    # less than a pixel apart.
    changes = changes[times % 2 == 1]
    return changes[changes < height * width]
