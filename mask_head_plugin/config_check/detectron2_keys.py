"""Checks values that detectron2 reads, by building parts of the run with the installed version.

Values that are registered or listed here are accepted without being tried. Any other value is
tried (see dry_build), so that values that only a newer detectron2 supports are accepted as well.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.utils.registry import Registry

from ..config import ConfigError, flatten
from ..messages import nearest_name
from ..modeling.pooler import POOLER_TYPES
from .dry_build import PACKAGE, dry_build

logger = logging.getLogger(__name__)

REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}

NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN")
BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
STOCK_POOLER_TYPES = ("ROIPool", "ROIAlign", "ROIAlignV2", "ROIAlignRotated")
ALL_POOLER_TYPES = tuple(dict.fromkeys((*POOLER_TYPES, *STOCK_POOLER_TYPES)))

KNOWN: dict[str, tuple[Any, ...]] = {
    "DATALOADER.SAMPLER_TRAIN": (
        *("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"),
        *("WeightedTrainingSampler", "WeightedCategoryTrainingSampler"),
    ),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "SOLVER.LR_SCHEDULER_NAME": (
        *("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": NORMS,
    "MODEL.FPN.NORM": NORMS,
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.SEM_SEG_HEAD.NORM": NORMS,
    "MODEL.RETINANET.NORM": NORMS,
    "MODEL.ROI_BOX_HEAD.NORM": NORMS,
    "MODEL.ROI_MASK_HEAD.NORM": NORMS,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ALL_POOLER_TYPES,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": (*ALL_POOLER_TYPES, ""),  # "" disables it, for PointRend
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": ALL_POOLER_TYPES,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
}
"""Values that detectron2 is known to accept for keys without a registry."""


def registered_class(registry: Registry, name: str) -> type:
    """Returns the registered class with this name, or ``object`` if there is none."""
    found = registry.get(name) if name in registry else None
    return found if isinstance(found, type) else object


def check_host_values(cfg: CfgNode, *, train: bool, trainer: type[DefaultTrainer]) -> None:
    """Refuses values that detectron2 refuses, and warns about other values that look misspelled.

    Args:
        cfg: a complete config.
        train: whether the model will be trained.
        trainer: see dry_build.

    Raises:
        ConfigError: if detectron2 refuses a value; names the key, its value and the most similar
            known value.
    """
    suspects = _unknown_values(cfg)
    if not train:
        suspects = {key: x for key, x in suspects.items() if key.startswith("MODEL.")}
    if not suspects:
        return
    parts = dry_build(cfg, train=train, trainer=trainer)
    for key, choices in suspects.items():
        value = flatten(cfg)[key]
        nearest = _nearest(value, choices)
        told = _told(key, value, choices, nearest)
        readers = [part for part in parts if key in part.keys_read]
        refusals = [part.error for part in readers if part.is_refusal]
        if refusals:
            changed = _with(cfg, key, nearest or _usual(key, choices))
            others = {part.error for part in dry_build(changed, train=train, trainer=trainer)}
            ended = [error for error in refusals if error not in others]
            if ended:
                raise ConfigError(f"{told} ({ended[0]})")
        if not readers or any(part.error for part in readers):  # not tried, or not read yet
            logger.warning("%s", told)


def _unknown_values(cfg: CfgNode) -> dict[str, Sequence[Any]]:
    """Returns the keys whose value is unknown, each with its known values."""
    known = {key: [name for name, _ in registry] for key, registry in REGISTRIES.items()}
    known["MODEL.PROPOSAL_GENERATOR.NAME"].append("PrecomputedProposals")
    heads = registered_class(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME)
    if not issubclass(heads, StandardROIHeads):  # such heads need no box head; "" is the default
        known["MODEL.ROI_BOX_HEAD.NAME"].append("")
    if heads.__module__.partition(".")[0] not in ("detectron2", "builtins", PACKAGE):
        # A user's heads may use detectron2's pooler or this plugin's.
        known |= {f"MODEL.ROI_{x}_HEAD.POOLER_TYPE": [*STOCK_POOLER_TYPES] for x in ("BOX", "MASK")}
        known["MODEL.ROI_MASK_HEAD.POOLER_TYPE"].append("")
    values = flatten(cfg)
    all_known: dict[str, Sequence[Any]] = {**KNOWN, **known}
    return {key: x for key, x in all_known.items() if values[key] not in x}


def _nearest(value: Any, choices: Sequence[Any]) -> Any:
    """Returns the choice that the user most likely meant, or None."""
    if not isinstance(value, str):
        return min(choices, key=lambda x: abs(x - value))
    return nearest_name(value, choices, cutoff=0.5)  # norms are short


def _with(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list([key, value])
    return changed


def _usual(key: str, choices: Sequence[Any]) -> Any:
    """Returns detectron2's default if it is a choice, otherwise the first choice."""
    default = flatten(get_cfg())[key]
    return default if default in choices else choices[0]


def _told(key: str, value: Any, choices: Sequence[Any], nearest: Any) -> str:
    if key in REGISTRIES:
        hint = f"did you mean {nearest!r}?" if nearest else f"choose from {sorted(choices)}"
        return f"{key} {value!r} is not registered; {hint}"
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    return f"{key} {value!r} is not one of {tuple(choices)}{hint}"
