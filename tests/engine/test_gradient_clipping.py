"""SOLVER.CLIP_GRADIENTS works as in detectron2, and also if a parameter has no gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import small_config
from detectron2.solver import build_optimizer

from mask_head_plugin.engine import Trainer


def clipped(build, clip_type: str, gradients: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Returns the clipped gradients: the negated weights after a step from 0 at learning rate 1."""
    opts = ["SOLVER.BASE_LR", "1.0", "SOLVER.MOMENTUM", "0.0", "SOLVER.WEIGHT_DECAY", "0.0"]
    opts += ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "1.0"]
    opts += ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type]
    cfg = small_config("Base-Small.yaml", *opts)
    cfg.freeze()
    model = torch.nn.ParameterList([torch.zeros(3) for _ in gradients])
    optimizer = build(cfg, model)
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    return [-parameter.detach() for parameter in model]


def made_gradients() -> list[torch.Tensor]:
    return [torch.tensor([3.0, -0.5, 4.0]), torch.tensor([0.1, 0.2, 0.2])]


@pytest.mark.parametrize("clip_type", ["value", "norm"])
def test_clipping_equals_detectron2s(clip_type):
    ours = clipped(Trainer.build_optimizer, clip_type, made_gradients())
    stock = clipped(build_optimizer, clip_type, made_gradients())
    assert torch.equal(torch.stack(ours), torch.stack(stock))
    assert not torch.equal(torch.stack(ours), torch.stack(made_gradients()))


def test_the_full_model_is_clipped_by_the_norm_of_all_gradients():
    ours = torch.stack(clipped(Trainer.build_optimizer, "full_model", made_gradients()))
    expected = torch.stack(made_gradients())
    torch.testing.assert_close(ours, expected / expected.norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_type", ["value", "norm", "full_model"])
def test_parameters_without_a_gradient_are_not_changed(clip_type):
    gradients = [torch.tensor([0.1, 0.2, 0.3]), None]
    weights = clipped(Trainer.build_optimizer, clip_type, gradients)
    assert torch.equal(weights[1], torch.zeros(3))
    torch.testing.assert_close(weights[0], torch.tensor([0.1, 0.2, 0.3]))
    clipped(Trainer.build_optimizer, clip_type, [None])
