"""Makes a resumed run learn at the rate of its config, not the checkpoint's.

An optimizer's state includes its hyperparameters. So the checkpoint's would replace those of a
config that has changed since, and the run's config.yaml would be wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

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
"""Which values of a group come from SOLVER."""

GROUPS = "parameter_groups"
"""Where a checkpoint has the names of each group's parameters, if the config groups them."""


def check_optimizer(optimizer: Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Refuses a checkpoint of another optimizer, or of one with other parameters.

    PyTorch would accept it if the numbers of parameters agree.

    Args:
        optimizer: as the config makes it.
        model: whose parameters it has; not in DistributedDataParallel.
        state: the checkpoint's of the trainer.

    Raises:
        ConfigError: naming what must not change.
    """
    saved = state["_trainer"]["optimizer"]["param_groups"][0]
    is_adam = "betas" in optimizer.param_groups[0]
    if ("betas" in saved) != is_adam:
        told = ("SGD", "AdamW") if is_adam else ("AdamW", "SGD")
        raise ConfigError(
            "the checkpoint's optimizer is {}, and SOLVER.OPTIMIZER is {}: it cannot change in a "
            "run; set it back, or start a new run with it as MODEL.WEIGHTS".format(*told)
        )
    if GROUPS in state and state[GROUPS] != group_names(optimizer, model):
        raise ConfigError(_unfit("other parameters have their own learning rate"))


def _unfit(cause: object) -> str:
    return (
        f"the checkpoint's optimizer does not fit this config ({cause}): MODEL.BACKBONE."
        "FREEZE_AT and SOLVER.LR_FACTORS, LAYER_DECAY, BIAS_LR_FACTOR, WEIGHT_DECAY_BIAS and "
        "WEIGHT_DECAY_NORM cannot change in a run; set them back, or start a new run with the "
        "checkpoint as MODEL.WEIGHTS"
    )


def load_keeping_config(optimizer: Optimizer, scheduler: Any, load: Callable[[], None]) -> None:
    """Loads the states of optimizer and scheduler, then applies the config's values.

    Args:
        optimizer: as the config makes it.
        scheduler: detectron2's LRMultiplier. With any other, the checkpoint's learning rate is
            used.
        load: loads the states.

    Raises:
        ConfigError: if the optimizer's groups of parameters are not those of the checkpoint.
    """
    asked = [{key: group[key] for key in NAMES if key in group} for group in optimizer.param_groups]
    try:
        load()
    except ValueError as error:  # of the optimizer
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
        logger.warning("changed by the config since the checkpoint: %s", ", ".join(changed))
    if isinstance(scheduler, LRMultiplier):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate


def _told(value: Any) -> str:
    return str(value) if isinstance(value, tuple) else f"{value:g}"
