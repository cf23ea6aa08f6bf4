"""Mask scoring: hand-worked targets, training, and its effect on the ranking of masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_instances, small_config
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from mask_head_plugin.modeling import MASK_LOSS_REGISTRY, FCNMaskHead
from mask_head_plugin.modeling.mask_loss import soft_iou
from mask_head_plugin.modeling.mask_scoring import MaskIoUHead, instance_areas, mask_iou_targets

SHAPE = ShapeSpec(channels=4, height=7, width=7)


def make_head(**kwargs):
    return FCNMaskHead(
        SHAPE, num_classes=3, conv_dims=[4, 4], iou_head=MaskIoUHead(SHAPE, 3, 6, 8), **kwargs
    )


def test_hand_worked_targets():
    bits, gt = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    bits[:, :2] = True  # 8 pixels
    gt[:, 1:3] = True  # 8 pixels, 4 of them shared
    box_area = torch.tensor([16.0, 16.0])
    gt_area = torch.tensor([8.0, 20.0])  # the second has 12 pixels outside its RoI
    expected = [4 / (8 + 8 - 4), 4 / (8 + 20 - 4)]
    assert mask_iou_targets(bits, gt, box_area, gt_area).tolist() == pytest.approx(expected)


def test_the_part_within_the_roi_never_exceeds_the_whole_object():
    gt = torch.zeros(2, 4, 4, dtype=torch.bool)
    gt[:, 1:3] = True  # 8 pixels, more than the areas 6 and 0 that are given for the objects
    target = mask_iou_targets(gt, gt, torch.tensor([16.0, 0.0]), torch.tensor([6.0, 0.0]))
    assert target.tolist() == [1.0, 1.0]


def test_the_target_of_empty_masks_is_zero():
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    area = torch.tensor([16.0])
    assert mask_iou_targets(nothing, nothing, area, 0 * area).tolist() == [0.0]
    none = torch.zeros(0, 4, 4, dtype=torch.bool)
    assert mask_iou_targets(none, none, area[:0], area[:0]).shape == (0,)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_areas_are_measured_on_whole_objects(mask_format):
    rng = np.random.default_rng(0)
    instances = random_instances(4, (40, 40), 3, rng, mask_format)
    instances.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 4, 5]] * 4))
    boxes, masks = instance_areas([instances, instances[:0]], torch.device("cpu"))
    assert boxes.tolist() == [20.0] * 4
    bits = random_instances(4, (40, 40), 3, np.random.default_rng(0), "bitmask").gt_masks.tensor
    # Polygon areas differ from pixel counts by up to half a pixel along the outline.
    tolerance = 0 if mask_format == "bitmask" else 40
    assert (masks - bits.flatten(1).sum(1)).abs().max() <= tolerance


def test_the_iou_loss_trains_only_the_iou_head():
    head = make_head(iou_loss_weight=2.0)
    instances = random_instances(5, (64, 64), 3, np.random.default_rng(0), "bitmask")
    instances.proposal_boxes = instances.gt_boxes
    with EventStorage(0):
        losses = head(torch.randn(5, 4, 7, 7), [instances])
    assert set(losses) == {"loss_mask", "loss_mask_iou"}
    losses["loss_mask_iou"].backward()
    for name, parameter in head.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert trained == name.startswith("iou_head"), name


def test_training_without_positives_and_inference_without_detections():
    head, nothing = (
        make_head(),
        random_instances(0, (64, 64), 3, np.random.default_rng(0), "bitmask"),
    )
    nothing.proposal_boxes, nothing.pred_classes = nothing.gt_boxes, nothing.gt_classes
    nothing.scores = torch.zeros(0)
    with EventStorage(0):
        losses = head(torch.zeros(0, 4, 7, 7), [nothing])
    sum(losses.values()).backward()
    assert losses["loss_mask_iou"] == 0
    assert all(p.grad is not None for p in head.parameters())
    assert head.eval()(torch.zeros(0, 4, 7, 7), [nothing])[0].mask_scores.shape == (0,)


def test_the_mask_score_is_the_class_score_times_the_predicted_iou():
    head = make_head().eval()
    detections = Instances((64, 64))
    detections.pred_classes = torch.tensor([2, 0, 1])
    detections.scores = torch.tensor([0.9, 0.5, 0.4])
    features = torch.randn(3, 4, 7, 7)
    with torch.no_grad():
        head.iou_head.predictor.bias.copy_(torch.tensor([0.6, 5.0, -3.0]))
        head.iou_head.predictor.weight.zero_()
        (result,) = head(features, [detections])
    # The IoU is clamped to [0, 1].
    torch.testing.assert_close(result.mask_scores, torch.tensor([0.0, 0.3, 0.4]))
    assert result.scores.tolist() == pytest.approx([0.9, 0.5, 0.4])


def test_boxes_without_scores_get_masks_without_mask_scores():
    boxes = Instances((64, 64))
    boxes.pred_classes = torch.tensor([2])
    (result,) = make_head().eval()(torch.randn(1, 4, 7, 7), [boxes])
    assert result.has("pred_masks") and not result.has("mask_scores")


def test_the_loss_is_the_weighted_squared_error_of_the_predicted_iou():
    head = make_head(iou_loss_weight=2.0)
    torch.nn.init.normal_(head.iou_head.predictor.weight)
    torch.nn.init.normal_(head.predictor.weight)
    instances = random_instances(5, (64, 64), 3, np.random.default_rng(0), "bitmask")
    instances.proposal_boxes = instances.gt_boxes
    features, classes = torch.randn(5, 4, 7, 7), instances.gt_classes
    with EventStorage(0):
        loss = head(features, [instances])["loss_mask_iou"]
    probs = head.selected_logits(features, classes).sigmoid()
    gt = instances.gt_masks.crop_and_resize(instances.gt_boxes.tensor, 14)
    areas = instance_areas([instances], torch.device("cpu"))
    target = mask_iou_targets(probs > 0.5, gt, *areas)
    assert target.std() > 0.01, "targets must differ"
    expected = 2 * (head.iou_head(features, probs, classes) - target).square().mean()
    torch.testing.assert_close(loss, expected)


def test_no_mask_loss_may_have_the_name_of_the_iou_loss(monkeypatch):
    monkeypatch.setitem(MASK_LOSS_REGISTRY._obj_map, "iou", soft_iou)
    with pytest.raises(ValueError, match="mask scoring already logs loss_mask_iou"):
        make_head(losses=[["dice", 1.0], ["iou", 1.0]])


@pytest.mark.parametrize(
    "name", ["Base-MaskRCNN-FPN.yaml", "Base-MaskRCNN-C4.yaml", "Base-MaskRCNN-DC5.yaml"]
)
@pytest.mark.parametrize("head", ["FCNMaskHead", "MLPMaskHead"])
def test_whole_models_train_and_predict_with_mask_scoring(name, head):
    opts = ["MODEL.ROI_MASK_HEAD.NAME", head, "MODEL.ROI_MASK_HEAD.SCORING.ENABLED", "True"]
    opts += ["MODEL.ROI_MASK_HEAD.FC_DIM", "8", "MODEL.ROI_MASK_HEAD.SCORING.FC_DIM", "8"]
    opts += ["MODEL.ROI_MASK_HEAD.SCORING.CONV_DIM", "8"]
    model = build_model(small_config(name, *opts, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"))
    instances = random_instances(3, (96, 96), 5, np.random.default_rng(0), "bitmask")
    image = torch.randint(0, 255, (3, 96, 96)).float()
    with EventStorage(0):
        losses = model([{"image": image, "instances": instances}])
    sum(losses.values()).backward()
    assert torch.isfinite(losses["loss_mask_iou"])
    with torch.no_grad():
        (output,) = model.eval()([{"image": image, "height": 96, "width": 96}])
    detections = output["instances"]
    assert len(detections) > 0 and len(detections.mask_scores) == len(detections)
    assert (detections.mask_scores <= detections.scores).all()
