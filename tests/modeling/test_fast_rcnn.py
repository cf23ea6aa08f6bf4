"""Compares the class-selective box predictor with detectron2's, which gets the same parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative_error, small_config
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from mask_head_plugin.modeling.fast_rcnn import ClassSelectiveOutputLayers, make_class_selective

NUM_CLASSES, WIDTH = 7, 12


def make_twins(**arguments):
    stock = FastRCNNOutputLayers(
        ShapeSpec(channels=WIDTH),
        box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        **{"num_classes": NUM_CLASSES, **arguments},
    ).double()
    torch.nn.init.normal_(stock.bbox_pred.weight)
    torch.nn.init.normal_(stock.bbox_pred.bias)
    return make_class_selective(copy.deepcopy(stock)), stock


def make_proposals(counts, num_objects):
    proposals = []
    for count in counts:
        x = Instances((50, 60))
        corner = 30 * torch.rand(count, 2, dtype=torch.float64)
        x.proposal_boxes = Boxes(torch.cat([corner, corner + 9], dim=1))
        x.gt_boxes = Boxes(x.proposal_boxes.tensor + torch.rand(count, 4, dtype=torch.float64))
        x.gt_classes = torch.full((count,), NUM_CLASSES)
        x.gt_classes[:num_objects] = torch.randint(0, NUM_CLASSES, (min(num_objects, count),))
        proposals.append(x)
    return proposals


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
@pytest.mark.parametrize(("counts", "num_objects"), [((20, 9), 4), ((5, 5), 0), ((0, 0), 0)])
def test_losses_and_gradients_equal_stock(counts, num_objects, loss_type):
    ours, stock = make_twins(box_reg_loss_type=loss_type)
    proposals = make_proposals(counts, num_objects)
    features = torch.randn(sum(counts), WIDTH, 1, 1, dtype=torch.float64)
    gradients = []
    for predictor in (ours, stock):
        x = features.clone().requires_grad_()
        with EventStorage(0):
            losses = predictor.losses(predictor(x), proposals)
        sum(loss.sum() for loss in losses.values()).backward()
        gradients.append([x.grad, *(p.grad for p in predictor.parameters()), *losses.values()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    if num_objects:
        assert stock.bbox_pred.weight.grad.abs().max() > 0


def test_predicted_boxes_in_training_equal_stock():
    ours, stock = make_twins()
    proposals, features = make_proposals((6, 3), 6), torch.randn(9, WIDTH, dtype=torch.float64)
    for method in ("predict_boxes_for_gt_classes", "predict_boxes"):
        actual, expected = (
            torch.cat(getattr(p, method)(p(features), copy.deepcopy(proposals)))
            for p in (ours, stock)
        )
        assert relative_error(actual, expected) <= 1e-12, method


@pytest.mark.parametrize(
    "num_classes", [3, NUM_CLASSES]
)  # 3 classes have 4 x 3 = 12 deltas, equal to the number of features
def test_losses_in_evaluation_mode_equal_stock(num_classes):
    ours, stock = (x.eval() for x in make_twins(num_classes=num_classes))
    proposals, features = make_proposals((6,), 3), torch.randn(6, WIDTH, dtype=torch.float64)
    proposals[0].gt_classes = proposals[0].gt_classes.clamp(max=num_classes)
    with EventStorage(0):
        losses = [p.losses(p(features), proposals) for p in (ours, stock)]
    assert losses[0] == losses[1]


def test_inference_equals_detectron2():
    ours, stock = make_twins()
    features = torch.randn(9, WIDTH, dtype=torch.float64)
    for actual, expected in zip(ours.eval()(features), stock.eval()(features), strict=True):
        assert torch.equal(actual, expected)


def test_class_agnostic_single_class_and_foreign_predictors_are_not_replaced():
    class Foreign(FastRCNNOutputLayers):
        pass

    assert type(make_twins()[0]) is ClassSelectiveOutputLayers
    assert type(make_twins(cls_agnostic_bbox_reg=True)[0]) is FastRCNNOutputLayers
    assert type(make_twins(num_classes=1)[0]) is FastRCNNOutputLayers
    transform = Box2BoxTransform((1.0,) * 4)
    foreign = Foreign(ShapeSpec(channels=2), box2box_transform=transform, num_classes=3)
    assert type(make_class_selective(foreign)) is Foreign


def test_roi_heads_get_the_same_initial_weights_as_detectron2():
    cfg = small_config("Base-MaskRCNN-FPN.yaml")
    shapes = {f"p{k}": ShapeSpec(channels=16, stride=2**k) for k in range(2, 6)}
    weights = []
    for name in ("PerClassMaskROIHeads", "StandardROIHeads"):
        cfg.MODEL.ROI_HEADS.NAME = name
        torch.manual_seed(3)
        weights.append(build_roi_heads(cfg, shapes).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
