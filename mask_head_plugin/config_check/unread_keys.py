"""Finds keys that are set but that nothing reads, so that a run is not what its config says.

Who reads a key depends on other keys: detectron2's ResNets read MODEL.RESNETS.DEPTH, the small one
here does not. So the parts are built; see dry_build.
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
"""Keys, or beginnings of keys, that the trainer, the loaders and the evaluation read while they
run, unless NEEDED says otherwise.
"""

EVALUATION = ("MODEL.", "TEST.", "INPUT.MAX_SIZE_TEST")
"""Beginnings of the keys that count when nothing is trained."""

BACKBONE = ("MODEL.BACKBONE.", "MODEL.RESNETS.", "MODEL.TIMM.")
"""Beginnings of the keys that choose the backbone: if one has no effect, you get another backbone.
"""

FOR_TIMM = {
    "MODEL.RESNETS.DEPTH": "choose the model with MODEL.TIMM.NAME",
    "MODEL.RESNETS.NORM": "set MODEL.TIMM.NORM",
    "MODEL.RESNETS.OUT_FEATURES": "set MODEL.TIMM.OUT_INDICES",
}
"""What to do instead if the backbone is timm's."""

NOTHING = "nothing in this config reads it"

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
        "INPUT.MIN_SIZE_TRAIN above 0, since 0 keeps images as they are",
        lambda x: any(x.INPUT.MIN_SIZE_TRAIN),
    ),
    "INPUT.MAX_SIZE_TEST": (
        "INPUT.MIN_SIZE_TEST above 0, since 0 keeps images as they are",
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
"""What else must be set for keys, or beginnings of keys, that are always read."""

WITHOUT_JITTER = ("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.CROP.")
"""Beginnings of the keys that INPUT.LSJ replaces: it sets the size of training images."""


def unread_keys(cfg: CfgNode, *, train: bool, own: Collection[str] = ()) -> dict[str, str]:
    """Returns the keys that differ from detectron2's defaults but change nothing, with the cause.

    Args:
        cfg: a complete config that check_config passes.
        train: whether the model will be trained; if not, keys of training are not checked.
        own: the keys that the user has set. A backbone's keys among them count with any value.
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
        logger.info("keys without effect were not looked for: %s", errors[0])
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
    """Returns what a key needs, but lacks, to have an effect."""
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
    """Returns the keys that a file sets, without its ``_BASE_``, and those set on top of it.

    A layer that chooses another backbone drops what earlier layers set for theirs.

    Args:
        config_file: as load_config takes it; "" for none.
        layers: keys that are set later, such as those of the command line, in this order.
    """
    text = Path(find_config_file(config_file)).read_text(encoding="utf-8") if config_file else ""
    of_file = flatten(CfgNode(yaml.safe_load(text) or {}))
    if len(of_file) > len(flatten(get_cfg())) / 2:  # a run's record, which holds every key
        of_file = {}
    own = set(of_file)
    for layer in layers:
        if "MODEL.BACKBONE.NAME" in layer:
            own = {key for key in own if not key.startswith(BACKBONE)}
        own.update(layer)
    return own


def report_unread_keys(cfg: CfgNode, *, train: bool, own: Collection[str] | None = None) -> None:
    """Logs a warning for each key that is set and changes nothing; see ``unread_keys``.

    Args:
        cfg: as for unread_keys.
        train: as for unread_keys.
        own: the keys that the user has set, if known. A ``_BASE_`` sets keys for many configs, not
            all of which read each.

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
    """Returns what to do about a key that the backbone does not read."""
    if has_timm_backbone(cfg):
        return f"remove it, and {FOR_TIMM[key]}" if key in FOR_TIMM else "remove it"
    if key.startswith("MODEL.BACKBONE."):
        return "remove it"
    reader = "build_timm_fpn" if key.startswith("MODEL.TIMM.") else "build_resnet_fpn"
    return f"remove it, or set MODEL.BACKBONE.NAME to {reader}_backbone"
