"""RoI pooling from one or several feature maps.

Shape alphabet: N images, R RoIs, C channels, P pooled side, Hi and Wi sides of feature map i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not in its __all__
from torchvision.ops import roi_align as torchvision_roi_align
from torchvision.ops import roi_pool

from ..ops import roi_align

POOLER_TYPES = ("ROIPool", "ROIAlign", "ROIAlignV2")


class MultiLevelRoIPooler(nn.Module):
    """Pools each box from the feature map that fits its size; a drop-in for detectron2's ROIPooler.

    A box goes to level ``floor(canonical_level + log2(sqrt(area) / canonical_box_size))``, clamped
    to the levels there are: equation 1 of the FPN paper (arXiv 1612.03144).

    ROIAlign runs as separable products on the CPU (ops.roi_align; the result is channels_last) and
    as torchvision's operator on CUDA and in traces; ROIPool, a maximum, is torchvision's always. It
    can be traced, not scripted.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        """
        Args:
            output_size: P, the side of the pooled square, or a pair (height, width).
            scales: for each feature map, finest first, its size relative to the image: 1 / stride.
                Strides are powers of 2, each twice the one before.
            sampling_ratio: sample points per bin and axis of ROIAlign and ROIAlignV2;
                0 takes ``ceil(RoI side / P)``. ROIPool ignores it.
            pooler_type: ``ROIPool`` (max over a quantized box), ``ROIAlign`` (no half-pixel shift,
                detectron's) or ``ROIAlignV2`` (the paper's, pixel centres at +0.5).
            canonical_box_size: side in pixels of a box that belongs to ``canonical_level``.
            canonical_level: log2 of the stride of that level.

        Raises:
            ValueError: if ``pooler_type`` is unknown or ``scales`` do not form a pyramid.
        """
        super().__init__()
        if pooler_type not in POOLER_TYPES:
            raise ValueError(f"unknown POOLER_TYPE {pooler_type!r}; choose from {POOLER_TYPES}")
        if canonical_box_size <= 0 or not scales or min(scales) <= 0:
            raise ValueError(
                f"scales {tuple(scales)} must be positive, one or more, and canonical_box_size "
                f"{canonical_box_size} above 0"
            )
        levels = [-math.log2(scale) for scale in scales]
        if levels != [levels[0] + i for i in range(len(levels))] or not levels[0].is_integer():
            raise ValueError(f"scales {tuple(scales)} do not halve from one level to the next")
        height, width = [output_size] * 2 if isinstance(output_size, int) else output_size
        self.output_size = (height, width)
        self.scales = tuple(scales)
        self.sampling_ratio = sampling_ratio
        self.pooler_type = pooler_type
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level
        self.min_level = int(levels[0])

    def forward(self, features: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """
        Args:
            features: one (N, C, Hi, Wi) map per scale.
            box_lists: N Boxes, R in all, in pixels of the network's input.

        Returns:
            (R, C, P, P) in the order of the boxes.

        Raises:
            ValueError: if the number of maps or of images does not fit or, on the CPU, a box
                coordinate is NaN or infinite.
        """
        if len(features) != len(self.scales):
            raise ValueError(f"got {len(features)} feature maps for {len(self.scales)} scales")
        if len(box_lists) != features[0].shape[0]:
            raise ValueError(
                f"got boxes of {len(box_lists)} images, maps of {features[0].shape[0]}"
            )
        if not box_lists:
            return features[0].new_zeros(0, features[0].shape[1], *self.output_size)
        rois = convert_boxes_to_pooler_format(box_lists)
        # Such a box would belong to no level. On CUDA the test would wait for the device.
        if rois.device.type == "cpu" and not is_tracing() and not torch.isfinite(rois).all():
            bad = int((~torch.isfinite(rois)).any(dim=1).sum())
            raise ValueError(f"{bad} of {len(rois)} boxes have NaN or infinite coordinates")
        if len(features) == 1:
            return self._pool(features[0], rois, self.scales[0])
        max_level = self.min_level + len(self.scales) - 1
        levels = assign_boxes_to_levels(
            box_lists, self.min_level, max_level, self.canonical_box_size, self.canonical_level
        )
        by_level = [torch.where(levels == level)[0] for level in range(len(self.scales))]
        pooled = torch.cat(
            [
                self._pool(feature, rois[indices], scale)
                for feature, indices, scale in zip(features, by_level, self.scales, strict=True)
            ]
        )
        # Back into the order of the boxes, row by row in the layout of the pooled features.
        order = torch.cat(by_level).argsort()
        return pooled.permute(0, 2, 3, 1)[order].permute(0, 3, 1, 2)

    def _pool(self, feature: Tensor, rois: Tensor, scale: float) -> Tensor:
        if self.pooler_type == "ROIPool":
            return roi_pool(feature, rois.to(feature.dtype), self.output_size, scale)
        options = (self.output_size, scale, self.sampling_ratio, self.pooler_type == "ROIAlignV2")
        # A trace must hold an operator, not the loop over the RoIs of its example.
        if feature.device.type == "cpu" and not is_tracing():
            return roi_align(feature, rois, *options)
        return torchvision_roi_align(feature, rois.to(feature.dtype), *options)

    def extra_repr(self) -> str:
        return (
            f"{self.pooler_type}, output_size={self.output_size}, scales={self.scales}, "
            f"sampling_ratio={self.sampling_ratio}"
        )


def build_pooler(
    head_cfg: CfgNode, in_features: Sequence[str], input_shape: dict[str, ShapeSpec]
) -> nn.Module:
    """Builds the pooler of a head from its config node.

    Args:
        head_cfg: ``cfg.MODEL.ROI_BOX_HEAD`` or ``cfg.MODEL.ROI_MASK_HEAD``.
        in_features: names of the feature maps to pool from, finest first.
        input_shape: stride of each map by name.

    Returns:
        A MultiLevelRoIPooler, or detectron2's ROIPooler for a type that only it knows
        (``ROIAlignRotated``).
    """
    pooler_class = MultiLevelRoIPooler if head_cfg.POOLER_TYPE in POOLER_TYPES else ROIPooler
    return pooler_class(
        output_size=head_cfg.POOLER_RESOLUTION,
        scales=tuple(1.0 / input_shape[name].stride for name in in_features),
        sampling_ratio=head_cfg.POOLER_SAMPLING_RATIO,
        pooler_type=head_cfg.POOLER_TYPE,
    )
