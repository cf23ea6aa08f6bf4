"""Mask targets: the part of a full-size bit mask that lies in a box, at the mask head's resolution.

A target is ROIAlign of the mask, at least 0.5 (Mask R-CNN section 3: "the intersection between an
RoI and its associated ground-truth mask"). ROIAlign is separable (see axis_weights), so a target is
two small matrix products with the pixels of the box; the rest of the image is not read.

Shape alphabet: R RoIs, H and W sides of the image, M mask side, h and w pixels that a RoI touches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from .axis_weights import AxisWeights, roi_align_weights

CHUNK = 32
"""RoIs whose weights, or on CUDA whose masks, are held as float32 at a time."""


def crop_masks(bit_masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops each mask to its box and resizes it; equal to detectron2's BitMasks.crop_and_resize.

    Differs from it only by rounding, for pixels of which about half is foreground.

    Args:
        bit_masks: (R, H, W) bool, or any type with 0 and 1.
        boxes: (R, 4) x0, y0, x1, y1 in pixels of the masks. Boxes that end before they start give
            masks that are all False, as do boxes off the image.
        size: M.

    Returns:
        (R, M, M) bool on the device of the masks.

    Raises:
        ValueError: if shapes are not as above or, on the CPU, a coordinate is NaN or infinite.
    """
    if bit_masks.dim() != 3 or boxes.shape != (len(bit_masks), 4):
        raise ValueError(
            f"bit_masks must be (R, H, W) and boxes (R, 4), not {tuple(bit_masks.shape)} and "
            f"{tuple(boxes.shape)}"
        )
    boxes = boxes.detach().to(bit_masks.device, torch.float32)
    shares = boxes.new_empty(len(boxes), size, size)
    if bit_masks.is_cuda:
        for start in range(0, len(boxes), CHUNK):
            chunk = slice(start, start + CHUNK)
            shares[chunk] = _crop_with_operator(bit_masks[chunk], boxes[chunk], size)
        return shares >= 0.5
    bad = len(boxes) - int(torch.isfinite(boxes).all(dim=1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(boxes)} boxes have NaN or infinite coordinates")
    if len(boxes) == 0:
        return shares.bool()
    # Boxes of like size share a chunk: its weights are as wide as its widest box.
    order = (boxes[:, 2:] - boxes[:, :2]).amax(1).argsort()
    with torch.autocast("cpu", enabled=False):  # shares next to a half must not be rounded
        for chunk in order.split(CHUNK):
            shares[chunk] = _crop_by_products(bit_masks, chunk, boxes[chunk], size)
    return shares >= 0.5


def _crop_with_operator(bit_masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Torchvision's operator, which does not wait for the device."""
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    rois = torch.cat([index, boxes], dim=1)
    return torchvision_roi_align(bit_masks[:, None].float(), rois, size, 1.0, 0, True)[:, 0]


def _crop_by_products(bit_masks: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Returns the share of foreground in each bin of some RoIs, (n, M, M) for (n,) ``index``."""
    height, width = bit_masks.shape[1:]
    wy, first_y, num_y = _dense_rows(roi_align_weights(boxes[:, 1], boxes[:, 3], size, height))
    wx, first_x, num_x = _dense_rows(roi_align_weights(boxes[:, 0], boxes[:, 2], size, width))
    rows = wx.new_zeros(len(index), size, wx.shape[2])
    windows = zip(first_y, num_y, first_x, num_x, strict=True)
    for k, (mask, (y, h, x, w)) in enumerate(zip(index.tolist(), windows, strict=True)):
        pixels = bit_masks[mask, y : y + h, x : x + w].to(wy.dtype)
        torch.mm(wy[k, :, :h], pixels, out=rows[k, :, :w])
    return torch.bmm(rows, wx.transpose(1, 2))


def _dense_rows(axis: AxisWeights) -> tuple[Tensor, list[int], list[int]]:
    """Returns (n, M, h) weights of all pixels of a RoI's window, and its first pixel and length."""
    first, last = axis.cell.flatten(1).amin(1), axis.cell.flatten(1).amax(1)
    length = last - first + 1
    rows = axis.weight.new_zeros(*axis.cell.shape[:2], int(length.max()))
    rows.scatter_add_(2, (axis.cell - first[:, None, None]).long(), axis.weight)
    return rows, first.tolist(), length.tolist()
