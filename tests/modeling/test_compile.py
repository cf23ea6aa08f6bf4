"""torch.compile puts the mask head and its losses into one graph, in training and inference."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from mask_head_plugin.modeling import MASK_LOSS_REGISTRY, FCNMaskHead
from mask_head_plugin.modeling.mask_loss_terms import parse_losses, weighted_mask_losses

SHAPE = ShapeSpec(channels=4, height=7, width=7)


class HeadAndLoss(nn.Module):
    """What the head does with tensors, without detectron2's Instances and logs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.head = FCNMaskHead(SHAPE, num_classes=3, conv_dims=[4, 4])
        self.terms = parse_losses([[name, 1.0]], {})

    def forward(self, features, classes, gt_masks):
        if self.terms[0].activation is None:
            logits = self.head.selected_logits(features, classes)
        else:
            logits = self.head.class_logits(features)
        (loss,) = weighted_mask_losses(self.terms, logits, classes, gt_masks, 0).values()
        return loss


@pytest.mark.parametrize("name", [name for name, _ in MASK_LOSS_REGISTRY])
def test_the_mask_head_with_its_loss_is_one_graph(name):
    torch._dynamo.reset()  # it compiles a function for a limited number of modules
    module = HeadAndLoss(name)
    inputs = torch.randn(5, 4, 7, 7), torch.randint(0, 3, (5,)), torch.rand(5, 14, 14) > 0.5
    compiled = torch.compile(module, backend="eager", fullgraph=True)  # raises at a break
    expected, actual = module(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    weight = module.head.predictor.weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients)
