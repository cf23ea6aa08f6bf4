"""Checks the training recipe: optimizer, learning rates, weight average, gradient accumulation."""

from __future__ import annotations

import logging
import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..config import ConfigError
from ..messages import nearest_name
from .dry_build import dry_build

logger = logging.getLogger(__name__)

OPTIMIZERS = ("SGD", "AdamW")

HIGH_FOR_ADAMW = 0.01
"""Learning rates of this value or more are usual for SGD; AdamW usually needs 1e-4 to 1e-3."""


def check_recipe(cfg: CfgNode, num_processes: int) -> None:
    """Checks the keys of SOLVER that this package adds to detectron2's.

    Args:
        cfg: a complete config.
        num_processes: number of processes of the run.

    Raises:
        ConfigError: if a value cannot be used; names the key, its value and possible values.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        nearest = nearest_name(solver.OPTIMIZER, OPTIMIZERS, cutoff=0.3)
        hint = f"; did you mean {nearest}?" if nearest else ""
        raise ConfigError(f"SOLVER.OPTIMIZER {solver.OPTIMIZER!r} is not one of {OPTIMIZERS}{hint}")
    if len(solver.BETAS) != 2 or not all(_is_number(x) and 0 <= x < 1 for x in solver.BETAS):
        raise ConfigError(
            f"SOLVER.BETAS {solver.BETAS} must be two numbers of at least 0 and below 1, e.g. "
            "[0.9, 0.999]"
        )
    if solver.OPTIMIZER == "AdamW" and solver.BASE_LR >= HIGH_FOR_ADAMW:
        logger.warning(
            "SOLVER.BASE_LR %g suits SGD; AdamW usually needs 0.0001 to 0.001 and diverges at "
            "higher rates",
            solver.BASE_LR,
        )
    if not 0 < solver.LAYER_DECAY <= 1:
        raise ConfigError(
            f"SOLVER.LAYER_DECAY is {solver.LAYER_DECAY}; it must be above 0 and at most 1"
        )
    if not 0 <= solver.EMA_DECAY < 1:
        raise ConfigError(
            f"SOLVER.EMA_DECAY is {solver.EMA_DECAY}; it must be below 1, e.g. 0.999, or 0 to "
            "disable the average"
        )
    _check_lr_factors(solver.LR_FACTORS)
    _check_parts(cfg, num_processes)


def check_rates(cfg: CfgNode, trainer: type[DefaultTrainer]) -> None:
    """Builds the optimizer to check that learning rates per module or layer fit the model.

    Raises:
        ConfigError: if they do not fit, with the message of the trainer's build_optimizer.
    """
    if not cfg.SOLVER.LR_FACTORS and cfg.SOLVER.LAYER_DECAY == 1:
        return
    parts = dry_build(cfg, train=True, trainer=trainer)
    if parts[0].error:  # the model failed to build; the real build reports it
        return
    for part in parts[1:]:
        kind, _, told = (part.error or "").partition(": ")
        if kind == ConfigError.__name__ and told.startswith("SOLVER.L"):
            raise ConfigError(told)


def _check_lr_factors(factors: list[Any]) -> None:
    for entry in factors:
        is_pair = isinstance(entry, list | tuple) and len(entry) == 2
        if not is_pair or not isinstance(entry[0], str) or not entry[0]:
            raise ConfigError(
                f"SOLVER.LR_FACTORS: {entry!r} must be a module's name and a factor, such as "
                '["backbone", 0.1]'
            )
        if not _is_number(entry[1]) or not 0 < entry[1] < math.inf:
            raise ConfigError(
                f"SOLVER.LR_FACTORS: the factor of {entry[0]!r} is {entry[1]!r}; it must be above "
                "0 (use MODEL.BACKBONE.FREEZE_AT to freeze a backbone)"
            )
    names = [entry[0] for entry in factors]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"SOLVER.LR_FACTORS lists {twice!r} twice; remove one of the entries")


def _check_parts(cfg: CfgNode, num_processes: int) -> None:
    parts, images = cfg.SOLVER.ACCUMULATE_STEPS, cfg.SOLVER.IMS_PER_BATCH
    own = images // (cfg.SOLVER.REFERENCE_WORLD_SIZE or num_processes)
    if parts < 1 or own % parts:
        raise ConfigError(
            f"SOLVER.ACCUMULATE_STEPS {parts}: each process gets {own} images per iteration "
            f"(SOLVER.IMS_PER_BATCH {images}), which cannot be divided into that many equal "
            f"parts; set it to {_nearest_divisor(own, parts)}"
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = (x for x in range(1, number + 1) if number % x == 0)
    return min(divisors, key=lambda x: abs(x - wanted))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
