"""SOLVER.CLIP_GRADIENTS for models in which some parameters have no gradient.

detectron2's clipping by value fails in PyTorch where a parameter has no gradient, such as those of
a pyramid level that no head reads. It also lacks ``full_model``, which configs of other projects
ask for.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer


def clip_gradients(optimizer: Optimizer, clip: CfgNode) -> None:
    """Lets an optimizer clip gradients before each step; with AMP, after they are unscaled.

    Args:
        optimizer: changed in place.
        clip: SOLVER.CLIP_GRADIENTS. By ``value`` each number is limited, by ``norm`` each
            parameter's gradient, by ``full_model`` all gradients together.
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
