"""Checks the plugin's own keys: poolers, mask heads, mask losses and the output format of masks."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads

from ..config import DEFAULT_LOSSES, ConfigError
from ..modeling.mask_head import ClassSelection, check_mask_losses
from ..modeling.pooler import POOLER_TYPES, check_pooler
from ..modeling.rcnn import MASK_OUTPUTS, MaskRCNN
from ..shared_names import registered_name
from .detectron2_keys import registered_class


def check_mask_branch(cfg: CfgNode) -> None:
    """Checks the keys of the mask branch that the plugin reads.

    Args:
        cfg: a config that has passed check_host_values.

    Raises:
        ConfigError: if a value cannot be used; names the key, its value and possible values.
    """
    for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        _check_pooler(cfg, head)
    try:
        check_mask_losses(cfg.MODEL.ROI_MASK_HEAD)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_mask_head(cfg)
    _check_mask_output(cfg)


def _check_pooler(cfg: CfgNode, head: str) -> None:
    kind, reduction = cfg.MODEL[head].POOLER_TYPE, cfg.MODEL[head].POOLER_REDUCTION
    if not kind and head == "ROI_MASK_HEAD" and issubclass(_mask_head(cfg), ClassSelection):
        raise ConfigError(f"MODEL.{head}.POOLER_TYPE '' is not one of {POOLER_TYPES}")
    if kind not in POOLER_TYPES and reduction != "mean":
        raise ConfigError(f"MODEL.{head}: {kind} comes from detectron2 and has no POOLER_REDUCTION")
    try:
        check_pooler(kind if kind in POOLER_TYPES else "ROIAlignV2", reduction)
    except ValueError as error:
        raise ConfigError(f"MODEL.{head}: {error}") from error
    heads = registered_class(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME)
    is_stock = heads.__module__.partition(".")[0] == "detectron2"
    if is_stock and (kind in ("ROIWarp", "PrROIPool") or reduction != "mean"):
        raise ConfigError(
            f"MODEL.{head}: {kind} with {reduction} needs MODEL.ROI_HEADS.NAME "
            "PerClassMaskROIHeads or PerClassMaskRes5ROIHeads; "
            f"{heads.__name__} uses detectron2's pooler"
        )
    if issubclass(heads, Res5ROIHeads) and head == "ROI_MASK_HEAD":
        box = cfg.MODEL.ROI_BOX_HEAD
        if (kind, reduction) not in (
            ("ROIAlignV2", "mean"),
            (box.POOLER_TYPE, box.POOLER_REDUCTION),
        ):
            raise ConfigError(
                f"MODEL.ROI_MASK_HEAD: {kind} with {reduction} has no effect, because "
                f"{heads.__name__} pools only once; set it in MODEL.ROI_BOX_HEAD"
            )


def _check_mask_head(cfg: CfgNode) -> None:
    """Refuses settings of the plugin's mask heads that the chosen head would ignore."""
    head = cfg.MODEL.ROI_MASK_HEAD
    losses = tuple(tuple(entry) for entry in head.LOSSES)
    choices = [
        ("LOSSES", losses != DEFAULT_LOSSES),
        ("SCORING.ENABLED", head.SCORING.ENABLED),
        ("LOSS_WEIGHT", head.LOSS_WEIGHT != 1.0),
    ]
    if not cfg.MODEL.MASK_ON:
        for key, _ in (choice for choice in choices[:2] if choice[1]):
            raise ConfigError(
                f"MODEL.ROI_MASK_HEAD.{key} has no effect with MODEL.MASK_ON False; set it to its "
                "default"
            )
        return
    if issubclass(_mask_head(cfg), ClassSelection):
        return
    for key, changed in choices:
        if changed:
            raise ConfigError(
                f"MODEL.ROI_MASK_HEAD.{key} has no effect with MODEL.ROI_MASK_HEAD.NAME "
                f"{head.NAME}; use FCNMaskHead or MLPMaskHead, or set the key to its default"
            )


def _check_mask_output(cfg: CfgNode) -> None:
    output, name = cfg.MODEL.MASK_OUTPUT, cfg.MODEL.META_ARCHITECTURE
    if output not in MASK_OUTPUTS:
        raise ConfigError(f"MODEL.MASK_OUTPUT {output!r} is not one of {MASK_OUTPUTS}")
    if output == "rle" and not issubclass(registered_class(META_ARCH_REGISTRY, name), MaskRCNN):
        own = registered_name(META_ARCH_REGISTRY, MaskRCNN)  # users may have their own MaskRCNN
        raise ConfigError(
            f"MODEL.MASK_OUTPUT rle needs MODEL.META_ARCHITECTURE {own}; with {name} it must be "
            "bitmask"
        )


def _mask_head(cfg: CfgNode) -> type:
    return registered_class(ROI_MASK_HEAD_REGISTRY, cfg.MODEL.ROI_MASK_HEAD.NAME)
