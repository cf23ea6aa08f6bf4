"""Refuses, before anything is built, values that no model or data set answers to."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)
from detectron2.utils.registry import Registry

from ..config import ConfigError, nearest_name
from ..modeling.mask_loss import check_losses
from ..modeling.pooler import POOLER_TYPES

DETECTRON2_POOLER_TYPES = ("ROIAlignRotated",)
"""Types of detectron2's ROIPooler that MultiLevelRoIPooler leaves to it."""


def check_config(cfg: CfgNode, *, train: bool) -> None:
    """Checks names and numbers of a config.

    Args:
        cfg: a complete config.
        train: whether the model will be trained, so that DATASETS.TRAIN counts.

    Raises:
        ConfigError: naming the key, its value and what it could be.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: give a --config-file, or name a data set")
    for key, value, registry in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
        ("MODEL.ROI_HEADS.NAME", cfg.MODEL.ROI_HEADS.NAME, ROI_HEADS_REGISTRY),
        ("MODEL.ROI_MASK_HEAD.NAME", cfg.MODEL.ROI_MASK_HEAD.NAME, ROI_MASK_HEAD_REGISTRY),
    ):
        _check_name(key, value, registry)
    known = (*POOLER_TYPES, *DETECTRON2_POOLER_TYPES, "")  # "" pools nothing, for PointRend
    for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        kind = cfg.MODEL[head].POOLER_TYPE
        if kind not in known:
            raise ConfigError(f"MODEL.{head}.POOLER_TYPE {kind!r} is none of {known}")
    try:
        check_losses(cfg.MODEL.ROI_MASK_HEAD.LOSSES)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key, value in (
        ("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES),
        ("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH),
        ("SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER),
    ):
        if value < 1:
            raise ConfigError(f"{key} is {value}; it must be at least 1")


def _check_name(key: str, value: str, registry: Registry) -> None:
    names = [name for name, _ in registry]
    if value not in names:
        nearest = nearest_name(value, names)
        hint = f"did you mean {nearest!r}?" if nearest else f"choose from {sorted(names)}"
        raise ConfigError(f"{key} {value!r} is not registered; {hint}")
