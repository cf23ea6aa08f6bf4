"""Makes a resumed run use the learning rate of its config instead of the checkpoint's.

An optimizer's state includes its hyperparameters. Without this module, the checkpoint's values
would override a changed config, and the run's config.yaml would be wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from torch import nn
from torch.optim import Optimizer

from ..config import ConfigError
from .optimizer import group_names

logger = logging.getLogger(__name__)

NAMES = {
    "initial_lr": "learning rate",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "betas": "betas",
    "weight_decay": "weight decay",
}
"""Hyperparameters of a parameter group that come from SOLVER, and their names in messages."""

GROUPS = "parameter_groups"
"""Key under which a checkpoint stores the parameter names of each group.

It exists only if SOLVER.LR_FACTORS or LAYER_DECAY defines groups.
"""


SCHEDULE_KEYS = (
    *("MAX_ITER", "LR_SCHEDULER_NAME", "STEPS", "GAMMA", "NUM_DECAYS", "RESCALE_INTERVAL"),
    *("BASE_LR_END", "WARMUP_ITERS", "WARMUP_FACTOR", "WARMUP_METHOD"),
)
"""Keys of SOLVER that determine the factor by which the learning rate is multiplied."""


def schedule_of(cfg: CfgNode) -> dict[str, Any]:
    """Returns the SCHEDULE_KEYS of a config with their values, to be stored in a checkpoint."""
    return {key: cfg.SOLVER[key] for key in SCHEDULE_KEYS}


def warn_of_schedule(cfg: CfgNode, saved: Mapping[str, Any]) -> None:
    """Warns if the learning rate will follow a different schedule from that of the checkpoint.

    Args:
        cfg: the run's config.
        saved: result of ``schedule_of`` in the run that wrote the checkpoint. Empty if that run did
            not store it.
    """
    now = schedule_of(cfg)
    changes = [
        f"SOLVER.{key} {now[key]} instead of {value}"
        for key, value in saved.items()
        if key in now and now[key] != value
    ]
    if changes:
        logger.warning(
            "the schedule of the learning rate has changed since the checkpoint: %s",
            ", ".join(changes),
        )


def check_optimizer(optimizer: Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Refuses a checkpoint with a different optimizer or different parameter groups.

    PyTorch would accept such a checkpoint if the groups have the right numbers of parameters.

    Args:
        optimizer: the optimizer built from the config.
        model: the model being trained; not wrapped in DistributedDataParallel.
        state: the trainer's state in the checkpoint.

    Raises:
        ConfigError: if the optimizer or its groups differ. The message names the keys that must not
            change.
    """
    saved = state["_trainer"]["optimizer"]["param_groups"][0]
    is_adam = "betas" in optimizer.param_groups[0]
    if ("betas" in saved) != is_adam:
        told = ("SGD", "AdamW") if is_adam else ("AdamW", "SGD")
        raise ConfigError(
            "the checkpoint's optimizer is {}, but SOLVER.OPTIMIZER is {} and cannot change within "
            "a run; set it back, or start a new run with the checkpoint as "
            "MODEL.WEIGHTS".format(*told)
        )
    if GROUPS in state and state[GROUPS] != group_names(optimizer, model):
        raise ConfigError(_unfit("its parameter groups differ"))


def _unfit(cause: object) -> str:
    return (
        f"the checkpoint's optimizer does not fit this config ({cause}): MODEL.BACKBONE."
        "FREEZE_AT and SOLVER.LR_FACTORS, LAYER_DECAY, BIAS_LR_FACTOR, WEIGHT_DECAY_BIAS and "
        "WEIGHT_DECAY_NORM cannot change within a run; set them back, or start a new run with the "
        "checkpoint as MODEL.WEIGHTS"
    )


def load_keeping_config(optimizer: Optimizer, scheduler: Any, load: Callable[[], None]) -> None:
    """Loads the states of the optimizer and the scheduler, then applies the config's values.

    Args:
        optimizer: the optimizer built from the config.
        scheduler: detectron2's LRMultiplier. With any other scheduler, the checkpoint's learning
            rate is used.
        load: a function that loads both states.

    Raises:
        ConfigError: if the optimizer's parameter groups differ from those of the checkpoint.
    """
    asked = [{key: group[key] for key in NAMES if key in group} for group in optimizer.param_groups]
    try:
        load()
    except ValueError as error:  # raised by the optimizer
        raise ConfigError(_unfit(error)) from error
    changed: dict[str, None] = {}
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        if not isinstance(scheduler, LRMultiplier):
            values.pop("initial_lr", None)
        for key, value in values.items():
            if group[key] != value:
                changed[f"{NAMES[key]} {_told(value)} instead of {_told(group[key])}"] = None
        group.update(values)
    if changed:
        logger.warning("the config has changed since the checkpoint: %s", ", ".join(changed))
    if isinstance(scheduler, LRMultiplier):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate


def _told(value: Any) -> str:
    return str(value) if isinstance(value, tuple) else f"{value:g}"
