"""Checks that the parts of a detector fit together: maps, anchors, matchers, proposals, heads."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch import GeneralizedRCNN, ProposalNetwork
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads

from ..config import ConfigError
from .detectron2_keys import registered_class
from .dry_build import dry_backbone
from .values import is_rising

logger = logging.getLogger(__name__)


def check_features(cfg: CfgNode, *, train: bool) -> None:
    """Checks two-stage detectors; skips parts whose classes do not derive from detectron2's.

    Args:
        cfg: a config that has passed check_host_values.
        train: whether the model will be trained.

    Raises:
        ConfigError: if parts do not fit together; the message names the keys and possible values.
    """
    model = cfg.MODEL
    arch = registered_class(META_ARCH_REGISTRY, model.META_ARCHITECTURE)
    if not issubclass(arch, GeneralizedRCNN | ProposalNetwork):
        return
    maps = _backbone_maps(cfg)
    generator = registered_class(PROPOSAL_GENERATOR_REGISTRY, model.PROPOSAL_GENERATOR.NAME)
    if issubclass(generator, RPN):
        _check_maps("MODEL.RPN.IN_FEATURES", model.RPN.IN_FEATURES, maps)
        anchors = registered_class(ANCHOR_GENERATOR_REGISTRY, model.ANCHOR_GENERATOR.NAME)
        if issubclass(anchors, DefaultAnchorGenerator):
            _check_anchors(cfg)
        _check_matcher("MODEL.RPN", model.RPN, num_thresholds=2)
        _check_box_weights("MODEL.RPN", model.RPN)
    _check_proposals(cfg, generator, train=train)
    heads = registered_class(ROI_HEADS_REGISTRY, model.ROI_HEADS.NAME)
    if issubclass(arch, GeneralizedRCNN) and issubclass(heads, StandardROIHeads | Res5ROIHeads):
        _check_maps("MODEL.ROI_HEADS.IN_FEATURES", model.ROI_HEADS.IN_FEATURES, maps)
        _check_matcher("MODEL.ROI_HEADS", model.ROI_HEADS, num_thresholds=1)
        _check_heads(cfg, heads, maps)
        _check_keypoints(cfg, heads, train=train)


def _backbone_maps(cfg: CfgNode) -> dict[str, ShapeSpec] | None:
    """Returns the maps by name, or None if the backbone cannot be built on the meta device."""
    maps, part = dry_backbone(cfg)
    told = f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} cannot be built"
    if part.is_refusal:
        raise ConfigError(f"{told} from MODEL.BACKBONE, MODEL.RESNETS and MODEL.FPN: {part.error}")
    if part.error:
        keys = "MODEL.RPN.IN_FEATURES and MODEL.ROI_HEADS.IN_FEATURES are not checked"
        logger.warning("%s on the meta device, so %s: %s", told, keys, part.error)
        return None
    return maps


def _check_maps(key: str, names: Sequence[str], maps: dict[str, ShapeSpec] | None) -> None:
    if not names:
        known = f"; the backbone has the maps {list(maps)}" if maps else ""
        raise ConfigError(f"{key} is empty{known}")
    for name in names:
        if maps is not None and name not in maps:
            raise ConfigError(f"{key}: the backbone has the maps {list(maps)}, not {name!r}")


def _check_anchors(cfg: CfgNode) -> None:
    anchors, num_maps = cfg.MODEL.ANCHOR_GENERATOR, len(cfg.MODEL.RPN.IN_FEATURES)
    for key in ("SIZES", "ASPECT_RATIOS"):
        given = anchors[key]
        nested = given if given and isinstance(given[0], list | tuple) else [given]
        if len(nested) not in (1, num_maps):
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(nested)} lists, but "
                f"MODEL.RPN.IN_FEATURES {cfg.MODEL.RPN.IN_FEATURES} has length {num_maps}; use one "
                "list per map, or a single list for all maps"
            )
        if not all(x and all(_is_positive(value) for value in x) for x in nested):
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{key} {given} must be lists of numbers above 0"
            )
    if not 0 <= anchors.OFFSET < 1:
        raise ConfigError(
            f"MODEL.ANCHOR_GENERATOR.OFFSET is {anchors.OFFSET}; it must be in [0, 1)"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _check_matcher(section: str, node: CfgNode, num_thresholds: int) -> None:
    thresholds, labels = node.IOU_THRESHOLDS, node.IOU_LABELS
    if len(thresholds) != num_thresholds or not is_rising(thresholds, least=0, most=1):
        wanted, example = "two increasing numbers", [0.3, 0.7]
        if num_thresholds == 1:
            wanted, example = "one number", [0.5]
        raise ConfigError(
            f"{section}.IOU_THRESHOLDS {thresholds} must be {wanted} between 0 and 1, "
            f"e.g. {example}"
        )
    if len(labels) != num_thresholds + 1 or not set(labels) <= {-1, 0, 1}:
        raise ConfigError(
            f"{section}.IOU_LABELS {labels} must have {num_thresholds + 1} entries, each 0 "
            f"(background), -1 (ignored) or 1 (object)"
        )


def _check_proposals(cfg: CfgNode, generator: type, *, train: bool) -> None:
    name, loads = cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.LOAD_PROPOSALS
    precomputed = name == "PrecomputedProposals"
    # A user's own generator, which has another name, may also load proposals.
    if precomputed != loads and (precomputed or generator in (RPN, RRPN)):
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS True and MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals must "
            f"be set together, but they are {loads} and {name}"
        )
    for split in ("TRAIN", "TEST") if train else ("TEST",):
        files, names = cfg.DATASETS[f"PROPOSAL_FILES_{split}"], cfg.DATASETS[split]
        if loads and len(files) != len(names):
            raise ConfigError(
                f"MODEL.LOAD_PROPOSALS True needs one proposal file per data set, but the length "
                f"of DATASETS.PROPOSAL_FILES_{split} is {len(files)}, and that of DATASETS.{split} "
                f"is {len(names)}"
            )
        for path in files if loads else ():
            if "://" not in path and not Path(path).is_file():
                raise ConfigError(f"DATASETS.PROPOSAL_FILES_{split}: file {path} does not exist")


def _check_heads(cfg: CfgNode, heads: type, maps: dict[str, ShapeSpec] | None) -> None:
    names, box = cfg.MODEL.ROI_HEADS.IN_FEATURES, cfg.MODEL.ROI_BOX_HEAD
    if issubclass(heads, Res5ROIHeads):
        if len(names) != 1:
            raise ConfigError(
                f"MODEL.ROI_HEADS.NAME {heads.__name__} needs a single map, such as that of a "
                f"ResNet-C4, but MODEL.ROI_HEADS.IN_FEATURES lists {len(names)}; with an FPN, use "
                "PerClassMaskROIHeads"
            )
        return
    strides = [maps[name].stride for name in names] if maps else []
    if any(b != 2 * a for a, b in itertools.pairwise(strides)):
        raise ConfigError(
            f"MODEL.ROI_HEADS.IN_FEATURES {names} have strides {strides}; each stride must be "
            "twice the previous one"
        )
    if box.NAME == "FastRCNNConvFCHead" and box.NUM_FC + box.NUM_CONV < 1:
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD has no layers: set its NUM_FC or NUM_CONV to at least 1"
        )
    if issubclass(heads, CascadeROIHeads) and not box.CLS_AGNOSTIC_BBOX_REG:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME {heads.__name__} needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG "
            "True"
        )
    _check_box_weights("MODEL.ROI_BOX_HEAD", box)


def _check_box_weights(section: str, node: CfgNode) -> None:
    weights = node.BBOX_REG_WEIGHTS
    if len(weights) != 4 or not all(_is_positive(x) for x in weights):
        raise ConfigError(
            f"{section}.BBOX_REG_WEIGHTS {weights} must be four numbers above 0, for x, y, w and h"
        )


def _check_keypoints(cfg: CfgNode, heads: type, *, train: bool) -> None:
    if not cfg.MODEL.KEYPOINT_ON:
        return
    if issubclass(heads, Res5ROIHeads):
        raise ConfigError(
            f"MODEL.KEYPOINT_ON: {heads.__name__} predicts no keypoints; use PerClassMaskROIHeads"
        )
    own = [entry[0] for entry in cfg.DATASETS.COCO_FILES]
    for name in cfg.DATASETS.TRAIN if train else ():
        known = name in MetadataCatalog.list()
        if name in own or (known and not MetadataCatalog.get(name).get("keypoint_names")):
            raise ConfigError(
                f"MODEL.KEYPOINT_ON is True, but data set {name!r} of DATASETS.TRAIN has no "
                "keypoints; set MODEL.KEYPOINT_ON to False"
            )
