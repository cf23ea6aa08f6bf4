"""The weighted sum of mask losses configured by MODEL.ROI_MASK_HEAD.LOSSES and LOSS_PARAMS.

Shape alphabet: R RoIs, K classes, M mask side.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .mask_loss import MASK_LOSS_REGISTRY, MaskLoss

PARAMS = "MODEL.ROI_MASK_HEAD.LOSS_PARAMS"


@dataclass(frozen=True)
class MaskLossTerm:
    """One term of the mask loss.

    Attributes:
        name: the loss's name in MASK_LOSS_REGISTRY.
        weight: the factor that multiplies the loss.
        ramp_iters: number of iterations over which this factor grows linearly from 0.
        parameters: keyword arguments of the loss function.
    """

    name: str
    weight: float
    ramp_iters: int
    parameters: Mapping[str, float]

    @property
    def loss(self) -> MaskLoss:
        return MASK_LOSS_REGISTRY.get(self.name)

    @property
    def activation(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The activation that was passed to couples_classes; None if the loss uses a sigmoid."""
        return getattr(self.loss, "activation", None)

    def weight_at(self, iteration: int) -> float:
        if iteration >= self.ramp_iters:
            return self.weight
        return self.weight * iteration / self.ramp_iters


def weighted_mask_losses(
    terms: Sequence[MaskLossTerm],
    mask_logits: Tensor,
    classes: Tensor,
    gt_masks: Tensor,
    iteration: int,
) -> dict[str, Tensor]:
    """Returns the weighted loss terms, computed at least in float32, even under autocast.

    Args:
        terms: the result of parse_losses.
        mask_logits: (R, M, M), or (R, K, M, M) if the terms couple the classes.
        classes: (R,) int64 in [0, K).
        gt_masks: (R, M, M), in [0, 1].
        iteration: the current iteration, which determines the weights of terms with a ramp.

    Returns:
        The weighted terms by name; the trainer adds them up. A single term is named ``loss_mask``,
        as in detectron2. If there are several, each is named ``loss_mask_<name>``.
    """
    mask_logits = mask_logits.to(torch.promote_types(mask_logits.dtype, torch.float32))
    gt_masks = gt_masks.to(mask_logits.dtype)
    losses = {}
    for term in terms:
        key = "loss_mask" if len(terms) == 1 else f"loss_mask_{term.name}"
        inputs = (
            (mask_logits, gt_masks) if term.activation is None else (mask_logits, classes, gt_masks)
        )
        # Otherwise, autocast would lower the precision of convolutions in a user's loss.
        with torch.autocast(mask_logits.device.type, enabled=False):
            losses[key] = term.weight_at(iteration) * term.loss(*inputs, **term.parameters)
    return losses


def parse_losses(
    losses: Sequence[Sequence[Any]], parameters: Mapping[str, Mapping[str, Any]]
) -> list[MaskLossTerm]:
    """Parses MODEL.ROI_MASK_HEAD.LOSSES and LOSS_PARAMS into loss terms.

    Args:
        losses: ``[name, weight]`` or ``[name, weight, ramp_iters]`` for each term.
        parameters: a section for each loss, with the value of each parameter. All names are in
            capitals. Sections of losses that are not used are checked as well.

    Raises:
        ValueError: if there are no terms, an entry has the wrong form, a name is unknown or
            repeated, a number is out of range, or the terms cannot be combined. The message names
            the key and says what is allowed.
    """
    checked = {}
    for section, values in parameters.items():
        loss_name = _find_name(section, [name for name, _ in MASK_LOSS_REGISTRY], PARAMS)
        if not isinstance(values, Mapping):
            raise ValueError(f"{PARAMS}.{section} must be a section of parameters, not {values!r}")
        checked[loss_name] = _check_parameters(loss_name, values)
    terms: list[MaskLossTerm] = []
    for entry in losses:
        name, weight, *ramp = _check_entry(losses, entry)
        if name not in checked:  # LOSS_PARAMS has no section for it
            checked[name] = _check_parameters(name, {})
        if name in [term.name for term in terms]:
            raise ValueError(
                f"{_where(losses)}: {name!r} appears twice; keep one entry, with the sum of the "
                "weights"
            )
        ramp_iters = ramp[0] if ramp else 0
        terms.append(MaskLossTerm(name, float(weight), ramp_iters, checked[name]))
    if not terms:
        raise ValueError(f"{_where(losses)}: add at least one loss, such as ['dice', 1.0]")
    if len({term.activation for term in terms}) > 1:
        raise ValueError(
            f"{_where(losses)}: losses with different activations, such as a softmax and a "
            "sigmoid, cannot be combined, because inference applies only one activation"
        )
    return terms


def _where(losses: Sequence[Sequence[Any]]) -> str:
    return f"MODEL.ROI_MASK_HEAD.LOSSES {list(losses)!r}"


def _check_entry(losses: Sequence[Sequence[Any]], entry: Any) -> Sequence[Any]:
    choices = sorted(name for name, _ in MASK_LOSS_REGISTRY)
    if not isinstance(entry, list | tuple) or len(entry) not in (2, 3):
        raise ValueError(
            f"{_where(losses)}: the entry {entry!r} must have the form [name, weight] or "
            "[name, weight, ramp_iters]"
        )
    name, weight, *ramp = entry
    if name not in choices:
        raise ValueError(f"{_where(losses)}: there is no loss {name!r}; choose from {choices}")
    if not _is_number(weight) or weight < 0:
        raise ValueError(
            f"{_where(losses)}: the weight {weight!r} of {name!r} must be a finite number, 0 or "
            "above"
        )
    if ramp and (type(ramp[0]) is not int or ramp[0] < 0):
        raise ValueError(
            f"{_where(losses)}: the ramp {ramp[0]!r} of {name!r} must be a whole number of "
            "iterations, 0 or above"
        )
    return entry


def _check_parameters(name: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Turns a loss's section of LOSS_PARAMS into the keyword arguments of the loss function.

    Calls the function once without RoIs, so that it checks its parameters, and so that an error in
    a user's loss is found before training starts.
    """
    where, loss = f"{PARAMS}.{name.upper()}", MASK_LOSS_REGISTRY.get(name)
    signature = inspect.signature(loss).parameters.values()
    keywords = {p.name: p for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}
    arguments = {}
    for key, value in values.items():
        parameter = _find_name(key, list(keywords), where)
        if not _is_number(value):
            raise ValueError(f"{where}.{key} must be a finite number, not {value!r}")
        arguments[parameter] = value
    for parameter, declared in keywords.items():
        if declared.default is inspect.Parameter.empty and parameter not in arguments:
            raise ValueError(f"{where}.{parameter.upper()} has no default, so you must set it")
    nothing = torch.zeros(0, 1, 1, device="cpu", requires_grad=True)
    classes = torch.zeros(0, dtype=torch.int64, device="cpu")
    inputs = (nothing[:, None], classes, nothing) if hasattr(loss, "activation") else (nothing,) * 2
    try:
        # On the CPU even while a model is built on "meta", because the value is read below.
        with torch.enable_grad(), torch.device("cpu"):
            value = loss(*inputs, **arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{where}: the loss {name!r} fails on a batch without RoIs: {error!r}"
        ) from error
    if not (isinstance(value, Tensor) and value.dim() == 0 and value == 0 and value.requires_grad):
        raise ValueError(
            f"{where}: for a batch without RoIs, the loss {name!r} returns {value} instead of a "
            "scalar 0 that is part of the graph; let the loss return mean_over_rois of its (R,) "
            "values"
        )
    return arguments


def _find_name(key: str, names: Sequence[str], where: str) -> str:
    """Returns the name that equals a config key when written in capitals."""
    choices = {name.upper(): name for name in names}
    if key not in choices:
        raise ValueError(f"{where}.{key} does not exist; choose from {sorted(choices)}")
    return choices[key]


def _is_number(value: Any) -> bool:
    """Returns whether a value is a finite number within the range of a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # math.isfinite fails for very large integers
