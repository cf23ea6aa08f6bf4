"""A resumed run learns at the rate that its config says, not at the checkpoint's.

An optimizer's state has its hyperparameters in it, so those of the checkpoint would replace those
of a config that was changed in between, and the run's config.yaml would not be true.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from detectron2.solver import LRMultiplier
from torch.optim import Optimizer

from ..config import ConfigError

logger = logging.getLogger(__name__)

NAMES = {
    "initial_lr": "learning rate",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "weight_decay": "weight decay",
}
"""What of a group's values detectron2 takes from SOLVER."""


def load_keeping_config(optimizer: Optimizer, scheduler: Any, load: Callable[[], None]) -> None:
    """Loads the states of optimizer and scheduler, then sets what the config says.

    Args:
        optimizer: as the config makes it.
        scheduler: of detectron2's kind, LRMultiplier. The learning rate of another kind is the
            checkpoint's.
        load: does it.

    Raises:
        ConfigError: if the optimizer's groups of parameters are not those of the checkpoint.
    """
    asked = [{key: group[key] for key in NAMES if key in group} for group in optimizer.param_groups]
    try:
        load()
    except ValueError as error:  # of the optimizer
        raise ConfigError(
            f"the checkpoint's optimizer does not fit this config ({error}): MODEL.BACKBONE."
            "FREEZE_AT and SOLVER.BIAS_LR_FACTOR, WEIGHT_DECAY_BIAS and WEIGHT_DECAY_NORM cannot "
            "change in a run; set them back, or start anew with the checkpoint as MODEL.WEIGHTS"
        ) from error
    changed: dict[str, None] = {}
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        if not isinstance(scheduler, LRMultiplier):
            values.pop("initial_lr", None)
        for key, value in values.items():
            if group[key] != value:
                changed[f"{NAMES[key]} {value:g} in place of {group[key]:g}"] = None
        group.update(values)
    if changed:
        logger.warning("as the config says, other than the checkpoint: %s", ", ".join(changed))
    if isinstance(scheduler, LRMultiplier):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate
