"""Mask losses, by name in MASK_LOSS_REGISTRY.

A loss is a pure function ``(mask_logits, gt_masks) -> scalar`` of the logits of the one mask per
RoI that counts (its class's) and its target. It neither selects classes nor logs; the head does.

Shape alphabet: R RoIs, M mask side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from detectron2.layers.wrappers import empty_input_loss_func_wrapper
from detectron2.utils.registry import Registry
from torch import Tensor
from torch.nn import functional as F

MaskLoss = Callable[[Tensor, Tensor], Tensor]

MASK_LOSS_REGISTRY = Registry("MASK_LOSS")
MASK_LOSS_REGISTRY.__doc__ = """
Functions ``(mask_logits (R, M, M), gt_masks (R, M, M) in {0, 1}) -> scalar loss``, named as in
MODEL.ROI_MASK_HEAD.LOSSES.
"""

_mean_bce = empty_input_loss_func_wrapper(F.binary_cross_entropy_with_logits)


@MASK_LOSS_REGISTRY.register()
def binary_cross_entropy(mask_logits: Tensor, gt_masks: Tensor) -> Tensor:
    """Mean over all pixels of all RoIs of ``-[g log p + (1 - g) log(1 - p)]``, p = sigmoid(logit).

    Mask R-CNN section 3: "the average binary cross-entropy loss" on the k-th mask.

    Args:
        mask_logits: (R, M, M), any real numbers.
        gt_masks: (R, M, M) of the same dtype, in {0, 1}.

    Returns:
        Scalar >= 0; 0 with a graph at R = 0.
    """
    return _mean_bce(mask_logits, gt_masks)


def weighted_mask_losses(
    losses: Sequence[tuple[str, float]], mask_logits: Tensor, gt_masks: Tensor
) -> dict[str, Tensor]:
    """Evaluates a weighted sum of registered losses, term by term.

    Args:
        losses: (name in MASK_LOSS_REGISTRY, weight) of each term.
        mask_logits: (R, M, M).
        gt_masks: (R, M, M) of the same dtype, in {0, 1}.

    Returns:
        The weighted terms, which the trainer adds up: ``loss_mask`` for a single term (detectron2's
        name), ``loss_mask_<name>`` for several.
    """
    terms = {}
    for name, weight in losses:
        key = "loss_mask" if len(losses) == 1 else f"loss_mask_{name}"
        terms[key] = weight * MASK_LOSS_REGISTRY.get(name)(mask_logits, gt_masks)
    return terms


def check_losses(losses: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Returns ``losses`` as (name, weight) pairs.

    Raises:
        ValueError: if it is empty, a name is unknown or repeated, or an entry is not a pair.
    """
    choices = sorted(name for name, _ in MASK_LOSS_REGISTRY)
    where = f"MODEL.ROI_MASK_HEAD.LOSSES {list(losses)!r}"
    checked: list[tuple[str, float]] = []
    for entry in losses:
        pair = isinstance(entry, list | tuple) and len(entry) == 2
        if not pair or not isinstance(entry[1], int | float):
            raise ValueError(f"{where}: {entry!r} is not a pair [name, weight]")
        name, weight = entry
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{where}: weight {weight} of {name!r} is not a finite number >= 0")
        if name not in choices:
            raise ValueError(f"{where}: no loss {name!r}; choose from {choices}")
        if name in dict(checked):
            raise ValueError(f"{where}: {name!r} stands twice; add its weights")
        checked.append((name, float(weight)))
    if not checked:
        raise ValueError(f"{where}: give at least one [name, weight], e.g. {choices[0]!r}, 1.0")
    return checked
