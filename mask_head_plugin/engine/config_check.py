"""Refuses, before anything is built, values that no model or data set answers to."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
)
from detectron2.modeling.roi_heads import Res5ROIHeads, StandardROIHeads
from detectron2.utils.registry import Registry

from ..config import ConfigError, nearest_name
from ..modeling.mask_head import ClassSelection, check_mask_losses
from ..modeling.pooler import POOLER_TYPES, check_pooler
from ..modeling.rcnn import MASK_OUTPUTS, MaskRCNN
from ..modeling.roi_heads import PerClassMaskRes5ROIHeads, PerClassMaskROIHeads
from ..shared_names import registered_name
from .config_best import check_best_metric
from .config_colours import wrong_colours
from .config_features import check_features
from .config_values import check_input, check_solver, check_test, check_values

logger = logging.getLogger(__name__)

DETECTRON2_POOLER_TYPES = ("ROIAlignRotated",)
"""Types of detectron2's ROIPooler that MultiLevelRoIPooler leaves to it."""


def check_config(
    cfg: CfgNode, *, train: bool, evaluate: bool = True, num_processes: int = 1
) -> None:
    """Checks names, numbers and files of a config, and makes OUTPUT_DIR.

    Args:
        cfg: a complete config.
        train: whether the model will be trained, so that DATASETS.TRAIN counts.
        evaluate: whether it will be evaluated, so that DATASETS.TEST counts.
        num_processes: of the run, on all machines.

    Raises:
        ConfigError: naming the key, its value and what it could be.
    """
    check_values(cfg)
    if train and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: give a --config-file, or name a data set")
    _check_names(cfg)
    for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        _check_pooler(cfg, head)
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]  # detectron2 takes options behind a ?
    if weights and "://" not in weights and not Path(weights).is_file():
        raise ConfigError(f"MODEL.WEIGHTS: file {weights} does not exist")
    try:
        check_mask_losses(cfg.MODEL.ROI_MASK_HEAD)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_mask_head(cfg)
    _check_mask_output(cfg)
    if train:
        check_solver(cfg, num_processes)
    check_input(cfg)
    told = wrong_colours(cfg)
    if told and train:
        raise ConfigError(told)
    if told:
        logger.warning("%s, unless the weights were trained so", told)
    check_test(cfg, train=train, evaluate=evaluate)
    if train:
        check_best_metric(cfg)
        _warn_of_frozen_random_weights(cfg)
    check_features(cfg, train=train)
    _check_device(cfg, train)
    try:
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR).close()
    except (OSError, ValueError) as error:  # the latter of a zero byte
        raise ConfigError(f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be written: {error}") from error


def _check_names(cfg: CfgNode) -> None:
    model = cfg.MODEL
    names: list[tuple[str, str, Registry]] = [
        ("META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY),
        ("ANCHOR_GENERATOR.NAME", model.ANCHOR_GENERATOR.NAME, ANCHOR_GENERATOR_REGISTRY),
        ("RPN.HEAD_NAME", model.RPN.HEAD_NAME, RPN_HEAD_REGISTRY),
        ("ROI_HEADS.NAME", model.ROI_HEADS.NAME, ROI_HEADS_REGISTRY),
        ("ROI_MASK_HEAD.NAME", model.ROI_MASK_HEAD.NAME, ROI_MASK_HEAD_REGISTRY),
    ]
    if model.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
        generator = model.PROPOSAL_GENERATOR.NAME
        names.append(("PROPOSAL_GENERATOR.NAME", generator, PROPOSAL_GENERATOR_REGISTRY))
    for key, value, registry in names:
        _check_name(f"MODEL.{key}", value, registry)
    heads = ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME)
    if issubclass(heads, StandardROIHeads):  # others have no box head of their own
        _check_name("MODEL.ROI_BOX_HEAD.NAME", model.ROI_BOX_HEAD.NAME, ROI_BOX_HEAD_REGISTRY)


def _check_pooler(cfg: CfgNode, head: str) -> None:
    kind, reduction = cfg.MODEL[head].POOLER_TYPE, cfg.MODEL[head].POOLER_REDUCTION
    known: tuple[str, ...] = (*POOLER_TYPES, *DETECTRON2_POOLER_TYPES)
    if head == "ROI_MASK_HEAD" and not issubclass(_mask_head(cfg), ClassSelection):
        known = (*known, "")  # pools nothing, for PointRend
    if kind not in known:
        raise ConfigError(f"MODEL.{head}.POOLER_TYPE {kind!r} is none of {known}")
    if kind in DETECTRON2_POOLER_TYPES and reduction != "mean":
        raise ConfigError(f"MODEL.{head}: {kind} is detectron2's and has no POOLER_REDUCTION")
    try:
        check_pooler(kind if kind in POOLER_TYPES else "ROIAlignV2", reduction)
    except ValueError as error:
        raise ConfigError(f"MODEL.{head}: {error}") from error
    heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
    plugin = issubclass(heads, PerClassMaskROIHeads | PerClassMaskRes5ROIHeads)
    if not plugin and (kind in ("ROIWarp", "PrROIPool") or reduction != "mean"):
        raise ConfigError(
            f"MODEL.{head}: {kind} with {reduction} needs MODEL.ROI_HEADS.NAME "
            "PerClassMaskROIHeads or PerClassMaskRes5ROIHeads; "
            f"{heads.__name__} has detectron2's pooler"
        )
    if issubclass(heads, Res5ROIHeads) and head == "ROI_MASK_HEAD":
        box = cfg.MODEL.ROI_BOX_HEAD
        if (kind, reduction) not in (
            ("ROIAlignV2", "mean"),
            (box.POOLER_TYPE, box.POOLER_REDUCTION),
        ):
            raise ConfigError(
                f"MODEL.ROI_MASK_HEAD: {kind} with {reduction} has no effect, since "
                f"{heads.__name__} pools once; set it in MODEL.ROI_BOX_HEAD"
            )


def _check_mask_head(cfg: CfgNode) -> None:
    """Refuses settings of the plugin's mask heads where another head would ignore them."""
    head = cfg.MODEL.ROI_MASK_HEAD
    losses = [list(entry) for entry in head.LOSSES]
    choices = [
        ("LOSSES", losses != [["binary_cross_entropy", 1.0]]),
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
                f"{head.NAME}; it needs FCNMaskHead or MLPMaskHead, or its default"
            )


def _check_mask_output(cfg: CfgNode) -> None:
    output, name = cfg.MODEL.MASK_OUTPUT, cfg.MODEL.META_ARCHITECTURE
    if output not in MASK_OUTPUTS:
        raise ConfigError(f"MODEL.MASK_OUTPUT {output!r} is none of {MASK_OUTPUTS}")
    if output == "rle" and not issubclass(META_ARCH_REGISTRY.get(name), MaskRCNN):
        own = registered_name(META_ARCH_REGISTRY, MaskRCNN)  # MaskRCNN may be the user's
        raise ConfigError(
            f"MODEL.MASK_OUTPUT rle needs MODEL.META_ARCHITECTURE {own}; with {name} it must be "
            "bitmask"
        )


def _warn_of_frozen_random_weights(cfg: CfgNode) -> None:
    frozen = cfg.MODEL.BACKBONE.FREEZE_AT
    if not cfg.MODEL.WEIGHTS and frozen > 0:
        logger.warning(
            "MODEL.WEIGHTS is empty, so MODEL.BACKBONE.FREEZE_AT %d keeps the first stages at "
            "random values; set it to 0, and a MODEL.RESNETS.NORM that learns, such as GN",
            frozen,
        )


def _mask_head(cfg: CfgNode) -> type:
    head: type = ROI_MASK_HEAD_REGISTRY.get(cfg.MODEL.ROI_MASK_HEAD.NAME)
    return head


def _check_device(cfg: CfgNode, train: bool) -> None:
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ConfigError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is not a device such as cpu"
        ) from error
    if train and cfg.SOLVER.AMP.ENABLED and device.type != "cuda":
        raise ConfigError("SOLVER.AMP.ENABLED needs a CUDA device; set it to False")


def _check_name(key: str, value: str, registry: Registry) -> None:
    names = [name for name, _ in registry]
    if value not in names:
        nearest = nearest_name(value, names)
        hint = f"did you mean {nearest!r}?" if nearest else f"choose from {sorted(names)}"
        raise ConfigError(f"{key} {value!r} is not registered; {hint}")
