"""torch.compile captures one graph for the mask head and its loss, and one for the pooler."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torch import nn

from mask_head_plugin.modeling import MASK_LOSS_REGISTRY, FCNMaskHead, MultiLevelRoIPooler
from mask_head_plugin.modeling.mask_loss_terms import parse_losses, weighted_mask_losses
from mask_head_plugin.modeling.pooler import POOLER_TYPES
from mask_head_plugin.ops import crop_masks
from mask_head_plugin.ops.compiled_pooling import pool_rois

SHAPE = ShapeSpec(channels=4, height=7, width=7)


class HeadAndLoss(nn.Module):
    """The tensor operations of the head, without detectron2's Instances and logging."""

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
def test_the_mask_head_and_its_loss_compile_to_one_graph(name):
    torch._dynamo.reset()  # Dynamo limits how often a function is recompiled
    module = HeadAndLoss(name)
    inputs = torch.randn(5, 4, 7, 7), torch.randint(0, 3, (5,)), torch.rand(5, 14, 14) > 0.5
    compiled = torch.compile(module, backend="eager", fullgraph=True)  # raises at a graph break
    expected, actual = module(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    weight = module.head.predictor.weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("pooler_type", "reduction"),
    [*((name, "mean") for name in POOLER_TYPES), ("ROIAlignV2", "max")],
)
def test_the_pooler_compiles_to_one_graph_with_the_same_gradients(pooler_type, reduction):
    torch._dynamo.reset()
    pooler = MultiLevelRoIPooler(3, [1 / 4, 1 / 8], 2, pooler_type, 16, 2, reduction)
    maps = [torch.randn(2, 4, side, side, requires_grad=True) for side in (16, 8)]
    corners = torch.rand(5, 2) * 30
    boxes = torch.cat([corners, corners + 4 + torch.rand(5, 2) * 26], dim=1).requires_grad_()

    def pool(maps, boxes):
        return pooler(maps, [Boxes(boxes[:2]), Boxes(boxes[2:])])

    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)  # raises at a graph break
    expected, actual = pool(maps, boxes), compiled(maps, boxes)
    torch.testing.assert_close(actual, expected)
    inputs = [*maps, boxes] if pooler_type == "PrROIPool" else maps
    weights = torch.randn(expected.shape)
    gradients = [torch.autograd.grad(x, inputs, weights) for x in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_the_custom_operator_passes_opcheck():
    rois = torch.tensor([[0, 1.0, 2, 9, 12], [0, 3, 3, 20, 10]])
    maps = [torch.randn(1, 2, side, side, requires_grad=True) for side in (8, 4)]
    levels, options = torch.tensor([0, 1]), ("roi_align", 0, True, "mean")
    torch.library.opcheck(pool_rois, (maps, rois, levels, [3, 2], [0.25, 0.125], *options))


def test_mask_targets_compile_to_one_graph():
    torch._dynamo.reset()
    bit_masks, corners = torch.rand(5, 20, 30) > 0.5, torch.rand(5, 2) * 10
    boxes = torch.cat([corners, corners + 1 + torch.rand(5, 2) * 20], dim=1)
    compiled = torch.compile(crop_masks, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(bit_masks, boxes, 7), crop_masks(bit_masks, boxes, 7))
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        compiled(bit_masks, boxes * float("inf"), 7)
