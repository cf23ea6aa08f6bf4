"""Checks a whole config before the run starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..config import ConfigError
from ..data.copy_paste import check_copy_paste
from .chosen_metrics import check_chosen_metrics
from .colours import wrong_colours
from .detector import check_features
from .detectron2_keys import check_host_values
from .mask_branch import check_mask_branch
from .recipe import check_rates, check_recipe
from .timm_keys import check_timm, has_timm_backbone
from .values import check_input, check_solver, check_test, check_values

logger = logging.getLogger(__name__)


def check_config(
    cfg: CfgNode,
    *,
    train: bool,
    evaluate: bool = True,
    num_processes: int = 1,
    trainer: type[DefaultTrainer] = DefaultTrainer,
) -> None:
    """Checks the names, numbers and files of a config without creating any file or folder.

    Values that the plugin reads must be among those that the plugin supports. Values that
    detectron2 reads are refused only if detectron2 refuses them, so everything that users have
    registered is accepted.

    Args:
        cfg: a complete config.
        train: whether the model will be trained, which requires DATASETS.TRAIN.
        evaluate: whether the model will be evaluated, which requires DATASETS.TEST.
        num_processes: number of processes of the run on all machines.
        trainer: class of the run's trainer; matters if it has a custom optimizer, schedule or
            loader.

    Raises:
        ConfigError: if a value cannot be used; names the key, its value and possible values.
    """
    check_values(cfg)
    if train and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: pass a --config-file, or list a data set")
    check_host_values(cfg, train=train, trainer=trainer)
    check_mask_branch(cfg)
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]  # detectron2 allows options after a ?
    if weights and "://" not in weights and not Path(weights).is_file():
        raise ConfigError(f"MODEL.WEIGHTS: file {weights} does not exist")
    if train:
        check_solver(cfg, num_processes)
        check_recipe(cfg, num_processes)
        check_copy_paste(cfg)
    check_input(cfg)
    check_timm(cfg)
    told = wrong_colours(cfg)
    if told and train:
        raise ConfigError(told)
    if told:
        logger.warning("%s (ignore this if the weights were trained that way)", told)
    check_test(cfg, train=train, evaluate=evaluate)
    if train:
        check_chosen_metrics(cfg)
        _warn_of_frozen_random_weights(cfg)
    check_features(cfg, train=train)
    if train:
        check_rates(cfg, trainer)
    _check_device(cfg, train)
    _check_output_folder(cfg.OUTPUT_DIR)


def _warn_of_frozen_random_weights(cfg: CfgNode) -> None:
    frozen, timm = cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.TIMM
    is_pretrained = has_timm_backbone(cfg) and (timm.CHECKPOINT or timm.PRETRAINED)
    if not cfg.MODEL.WEIGHTS and not is_pretrained and frozen > 0:
        logger.warning(
            "MODEL.WEIGHTS is empty, so MODEL.BACKBONE.FREEZE_AT %d keeps the first stages at "
            "random values; set FREEZE_AT to 0, and MODEL.RESNETS.NORM to a trainable norm such as "
            "GN",
            frozen,
        )


def _check_device(cfg: CfgNode, train: bool) -> None:
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ConfigError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is not a device such as cpu or cuda"
        ) from error
    if train and cfg.SOLVER.AMP.ENABLED and device.type != "cuda":
        raise ConfigError("SOLVER.AMP.ENABLED True needs a CUDA device; set it to False")


def _check_output_folder(name: str) -> None:
    """Refuses a folder that cannot be created or written to."""
    told = f"OUTPUT_DIR {name!r} cannot be used"
    if "://" in name:
        raise ConfigError(
            f"{told}: it is an address; use a local folder, and copy its files afterwards"
        )
    try:
        there, missing = _split_at_what_exists(Path(name).absolute())
        for part in missing:  # raises an OSError if a name is too long
            _split_at_what_exists(there / part)
    except (OSError, ValueError) as error:  # ValueError: the name contains a zero byte
        cause = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{told}: {cause}") from error
    if not there.is_dir():
        raise ConfigError(f"{told}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{told}: you do not have permission to write to {there}")


def _split_at_what_exists(path: Path) -> tuple[Path, list[str]]:
    """Splits a path into its deepest existing part and the names of the missing parts.

    The existing part may be a dangling link. The missing names are in reverse order.
    """
    missing: list[str] = []
    while True:
        try:
            path.lstat()
            return path, missing
        except (FileNotFoundError, NotADirectoryError):
            missing.append(path.name)
            path = path.parent
