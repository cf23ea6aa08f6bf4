"""Checks that single keys are in range and that solver, input and test keys are consistent.

Covers only values that would otherwise cause a late error, cause an error that does not name the
key, or have no effect.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from PIL import Image

from ..config import ConfigError, flatten
from ..image_files import in_format
from ..messages import nearest_name
from ..model_input import IMAGE_FORMATS

HEAD, ROI, RPN = "MODEL.ROI_MASK_HEAD.", "MODEL.ROI_HEADS.", "MODEL.RPN."

AT_LEAST: dict[int, tuple[str, ...]] = {
    1: (
        *(HEAD + "NUM_FC", HEAD + "FC_DIM", HEAD + "CONV_DIM", HEAD + "POOLER_RESOLUTION"),
        *(HEAD + "SCORING.CONV_DIM", HEAD + "SCORING.FC_DIM"),
        *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "MODEL.ROI_BOX_HEAD.FC_DIM"),
        *("MODEL.ROI_BOX_HEAD.CONV_DIM", "MODEL.FPN.OUT_CHANNELS"),
        "MODEL.RESNETS.STEM_OUT_CHANNELS",
        *(ROI + "NUM_CLASSES", ROI + "BATCH_SIZE_PER_IMAGE", RPN + "BATCH_SIZE_PER_IMAGE"),
        *(RPN + "PRE_NMS_TOPK_TRAIN", RPN + "PRE_NMS_TOPK_TEST"),
        *(RPN + "POST_NMS_TOPK_TRAIN", RPN + "POST_NMS_TOPK_TEST"),
        *("SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD"),
        *("TEST.PRECISE_BN.NUM_ITER", "INPUT.LSJ.IMAGE_SIZE", "SOLVER.EARLY_STOPPING.PATIENCE"),
    ),
    0: (
        *(HEAD + "LOSS_WEIGHT", HEAD + "SCORING.LOSS_WEIGHT", HEAD + "NUM_CONV"),
        *("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "MODEL.RPN.SMOOTH_L1_BETA"),
        *(RPN + "LOSS_WEIGHT", RPN + "BBOX_REG_LOSS_WEIGHT", "SOLVER.BASE_LR_END"),
        *("MODEL.BACKBONE.FREEZE_AT", "SOLVER.WARMUP_ITERS", "SOLVER.REFERENCE_WORLD_SIZE"),
        *("SOLVER.WEIGHT_DECAY", "SOLVER.CHECKPOINT_KEEP_LAST", "DATALOADER.NUM_WORKERS"),
    ),
}

MOST_WORKERS = 1024
"""Maximum number of workers; more would only overload the machine."""

SHARES = (
    *(ROI + "SCORE_THRESH_TEST", ROI + "NMS_THRESH_TEST", RPN + "NMS_THRESH"),
    *("SOLVER.MOMENTUM", "SOLVER.WARMUP_FACTOR", "TEST.SEMANTIC_THRESHOLD"),
    "INPUT.COPY_PASTE.PROBABILITY",
)
"""Keys whose values must be between 0 and 1."""

POSITIVE = (
    *("SOLVER.BASE_LR", "SOLVER.GAMMA", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE"),
    *(ROI + "POSITIVE_FRACTION", RPN + "POSITIVE_FRACTION"),
    *("INPUT.LSJ.MIN_SCALE", "INPUT.LSJ.MAX_SCALE"),
)

CLIP_TYPES = ("value", "norm", "full_model")


def check_values(cfg: CfgNode) -> None:
    """Checks keys that do not depend on other keys.

    Raises:
        ConfigError: if a value cannot be used; names the key, its value and possible values.
    """
    values = flatten(cfg)
    for least, keys in AT_LEAST.items():
        for key in keys:
            if not least <= values[key] < math.inf:
                raise ConfigError(f"{key} is {values[key]}; it must be at least {least}")
    for key in SHARES:
        if not 0 <= values[key] <= 1:
            raise ConfigError(f"{key} is {values[key]}; it must be between 0 and 1")
    for key in POSITIVE:
        if not 0 < values[key] < math.inf:
            raise ConfigError(f"{key} is {values[key]}; it must be above 0")
    key = "SOLVER.CLIP_GRADIENTS.CLIP_TYPE"
    if values[key] not in CLIP_TYPES:
        raise ConfigError(f"{key} {values[key]!r} is not one of {CLIP_TYPES}")
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        if not all(isinstance(name, str) for name in values[key]):
            raise ConfigError(f"{key} {values[key]} is not a list of names")


def check_solver(cfg: CfgNode, num_processes: int) -> None:
    """Checks the schedule and how batches are divided among processes.

    Args:
        cfg: a complete config.
        num_processes: number of processes of the run.
    """
    solver = cfg.SOLVER
    if not is_rising(solver.STEPS, least=0):
        raise ConfigError(
            f"SOLVER.STEPS {solver.STEPS} must be numbers above 0 in ascending order, e.g. "
            "(60000, 80000)"
        )
    if solver.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR" and solver.NUM_DECAYS < 1:
        raise ConfigError(f"SOLVER.NUM_DECAYS is {solver.NUM_DECAYS}; it must be at least 1")
    per_run, images = solver.REFERENCE_WORLD_SIZE, solver.IMS_PER_BATCH
    if per_run and images % per_run:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {images} is not divisible by SOLVER.REFERENCE_WORLD_SIZE "
            f"{per_run}, the number of processes that it is meant for; change one of the two keys, "
            "or set the latter to 0"
        )
    if not per_run and images % num_processes:
        near = max(images // num_processes, 1) * num_processes
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {images}, the number of images for all processes, is not "
            f"divisible by the number of processes ({num_processes}); set it to {near}"
        )
    loader = cfg.DATALOADER
    if loader.NUM_WORKERS > MOST_WORKERS:
        raise ConfigError(
            f"DATALOADER.NUM_WORKERS is {loader.NUM_WORKERS}; it must be at most {MOST_WORKERS}"
        )
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler" and not loader.REPEAT_THRESHOLD > 0:
        raise ConfigError(
            "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler repeats no images with "
            f"DATALOADER.REPEAT_THRESHOLD {loader.REPEAT_THRESHOLD}; set it to e.g. 0.001"
        )


def check_input(cfg: CfgNode) -> None:
    """Checks sizes, crops and colours of images."""
    given = cfg.INPUT
    test_sizes = [given.MIN_SIZE_TEST] if given.MIN_SIZE_TEST else []
    for split, sizes in (("TRAIN", given.MIN_SIZE_TRAIN), ("TEST", test_sizes)):
        largest = given[f"MAX_SIZE_{split}"]
        _check_sizes(f"INPUT.MIN_SIZE_{split}", sizes, f"INPUT.MAX_SIZE_{split}", largest)
    if not given.MIN_SIZE_TRAIN:
        raise ConfigError("INPUT.MIN_SIZE_TRAIN is empty; (0,) keeps the original size")
    if given.MIN_SIZE_TRAIN_SAMPLING == "range" and len(given.MIN_SIZE_TRAIN) != 2:
        raise ConfigError(
            f"INPUT.MIN_SIZE_TRAIN {given.MIN_SIZE_TRAIN} must be (smallest, largest) with "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING range"
        )
    crop = given.CROP
    is_relative = crop.TYPE.startswith("relative")
    most, unit = (1, "as fractions of the image's") if is_relative else (math.inf, "in pixels")
    kinds = (int, float) if most == 1 else (int,)
    if crop.ENABLED and not (
        len(crop.SIZE) == 2 and all(isinstance(x, kinds) and 0 < x <= most for x in crop.SIZE)
    ):
        example = [0.9, 0.9] if most == 1 else [384, 384]
        raise ConfigError(
            f"INPUT.CROP.SIZE {crop.SIZE}: INPUT.CROP.TYPE {crop.TYPE} needs height and width "
            f"{unit}, e.g. {example}"
        )
    _check_jitter(given)
    channels = _num_channels(given.FORMAT)
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values = cfg.MODEL[key]
        numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in values)
        if len(values) != channels or not numbers:
            raise ConfigError(
                f"MODEL.{key} {values} must have one finite number per channel of INPUT.FORMAT "
                f"{given.FORMAT} (channels: {channels})"
            )
    if not all(x > 0 for x in cfg.MODEL.PIXEL_STD):
        raise ConfigError(
            f"MODEL.PIXEL_STD {cfg.MODEL.PIXEL_STD} must be above 0, because pixels are divided by "
            f"it"
        )


def _check_jitter(given: CfgNode) -> None:
    lsj = given.LSJ
    if lsj.MIN_SCALE > lsj.MAX_SCALE:
        raise ConfigError(
            f"INPUT.LSJ.MIN_SCALE {lsj.MIN_SCALE} is above INPUT.LSJ.MAX_SCALE {lsj.MAX_SCALE}; "
            "swap them"
        )
    if lsj.ENABLED and given.FORMAT == "YUV-BT.601":
        raise ConfigError(
            "INPUT.LSJ.ENABLED pads images with 128, which is not grey in INPUT.FORMAT YUV-BT.601; "
            "set INPUT.FORMAT to BGR or RGB, or INPUT.LSJ.ENABLED to False"
        )


def check_test(cfg: CfgNode, *, train: bool, evaluate: bool) -> None:
    """Checks the settings of inference and evaluation, which may start days after training does."""
    test = cfg.TEST
    if test.DETECTIONS_PER_IMAGE == 0:
        raise ConfigError("TEST.DETECTIONS_PER_IMAGE is 0, which keeps no detections; -1 keeps all")
    if not evaluate:
        return
    if not train and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name a data set to evaluate on")
    names = cfg.DATASETS.TEST
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"DATASETS.TEST lists {twice!r} twice; remove one")
    if test.EVAL_PERIOD > 0 and not names:
        raise ConfigError(
            f"TEST.EVAL_PERIOD is {test.EVAL_PERIOD}, but DATASETS.TEST is empty: name a data set, "
            "or set TEST.EVAL_PERIOD to 0"
        )
    if not test.AUG.ENABLED:
        return
    _check_sizes("TEST.AUG.MIN_SIZES", test.AUG.MIN_SIZES, "TEST.AUG.MAX_SIZE", test.AUG.MAX_SIZE)
    if not test.AUG.MIN_SIZES:
        raise ConfigError("TEST.AUG.ENABLED needs TEST.AUG.MIN_SIZES, e.g. (400, 800)")
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise ConfigError(
                f"TEST.AUG.ENABLED does not work with MODEL.{key}; turn one of them off"
            )


def is_rising(values: Sequence[Any], *, least: float, most: float = math.inf) -> bool:
    """Returns whether numbers are in ascending order, above ``least`` and not above ``most``."""
    bounded = all(isinstance(x, int | float) and least < x <= most for x in values)
    return bounded and all(a < b for a, b in itertools.pairwise(values))


def _num_channels(image_format: str) -> int:
    """Returns the number of channels of an INPUT.FORMAT, which may also be a mode of Pillow."""
    try:
        _, _, channels = in_format(Image.new("RGB", (1, 1)), image_format).shape
    except (ValueError, KeyError) as error:
        nearest = nearest_name(image_format, IMAGE_FORMATS)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise ConfigError(
            f"INPUT.FORMAT {image_format!r} is not one of {IMAGE_FORMATS}, nor a Pillow mode "
            f"with several channels{hint}"
        ) from error
    return int(channels)


def _check_sizes(key: str, sizes: Sequence[Any], limit_key: str, limit: int) -> None:
    for size in sizes:
        if not isinstance(size, int) or size < 0:
            raise ConfigError(f"{key}: {size!r} is not a number of pixels")
        if size > limit:
            raise ConfigError(
                f"{key}: {size} is above {limit_key} {limit}, which would reduce it; raise "
                f"{limit_key} as well"
            )
