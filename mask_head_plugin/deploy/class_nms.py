"""Non-maximum suppression within groups (classes or maps of a pyramid) as one ONNX operator.

Shape alphabet: G groups, R boxes, S boxes kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

NO_CANDIDATE = float("-inf")
"""Score of a box that is never kept."""


def class_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int, image_edge: Tensor
) -> Tensor:
    """Keeps boxes that do not overlap a better box of their group by more than the threshold.

    Unlike in torchvision.ops.batched_nms, rounding can never make boxes of two groups overlap.

    Args:
        boxes: (G, R, 4), inside the image.
        scores: (G, R); NO_CANDIDATE for boxes to leave out.
        iou_threshold: in [0, 1].
        limit: largest number of boxes per group that the ONNX operator keeps; a negative value
            keeps all. In PyTorch, the limit is ignored, so callers must apply it to the result.
        image_edge: (4,), at least as large as any coordinate.

    Returns:
        (S,) int64 indices ``group * R + box`` in unspecified order.
    """
    if torch.onnx.is_in_onnx_export():
        kept = _NonMaxSuppression.apply(boxes, scores, iou_threshold, limit)
        return kept[:, 0] * scores.shape[1] + kept[:, 2]
    index = torch.nonzero(scores.reshape(-1) > NO_CANDIDATE)[:, 0]
    # Shifts the groups apart, in float64 so that this does not round their boxes.
    group = (index // scores.shape[1]).double()[:, None]
    apart = boxes.reshape(-1, 4)[index].double() + group * (image_edge.max().double() + 1)
    # torch.export assumes that at least two boxes are kept, so two empty boxes are appended.
    apart = F.pad(apart, [0, 0, 0, 2])
    ranks = F.pad(scores.reshape(-1)[index].double(), [0, 2], value=NO_CANDIDATE)
    kept = torchvision.ops.nms(apart, ranks, iou_threshold)
    return index[kept[:-2]]


class _NonMaxSuppression(torch.autograd.Function):
    """The NonMaxSuppression operator of ONNX, which takes the groups as a batch."""

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
