"""SOLVER.CLIP_GRADIENTS for models in which some parameters have no gradient.

In detectron2, clipping by value fails if a parameter has no gradient, for example in a pyramid
level that no head reads. detectron2 also has no ``full_model``, which configs of other projects
use.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer


def clip_gradients(optimizer: Optimizer, clip: CfgNode) -> None:
    """Makes an optimizer clip gradients before each update (with AMP, after they are unscaled).

    Args:
        optimizer: changed in place.
        clip: SOLVER.CLIP_GRADIENTS. The type ``value`` limits each element of a gradient, ``norm``
            limits the norm of each parameter's gradient, and ``full_model`` limits the norm of all
            gradients together.
    """
    limit, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        parameters = [x for group in optimizer.param_groups for x in group["params"]]
        parameters = [x for x in parameters if x.grad is not None]
        if not parameters:
            return
        match clip.CLIP_TYPE:
            case "value":
                clip_grad_value_(parameters, limit)
            case "norm":
                for parameter in parameters:
                    clip_grad_norm_(parameter, limit, norm_type)
            case "full_model":
                clip_grad_norm_(parameters, limit, norm_type)

    optimizer.register_step_pre_hook(before_step)
