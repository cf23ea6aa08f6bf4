"""Non-maximum suppression within groups (classes or pyramid maps) as one ONNX operator.

Shape alphabet: G groups, R boxes, S boxes kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

NO_CANDIDATE = float("-inf")
"""Score of a box that is not considered."""


def class_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int, image_edge: Tensor
) -> Tensor:
    """Keeps boxes that do not overlap a better box of their group by more than the threshold.

    Unlike in torchvision.ops.batched_nms, rounding can never make groups overlap.

    Args:
        boxes: (G, R, 4), inside the image.
        scores: (G, R); NO_CANDIDATE for excluded boxes.
        iou_threshold: in [0, 1].
        limit: most boxes per group that the ONNX operator keeps; a negative value keeps all.
            PyTorch ignores the limit, so callers must apply it to the result.
        image_edge: (4,), at least as large as any coordinate.

    Returns:
        (S,) int64 indices ``group * R + box`` in unspecified order.
    """
    if torch.onnx.is_in_onnx_export():
        kept = _NonMaxSuppression.apply(boxes, scores, iou_threshold, limit)
        return kept[:, 0] * scores.shape[1] + kept[:, 2]
    index = torch.nonzero(scores.reshape(-1) > NO_CANDIDATE)[:, 0]
    # In float64, shifting a group away from the others does not round its boxes.
    group = (index // scores.shape[1]).double()[:, None]
    apart = boxes.reshape(-1, 4)[index].double() + group * (image_edge.max().double() + 1)
    # torch.export assumes that at least two boxes are kept, so two empty ones are appended.
    apart = F.pad(apart, [0, 0, 0, 2])
    ranks = F.pad(scores.reshape(-1)[index].double(), [0, 2], value=NO_CANDIDATE)
    kept = torchvision.ops.nms(apart, ranks, iou_threshold)
    return index[kept[:-2]]


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX's operator, which takes the groups as a batch."""

    @staticmethod
    def forward(_ctx: Any, _boxes: Tensor, scores: Tensor, *_options: Any) -> Tensor:
        """Returns a result of the right shape; a trace does not need the values."""
        return torch.zeros(min(scores.numel(), 1), 3, dtype=torch.int64)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_threshold: float, limit: int) -> Any:
        def constant(value: float, dtype: torch.dtype) -> Any:
            return g.op("Constant", value_t=torch.tensor([value], dtype=dtype))

        one = constant(1, torch.int64)
        return g.op(
            "NonMaxSuppression",
            boxes,
            g.op("Unsqueeze", scores, one),
            constant(limit if limit >= 0 else 2**31 - 1, torch.int64),
            constant(iou_threshold, torch.float32),
            constant(torch.finfo(torch.float32).min, torch.float32),
        )
