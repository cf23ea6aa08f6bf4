"""Checks the config of a timm backbone without building it."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads

from ..config import ConfigError
from ..modeling import build_timm_backbone, build_timm_fpn_backbone
from ..modeling.timm_model import model_settings
from ..modeling.timm_weights import check_backbone_file
from .detectron2_keys import registered_class

BACKBONES_ALONE = "detectron2://ImageNetPretrained/"
"""Prefix of the addresses of detectron2's backbone weights."""


def has_timm_backbone(cfg: CfgNode) -> bool:
    name = cfg.MODEL.BACKBONE.NAME
    own = (build_timm_backbone, build_timm_fpn_backbone)
    return name in BACKBONE_REGISTRY and BACKBONE_REGISTRY.get(name) in own


def check_timm(cfg: CfgNode) -> None:
    """Checks MODEL.TIMM if the backbone is a timm model.

    Raises:
        ConfigError: if timm, the model or its file is missing, or if the heads or the weights do
            not fit the model.
    """
    if not has_timm_backbone(cfg):
        return
    model, keys = cfg.MODEL, cfg.MODEL.TIMM
    model_settings(keys.NAME)
    if model.WEIGHTS.startswith(BACKBONES_ALONE):
        raise ConfigError(
            f"MODEL.WEIGHTS {model.WEIGHTS} belongs to a backbone of detectron2, not to "
            f"MODEL.TIMM.NAME {keys.NAME}; set MODEL.WEIGHTS to '' and use MODEL.TIMM.CHECKPOINT "
            "or PRETRAINED"
        )
    if keys.CHECKPOINT and not model.WEIGHTS:
        check_backbone_file(Path(keys.CHECKPOINT).expanduser(), keys.NAME)
    if issubclass(registered_class(ROI_HEADS_REGISTRY, model.ROI_HEADS.NAME), Res5ROIHeads):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME} contains res5 of detectron2's ResNets, "
            f"for which {keys.NAME} has no weights; use PerClassMaskROIHeads with "
            "MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead on one map or an FPN"
        )
