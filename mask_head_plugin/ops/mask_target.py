"""Mask targets: the part of a full-size bit mask inside a box, at the mask head's resolution.

A target is RoIAlign of the mask, thresholded at 0.5 (Mask R-CNN section 3: "the intersection
between an RoI and its associated ground-truth mask"). RoIAlign is separable (see axis_weights), so
it is computed by summing the rows of the box's pixels, and then the columns of these sums. Pixels
outside the box are not read.

Shape alphabet: R RoIs, H and W sides of the image, M mask side, h and w sides of the window of
pixels that a RoI touches.
"""

from __future__ import annotations

import torch
import torchvision  # noqa: F401 - registers torch.ops.torchvision
from torch import Tensor
from torch.nn.functional import embedding_bag

from .axis_weights import roi_align_weights

CHUNK = 128
"""Number of RoIs processed at a time. It limits the memory for their weights (on CUDA, for their
masks), which are float32.
"""

WINDOW_PIXELS = 1 << 22
"""Largest number of pixels that are converted to float32 at a time: 16 MB."""


def crop_masks(bit_masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops each mask to its box and resizes it, like detectron2's BitMasks.crop_and_resize.

    Differs from detectron2 only in the rounding of pixels that are about half foreground, and for
    boxes longer than MAX_MAP_SIZES images, for which the sampling grid stops growing.

    Args:
        bit_masks: (R, H, W) bool, or any dtype with the values 0 and 1.
        boxes: (R, 4) x0, y0, x1, y1 in pixels of the masks. Boxes off the image, and boxes that end
            before they start, get masks that are all False.
        size: M.

    Returns:
        (R, M, M) bool on the device of the masks.

    Raises:
        ValueError: if a shape is wrong or, on the CPU, a coordinate is NaN or infinite.
    """
    if bit_masks.dim() != 3 or boxes.shape != (len(bit_masks), 4):
        raise ValueError(
            f"bit_masks must be (R, H, W) and boxes (R, 4), not {tuple(bit_masks.shape)} and "
            f"{tuple(boxes.shape)}"
        )
    if size < 1 or 0 in bit_masks.shape[1:]:
        raise ValueError(
            f"size is {size} and bit_masks are {tuple(bit_masks.shape)}: no side may be 0"
        )
    boxes = boxes.detach().to(bit_masks.device, torch.float32)
    one_operator = bit_masks.is_cuda or torch.compiler.is_compiling()
    if torch.compiler.is_compiling():
        torch._assert_async(torch.isfinite(boxes).all(), "boxes with NaN or infinite coordinates")
    elif not bit_masks.is_cuda and not torch.isfinite(boxes).all():
        bad = len(boxes) - int(torch.isfinite(boxes).all(dim=1).sum())
        raise ValueError(f"{bad} of {len(boxes)} boxes have NaN or infinite coordinates")
    if len(boxes) == 0:
        return boxes.new_zeros(0, size, size, dtype=torch.bool)
    if bit_masks.dtype == torch.bool:
        bit_masks = bit_masks.view(torch.uint8)  # converts to float32 twice as fast as bool
    crop = _crop_with_operator if one_operator else _crop_by_sums
    chunks = zip(bit_masks.split(CHUNK), boxes.split(CHUNK), strict=True)
    targets = [crop(masks, chunk, size) >= 0.5 for masks, chunk in chunks]
    return targets[0] if len(targets) == 1 else torch.cat(targets)


def _crop_with_operator(bit_masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops with torchvision's operator, which neither synchronises nor breaks graphs.

    Does not call torchvision's Python function, because in deterministic mode that function samples
    all pixels of a mask to make gradients deterministic. No gradients are needed here.
    """
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    rois = torch.cat([index, boxes], dim=1)
    masks = bit_masks[:, None].float()
    return torch.ops.torchvision.roi_align(masks, rois, 1.0, size, size, 0, True)[:, 0]


def _crop_by_sums(bit_masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    height, width = bit_masks.shape[1:]
    y = roi_align_weights(boxes[:, 1], boxes[:, 3], size, height)
    x = roi_align_weights(boxes[:, 0], boxes[:, 2], size, width)
    top, bottom = y.cell.flatten(1).aminmax(dim=1)
    left, right = x.cell.flatten(1).aminmax(dim=1)
    span = _rounded_widths(right - left + 1).clamp(max=width)
    left = torch.minimum(left, width - span)
    windows = list(zip(top.tolist(), bottom.tolist(), left.tolist(), span.tolist(), strict=True))
    # All RoIs share one table of column sums. The sums of a RoI begin at `first`.
    tables, num_rows, first = [], 0, torch.zeros_like(left)
    for w in span.unique().tolist():
        for group in torch.nonzero(span == w)[:, 0].split(max(WINDOW_PIXELS // (height * w), 1)):
            pixels = torch.cat([_window(bit_masks[r], *windows[r]) for r in group.tolist()])
            end = (bottom - top + 1)[group].cumsum(0, dtype=torch.int32)
            row = y.cell[group] + (end - bottom[group] - 1)[:, None, None]
            sums = embedding_bag(
                row.flatten(0, 1),
                pixels.to(y.weight.dtype),
                per_sample_weights=y.weight[group].flatten(0, 1),
                mode="sum",
            )
            tables.append(sums.unflatten(0, (-1, size)).transpose(1, 2).flatten(0, 1))
            first[group] = num_rows + w * torch.arange(len(group), dtype=torch.int32)
            num_rows += len(tables[-1])
    columns = (x.cell + (first - left)[:, None, None]).flatten(0, 1)
    weights, table = x.weight.flatten(0, 1), torch.cat(tables)
    shares = embedding_bag(columns, table, per_sample_weights=weights, mode="sum")
    return shares.unflatten(0, (-1, size)).transpose(1, 2)


def _rounded_widths(widths: Tensor) -> Tensor:
    """Rounds widths up to 32, 48, 64, 96, 128, … so that there are only a few groups of RoIs."""
    mantissa, exponent = torch.frexp(widths.float())
    return torch.ldexp((mantissa * 4).ceil() / 4, exponent).clamp(min=32).to(widths.dtype)


def _window(bits: Tensor, top: int, bottom: int, left: int, width: int) -> Tensor:
    return bits[top : bottom + 1, left : left + width]
