"""Builds a run's optimizer: SGD or AdamW, with learning rates per module and per layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, reduce_param_groups
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ..config import ConfigError
from ..messages import nearest_name
from ..modeling.backbone_layers import backbone_layers, undecayed_parameters
from .gradient_clipping import clip_gradients

logger = logging.getLogger(__name__)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Returns the optimizer chosen by SOLVER.OPTIMIZER for all parameters that are not frozen.

    With the default values of this package's keys, it equals detectron2's optimizer, including its
    parameter groups.

    Args:
        cfg: only SOLVER is read.
        model: not wrapped in DistributedDataParallel.

    Raises:
        ConfigError: see parameter_groups.
    """
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        solver.BASE_LR,
        lr_factors=solver.LR_FACTORS,
        layer_decay=solver.LAYER_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
    )
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    optimizer: Optimizer
    if solver.OPTIMIZER == "AdamW":
        optimizer = AdamW(groups, betas=tuple(solver.BETAS), **common)
    else:
        momentum = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        optimizer = SGD(groups, foreach=True, **momentum, **common)
    if solver.CLIP_GRADIENTS.ENABLED:
        clip_gradients(optimizer, solver.CLIP_GRADIENTS)
    return optimizer


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    *,
    lr_factors: Sequence[tuple[str, float]] = (),
    layer_decay: float = 1.0,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    bias_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Like detectron2's get_default_optimizer_params, with learning rates per module and layer.

    To use this function in a LazyConfig, set ``optimizer.params._target_`` to it.

    Args:
        model: not wrapped in DistributedDataParallel.
        base_lr: the learning rate that the factors multiply.
        lr_factors: pairs of a name and a factor, which multiplies the learning rate of the module
            or parameter with this name. If several names match a parameter, the longest one
            applies.
        layer_decay: learning rate of the backbone's last layer, as a factor of the base rate. The
            layer before the last uses the square of this factor, the one before that its cube, and
            so on (BEiT, arXiv 2106.08254, as in timm's param_groups_layer_decay). All other
            parameters use the base rate. modeling.backbone_layers defines what a layer is.
        weight_decay_norm: weight decay of normalization layers; None means the optimizer's default.
        weight_decay_bias: weight decay of biases; None means the optimizer's default.
        bias_lr_factor: factor that multiplies the learning rate of biases.

    Returns:
        Parameter groups for an optimizer, one for each combination of values. If several factors
        apply to a parameter, they are multiplied. Parameters in timm's no_weight_decay get no
        weight decay.

    Raises:
        ConfigError: if a name in ``lr_factors`` matches no parameter or only frozen ones, or if
            ``layer_decay`` does not support the backbone.
    """
    names = [name for name, each in model.named_parameters() if each.requires_grad]
    _check_prefixes([prefix for prefix, _ in lr_factors], names, model)
    rates: list[Callable[[str], float]] = []
    if bias_lr_factor != 1:  # detectron2's function would use it instead of the other factors
        rates.append(lambda name: bias_lr_factor if name.rpartition(".")[2] == "bias" else 1.0)
    if lr_factors:
        rates.append(lambda name: _factor_of(name, lr_factors))
    if layer_decay != 1:
        decays = _layer_factors(model, layer_decay)
        rates.append(lambda name: decays.get(name, 1.0))
    groups: list[dict[str, Any]] = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay_norm=weight_decay_norm,
        weight_decay_bias=weight_decay_bias,
        # For a parameter that belongs to the model directly, detectron2 passes ".name".
        lr_factor_func=lambda name: math.prod(rate(name.removeprefix(".")) for rate in rates),
    )
    undecayed = undecayed_parameters(model).intersection(names)
    if undecayed:
        own = [{"params": [model.get_parameter(x)], "weight_decay": 0.0} for x in sorted(undecayed)]
        groups = reduce_param_groups([*groups, *own])
    return groups


def group_names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Returns the parameter names in each group of an optimizer, in the optimizer's order."""
    name_of = {id(each): name for name, each in model.named_parameters()}
    return [[name_of[id(each)] for each in group["params"]] for group in optimizer.param_groups]


def _is_in(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _factor_of(name: str, lr_factors: Sequence[tuple[str, float]]) -> float:
    matches = [(len(prefix), factor) for prefix, factor in lr_factors if _is_in(name, prefix)]
    return max(matches)[1] if matches else 1.0


def _layer_factors(model: nn.Module, layer_decay: float) -> dict[str, float]:
    layers = backbone_layers(model)
    count = max(layers.values()) + 1
    logger.info(
        "SOLVER.LAYER_DECAY %g: %d backbone layers use %.3g (input) to %.3g (output) of the base "
        "learning rate",
        *(layer_decay, count, layer_decay**count, layer_decay),
    )
    return {name: layer_decay ** (count - layer) for name, layer in layers.items()}


def _check_prefixes(prefixes: Sequence[str], trained: Sequence[str], model: nn.Module) -> None:
    known = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if any(_is_in(name, prefix) for name in trained):
            continue
        if any(_is_in(name, prefix) for name in known):
            raise ConfigError(
                f"SOLVER.LR_FACTORS: all parameters of {prefix!r} are frozen, e.g. by "
                "MODEL.BACKBONE.FREEZE_AT; remove the entry"
            )
        modules = [name for name, _ in model.named_modules() if name]
        nearest = nearest_name(prefix, [*modules, *known])
        top = ", ".join(name for name, _ in model.named_children())
        hint = f"did you mean {nearest!r}?" if nearest else f"the model's modules are {top}"
        raise ConfigError(f"SOLVER.LR_FACTORS: {prefix!r} matches no parameter; {hint}")
