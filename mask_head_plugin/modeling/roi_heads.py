"""ROI heads of detectron2 with the plugin's pooler and class-selective box regression.

The mask head is chosen separately, with MODEL.ROI_MASK_HEAD.NAME.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads import Res5ROIHeads

from ..shared_names import register_in
from .fast_rcnn import make_class_selective
from .pooler import build_pooler, with_stock_pooler_types


@register_in(ROI_HEADS_REGISTRY)
class PerClassMaskROIHeads(StandardROIHeads):
    """A StandardROIHeads (FPN, DC5) that pools box and mask features with MultiLevelRoIPooler."""

    # Lets torch.jit.script omit branches that never run, as in StandardROIHeads.
    __constants__ = ("mask_on", "keypoint_on", "training")

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(with_stock_pooler_types(cfg), input_shape)
        arguments["box_pooler"] = build_pooler(
            cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape
        )
        arguments["box_predictor"] = make_class_selective(arguments["box_predictor"])
        return arguments

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_mask_head(with_stock_pooler_types(cfg), input_shape)
        if arguments.get("mask_pooler") is not None:
            arguments["mask_pooler"] = build_pooler(
                cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape
            )
        return arguments


@register_in(ROI_HEADS_REGISTRY)
class PerClassMaskRes5ROIHeads(Res5ROIHeads):
    """A Res5ROIHeads (C4: box and mask head share res5) that pools with MultiLevelRoIPooler.

    As in detectron2, only MODEL.ROI_BOX_HEAD configures the pooler.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super().from_config(with_stock_pooler_types(cfg), input_shape)
        arguments["pooler"] = build_pooler(
            cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape
        )
        arguments["box_predictor"] = make_class_selective(arguments["box_predictor"])
        return arguments
