"""Finds keys that are set but have no effect, so that a run would differ from its config.

Whether a key is read depends on other keys. For example, detectron2's ResNets read
MODEL.RESNETS.DEPTH, but this package's small ResNet does not. The parts of the run are therefore
built, and the keys that they read are recorded; see dry_build.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from ..config import ConfigError, add_mask_head_config, find_config_file, flatten
from .dry_build import dry_build
from .timm_keys import has_timm_backbone

logger = logging.getLogger(__name__)

READ_LATER = (
    *("CUDNN_BENCHMARK", "FLOAT32_PRECISION", "OUTPUT_DIR", "SEED", "VERSION", "IMPORTS"),
    *("DATASETS.", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "INPUT.COPY_PASTE."),
    *("MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.WEIGHTS_STRICT", "MODEL.LOAD_PROPOSALS"),
    *("SOLVER.AMP.ENABLED", "SOLVER.CHECKPOINT_", "SOLVER.CLIP_GRADIENTS."),
    *("SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.OPTIMIZER", "SOLVER.BETAS", "SOLVER.LR_FACTORS"),
    *("SOLVER.LAYER_DECAY", "SOLVER.ACCUMULATE_STEPS", "SOLVER.EMA_DECAY", "TEST."),
    "SOLVER.EARLY_STOPPING.",
)
"""Keys or prefixes of keys that are read only during a run, by the trainer, the loaders or the
evaluation. NEEDED contains conditions for some of them.
"""

EVALUATION = ("MODEL.", "TEST.", "INPUT.MAX_SIZE_TEST")
"""Prefixes of the keys that matter if the model is not trained."""

BACKBONE = ("MODEL.BACKBONE.", "MODEL.RESNETS.", "MODEL.TIMM.")
"""Prefixes of the keys that define the backbone. If such a key has no effect, the run's backbone is
not the one that its config describes.
"""

FOR_TIMM = {
    "MODEL.RESNETS.DEPTH": "choose the model with MODEL.TIMM.NAME",
    "MODEL.RESNETS.NORM": "set MODEL.TIMM.NORM",
    "MODEL.RESNETS.OUT_FEATURES": "set MODEL.TIMM.OUT_INDICES",
}
"""What to set instead if the backbone is a timm model."""

NOTHING = "no part of this run reads it"

HEAD, BOX = "MODEL.ROI_MASK_HEAD.", "MODEL.ROI_BOX_HEAD."

NEEDED: dict[str, tuple[str, Callable[[CfgNode], Any]]] = {
    "DATASETS.PROPOSAL_FILES_": ("MODEL.LOAD_PROPOSALS True", lambda x: x.MODEL.LOAD_PROPOSALS),
    "DATASETS.PRECOMPUTED_": ("MODEL.LOAD_PROPOSALS True", lambda x: x.MODEL.LOAD_PROPOSALS),
    "SOLVER.CLIP_GRADIENTS.": (
        "SOLVER.CLIP_GRADIENTS.ENABLED True",
        lambda x: x.SOLVER.CLIP_GRADIENTS.ENABLED,
    ),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE norm or full_model",
        lambda x: x.SOLVER.CLIP_GRADIENTS.CLIP_TYPE != "value",
    ),
    "SOLVER.MOMENTUM": ("SOLVER.OPTIMIZER SGD", lambda x: x.SOLVER.OPTIMIZER == "SGD"),
    "SOLVER.NESTEROV": ("SOLVER.OPTIMIZER SGD", lambda x: x.SOLVER.OPTIMIZER == "SGD"),
    "SOLVER.BETAS": ("SOLVER.OPTIMIZER AdamW", lambda x: x.SOLVER.OPTIMIZER == "AdamW"),
    "SOLVER.WARMUP_FACTOR": ("SOLVER.WARMUP_ITERS above 0", lambda x: x.SOLVER.WARMUP_ITERS),
    "SOLVER.WARMUP_METHOD": ("SOLVER.WARMUP_ITERS above 0", lambda x: x.SOLVER.WARMUP_ITERS),
    "SOLVER.EARLY_STOPPING.PATIENCE": (
        "SOLVER.EARLY_STOPPING.METRIC",
        lambda x: x.SOLVER.EARLY_STOPPING.METRIC,
    ),
    "TEST.EVAL_LOSS": ("a data set in DATASETS.TEST", lambda x: x.DATASETS.TEST),
    "TEST.AUG.": ("TEST.AUG.ENABLED True", lambda x: x.TEST.AUG.ENABLED),
    "TEST.PRECISE_BN.NUM_ITER": (
        "TEST.PRECISE_BN.ENABLED True",
        lambda x: x.TEST.PRECISE_BN.ENABLED,
    ),
    "TEST.KEYPOINT_OKS_SIGMAS": ("MODEL.KEYPOINT_ON True", lambda x: x.MODEL.KEYPOINT_ON),
    "TEST.SEMANTIC_THRESHOLD": ("MODEL.MASK_ON True", lambda x: x.MODEL.MASK_ON),
    "INPUT.LSJ.": ("INPUT.LSJ.ENABLED True", lambda x: x.INPUT.LSJ.ENABLED),
    "INPUT.MAX_SIZE_TRAIN": (
        "INPUT.MIN_SIZE_TRAIN above 0, because 0 keeps the original size",
        lambda x: any(x.INPUT.MIN_SIZE_TRAIN),
    ),
    "INPUT.MAX_SIZE_TEST": (
        "INPUT.MIN_SIZE_TEST above 0, because 0 keeps the original size",
        lambda x: x.INPUT.MIN_SIZE_TEST,
    ),
    "MODEL.RPN.SMOOTH_L1_BETA": (
        "MODEL.RPN.BBOX_REG_LOSS_TYPE smooth_l1",
        lambda x: x.MODEL.RPN.BBOX_REG_LOSS_TYPE == "smooth_l1",
    ),
    BOX + "SMOOTH_L1_BETA": (
        BOX + "BBOX_REG_LOSS_TYPE smooth_l1",
        lambda x: x.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE == "smooth_l1",
    ),
    BOX + "FED_LOSS_": (
        BOX + "USE_FED_LOSS True",
        lambda x: x.MODEL.ROI_BOX_HEAD.USE_FED_LOSS,
    ),
    BOX + "CONV_DIM": (BOX + "NUM_CONV above 0", lambda x: x.MODEL.ROI_BOX_HEAD.NUM_CONV),
    BOX + "NORM": (BOX + "NUM_CONV above 0", lambda x: x.MODEL.ROI_BOX_HEAD.NUM_CONV),
    BOX + "FC_DIM": (BOX + "NUM_FC above 0", lambda x: x.MODEL.ROI_BOX_HEAD.NUM_FC),
    HEAD + "NORM": (HEAD + "NUM_CONV above 0", lambda x: x.MODEL.ROI_MASK_HEAD.NUM_CONV),
    HEAD + "SCORING.": (
        HEAD + "SCORING.ENABLED True",
        lambda x: x.MODEL.ROI_MASK_HEAD.SCORING.ENABLED,
    ),
}
"""Conditions under which keys that are always read have an effect: a description and a test of the
config, by key or prefix of keys."""

WITHOUT_JITTER = ("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.CROP.")
"""Prefixes of the keys that INPUT.LSJ makes ineffective, because it sets the image size."""


def unread_keys(cfg: CfgNode, *, train: bool, own: Collection[str] = ()) -> dict[str, str]:
    """Returns the keys that differ from their defaults but have no effect, each with the cause.

    Args:
        cfg: a complete config that has passed check_config.
        train: whether the model will be trained; if not, training keys are not checked.
        own: keys that the user has set. Backbone keys among them are checked even if they have
            their default value.
    """
    defaults = get_cfg()
    add_mask_head_config(defaults)
    known = flatten(defaults)
    own_backbone = {key for key in own if key.startswith(BACKBONE)}
    set_keys = [
        key
        for key, value in flatten(cfg).items()
        if key in known and (value != known[key] or key in own_backbone)
    ]
    if not train:
        set_keys = [key for key in set_keys if key.startswith(EVALUATION)]
    found: dict[str, str] = {}
    parts = dry_build(cfg, train=train)
    read: set[str] = set()
    errors = [part.error for part in parts if part.error]
    if errors:
        logger.info("skipping the search for keys without effect: %s", errors[0])
    else:
        read = read.union(*(part.keys_read for part in parts))
    for key in set_keys:
        needed = _needed(cfg, key)
        if needed:
            found[key] = f"it needs {needed}"
        elif read and key not in read and not key.startswith(READ_LATER):
            found[key] = NOTHING
    return found


def _needed(cfg: CfgNode, key: str) -> str | None:
    """Returns the missing condition for a key to have an effect; None if nothing is missing."""
    if cfg.INPUT.LSJ.ENABLED and key.startswith(WITHOUT_JITTER):
        return "INPUT.LSJ.ENABLED False"
    for start, (needed, is_given) in NEEDED.items():
        if key.startswith(start) and not is_given(cfg):
            return needed
    _, is_parameter, name = key.partition(HEAD + "LOSS_PARAMS.")
    loss = name.partition(".")[0].lower()
    if is_parameter and loss not in [entry[0] for entry in cfg.MODEL.ROI_MASK_HEAD.LOSSES]:
        return f"{loss!r} in {HEAD}LOSSES"
    return None


def own_keys(config_file: str, *layers: Collection[str]) -> set[str]:
    """Returns the keys set in later layers and in a config file, excluding its ``_BASE_``.

    A layer that chooses another backbone discards the backbone keys of earlier layers.

    Args:
        config_file: path of a config file, as for load_config; "" for none.
        layers: keys set later, in this order, such as those of the command line.
    """
    text = Path(find_config_file(config_file)).read_text(encoding="utf-8") if config_file else ""
    of_file = flatten(CfgNode(yaml.safe_load(text) or {}))
    if len(of_file) > len(flatten(get_cfg())) / 2:  # the saved config of a run lists every key
        of_file = {}
    own = set(of_file)
    for layer in layers:
        if "MODEL.BACKBONE.NAME" in layer:
            own = {key for key in own if not key.startswith(BACKBONE)}
        own.update(layer)
    return own


def report_unread_keys(cfg: CfgNode, *, train: bool, own: Collection[str] | None = None) -> None:
    """Logs a warning for each key that is set but has no effect; see ``unread_keys``.

    Args:
        cfg: see unread_keys.
        train: see unread_keys.
        own: keys that the user has set; None if unknown. If given, only these keys are reported,
            because a ``_BASE_`` sets keys for many configs, which do not all read them.

    Raises:
        ConfigError: if the user has set a backbone key that this backbone does not read.
    """
    values = flatten(cfg)
    for key, cause in unread_keys(cfg, train=train, own=own or ()).items():
        if own is not None and key not in own:
            continue
        if own is not None and key.startswith(BACKBONE):
            raise ConfigError(
                f"{key} {values[key]} has no effect: MODEL.BACKBONE.NAME "
                f"{cfg.MODEL.BACKBONE.NAME} does not read it; {_instead(cfg, key)}"
            )
        logger.warning("%s %s has no effect: %s", key, values[key], cause)


def _instead(cfg: CfgNode, key: str) -> str:
    """Returns advice for a key that the backbone does not read."""
    if has_timm_backbone(cfg):
        return f"remove it, and {FOR_TIMM[key]}" if key in FOR_TIMM else "remove it"
    if key.startswith("MODEL.BACKBONE."):
        return "remove it"
    reader = "build_timm_fpn" if key.startswith("MODEL.TIMM.") else "build_resnet_fpn"
    return f"remove it, or set MODEL.BACKBONE.NAME to {reader}_backbone"
