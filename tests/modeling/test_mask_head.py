"""Mask heads: predicting only the selected classes equals dense prediction; logging and losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_instances, relative_error
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mask_head_plugin.config import DEFAULT_LOSSES
from mask_head_plugin.modeling import MASK_LOSS_REGISTRY, FCNMaskHead, MLPMaskHead
from mask_head_plugin.modeling.class_selection import select_class_logits, select_class_masks
from mask_head_plugin.modeling.mask_head import STATISTICS_PERIOD
from mask_head_plugin.modeling.mask_loss import (
    binary_cross_entropy,
    softmax_cross_entropy,
    softmax_probs,
)
from mask_head_plugin.modeling.mask_loss_terms import parse_losses

IMAGE_HW = (64, 64)


def make_head(num_classes=3, **kwargs) -> FCNMaskHead:
    return FCNMaskHead(
        ShapeSpec(channels=4, height=7, width=7),
        num_classes=num_classes,
        conv_dims=[4, 4],
        **kwargs,
    )


def make_mlp(num_classes=3, **kwargs) -> MLPMaskHead:
    shape = ShapeSpec(channels=4, height=7, width=7)
    return MLPMaskHead(shape, num_classes=num_classes, fc_dims=[6, 5], **kwargs)


def make_positives(num_instances: int, num_classes: int = 3) -> Instances:
    rng = np.random.default_rng(0)
    instances = random_instances(num_instances, IMAGE_HW, num_classes, rng, "bitmask")
    instances.proposal_boxes = instances.gt_boxes
    return instances


@settings(deadline=None, max_examples=30)
@given(
    classes=st.lists(st.integers(0, 6), max_size=9),
    channels=st.integers(1, 5),
    side=st.integers(1, 6),
    bias=st.booleans(),
)
def test_selected_logits_equal_dense_prediction(classes, channels, side, bias):
    predictor = nn.Conv2d(channels, 7, 1, bias=bias, dtype=torch.float64)
    features = torch.randn(len(classes), channels, side, side, dtype=torch.float64)
    indices = torch.tensor(classes, dtype=torch.int64)
    inputs = [features.clone().requires_grad_(), features.clone().requires_grad_()]
    selected = select_class_logits(inputs[0], predictor, indices)
    dense = predictor(inputs[1])[torch.arange(len(classes)), indices]
    torch.testing.assert_close(selected, dense, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(dense)
    gradients = []
    for output, x in ((selected, inputs[0]), (dense, inputs[1])):
        gradients.append(
            torch.autograd.grad((output * weights).sum(), [x, *predictor.parameters()])
        )
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(classes=st.lists(st.integers(0, 6), max_size=9), width=st.integers(1, 5))
def test_selected_rows_of_a_linear_layer_equal_dense_prediction(classes, width):
    predictor = nn.Linear(width, 7 * 9, dtype=torch.float64)
    hidden = torch.randn(len(classes), width, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor(classes, dtype=torch.int64)
    selected = select_class_masks(hidden, predictor, indices, 3)
    dense = predictor(hidden).view(-1, 7, 3, 3)[torch.arange(len(classes)), indices]
    torch.testing.assert_close(selected, dense, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(dense)
    for a, b in zip(
        *(
            torch.autograd.grad((output * weights).sum(), [hidden, *predictor.parameters()])
            for output in (selected, dense)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_instances", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls_agnostic", [False, True])
@pytest.mark.parametrize("make", [make_head, make_mlp])
def test_each_head_equals_its_dense_form(make, cls_agnostic, dtype, num_instances):
    """Compares the loss, all gradients and inference, with repeated and absent classes."""
    head = make(1 if cls_agnostic else 5).to(dtype)
    nn.init.normal_(head.predictor.weight)
    instances, features = make_positives(num_instances, 3), torch.randn(num_instances, 4, 7, 7)
    features = features.to(dtype)

    def run():
        instances.pred_classes = instances.gt_classes
        with EventStorage(0):
            loss = head.train()(features, [instances])["loss_mask"]
        gradients = torch.autograd.grad(loss, list(head.parameters()))
        return [loss, *gradients, head.eval()(features, [instances])[0].pred_masks.detach()]

    selected = run()
    head.selected_logits = lambda x, classes: head.class_logits(x)[torch.arange(len(x)), classes]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for actual, expected in zip(selected, run(), strict=True):
        assert actual.shape == expected.shape
        if expected.numel():
            assert relative_error(actual, expected) <= tolerance


@pytest.mark.parametrize("make", [make_head, make_mlp])
def test_the_softmax_head_predicts_the_softmax_over_all_classes(make):
    head = make(3, losses=[["softmax_cross_entropy", 1.0]])
    nn.init.normal_(head.predictor.weight)
    instances, features = make_positives(5), torch.randn(5, 4, 7, 7)
    instances.pred_classes = instances.gt_classes
    logits = head.class_logits(features)
    with EventStorage(0):
        loss = head(features, [instances])["loss_mask"]
    gt = instances.gt_masks.crop_and_resize(instances.proposal_boxes.tensor, 14).float()
    expected = softmax_cross_entropy(logits, instances.gt_classes, gt)
    torch.testing.assert_close(loss, expected)
    probs = head.eval()(features, [instances])[0].pred_masks[:, 0]
    torch.testing.assert_close(probs, softmax_probs(logits, instances.gt_classes))


def test_the_mlp_requires_hidden_layers_and_square_features():
    with pytest.raises(ValueError, match=r"raise MODEL\.ROI_MASK_HEAD\.NUM_FC"):
        MLPMaskHead(ShapeSpec(channels=4, height=7, width=7), num_classes=3, fc_dims=[])
    with pytest.raises(ValueError, match="square"):
        MLPMaskHead(ShapeSpec(channels=4, height=7, width=5), num_classes=3, fc_dims=[4])


@pytest.mark.parametrize("losses", [DEFAULT_LOSSES, [["softmax_cross_entropy", 1.0]]])
@pytest.mark.parametrize("make", [make_head, make_mlp])
def test_autocast_gives_nearly_the_same_loss_as_full_precision(make, losses):
    head = make(3, losses=losses)
    instances, features = make_positives(4), torch.randn(4, 4, 7, 7)
    nn.init.normal_(head.predictor.weight)
    with EventStorage(0):
        expected = head(features, [instances])["loss_mask"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = head(features, [instances])["loss_mask"]
    actual.backward()
    assert actual.dtype == torch.float32 and relative_error(actual, expected) < 0.02


def test_select_class_logits_of_a_hand_worked_example():
    predictor = nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        predictor.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, :, None, None])
        predictor.bias.copy_(torch.tensor([0.5, -0.5]))
    features = torch.tensor([[10.0, 1.0], [10.0, 1.0]])[:, :, None, None]
    logits = select_class_logits(features, predictor, torch.tensor([1, 0]))
    assert logits.flatten().tolist() == [3 * 10 + 4 * 1 - 0.5, 1 * 10 + 2 * 1 + 0.5]


@pytest.mark.parametrize("cls_agnostic", [False, True])
def test_class_agnostic_head_has_one_channel_and_ignores_classes(cls_agnostic):
    head = make_head(1 if cls_agnostic else 3).eval()
    nn.init.normal_(head.predictor.weight)
    instances = make_positives(4)
    features = torch.randn(1, 4, 7, 7).expand(4, -1, -1, -1)
    instances.pred_classes = torch.tensor([0, 1, 2, 0])
    probs = head(features, [instances])[0].pred_masks
    # The batched product may round each RoI differently.
    torch.testing.assert_close(probs[0], probs[3])
    assert torch.allclose(probs[0], probs[1], atol=1e-4) == cls_agnostic


def test_statistics_include_all_pixels_since_the_last_log():
    head = make_head()
    nn.init.normal_(head.predictor.weight)
    instances = make_positives(5)
    wrong = positives = missed = pixels = 0
    with EventStorage(0) as storage:
        for _ in range(STATISTICS_PERIOD):
            assert "mask_rcnn/accuracy" not in storage.latest()
            features = torch.randn(5, 4, 7, 7)
            head(features, [instances])
            probs = head.layers(features)[torch.arange(5), instances.gt_classes]
            gt = instances.gt_masks.crop_and_resize(instances.proposal_boxes.tensor, 14)
            predicted = probs > 0
            wrong += (predicted != gt).sum().item()
            positives += gt.sum().item()
            missed += (gt & ~predicted).sum().item()
            pixels += gt.numel()
            storage.step()
        latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["mask_rcnn/accuracy"] == pytest.approx(1 - wrong / pixels)
    assert latest["mask_rcnn/false_negative"] == pytest.approx(missed / positives)
    false_positive = (wrong - missed) / (pixels - positives)
    assert latest["mask_rcnn/false_positive"] == pytest.approx(false_positive)


def test_masks_and_targets_are_drawn_every_visualisation_period():
    head = make_head(vis_period=2)
    instances = make_positives(3)
    with EventStorage(0) as storage:
        counts = []
        for _ in range(4):
            storage.clear_images()
            head(torch.randn(3, 4, 7, 7), [instances])
            counts.append(len(storage._vis_data))
            storage.step()
    assert counts == [3, 0, 3, 0]


def test_the_state_dict_has_only_detectron2s_names():
    names = {"mask_fcn1.weight", "mask_fcn1.bias", "deconv.weight", "deconv.bias"}
    assert set(make_head().state_dict()) == names | {"predictor.weight", "predictor.bias"}


def test_one_loss_is_named_as_in_detectron2_and_several_by_term():
    MASK_LOSS_REGISTRY._do_register(
        "twice_bce", lambda z, g, w=None: 2 * binary_cross_entropy(z, g)
    )
    try:
        instances, features = make_positives(4), torch.randn(4, 4, 7, 7)
        head = make_head(
            losses=[("binary_cross_entropy", 0.5), ("twice_bce", 3.0)], loss_weight=2.0
        )
        with EventStorage(0):
            terms = head(features, [instances])
            head.losses = parse_losses([("binary_cross_entropy", 1.0)], {})
            single = head(features, [instances])
        assert set(terms) == {"loss_mask_binary_cross_entropy", "loss_mask_twice_bce"}
        assert set(single) == {"loss_mask"}
        bce = single["loss_mask"]
        torch.testing.assert_close(terms["loss_mask_binary_cross_entropy"], bce)
        torch.testing.assert_close(terms["loss_mask_twice_bce"], 12 * bce)
    finally:
        del MASK_LOSS_REGISTRY._obj_map["twice_bce"]


def test_images_without_positives_among_others_are_skipped():
    head, features = make_head(), torch.randn(4, 4, 7, 7)
    empty = Instances(IMAGE_HW)
    empty.proposal_boxes, empty.gt_classes = (
        Boxes(torch.zeros(0, 4)),
        torch.zeros(0, dtype=torch.int64),
    )
    with EventStorage(0):
        alone = head(features, [make_positives(4)])["loss_mask"]
        together = head(features, [empty, make_positives(4)])["loss_mask"]
    assert torch.equal(alone, together)


def test_statistics_of_another_event_storage_are_discarded():
    head, instances = make_head(), make_positives(3)
    with EventStorage(0):
        head(torch.randn(3, 4, 7, 7), [instances])
        with EventStorage(5):
            head(torch.randn(3, 4, 7, 7), [instances])
        assert head._num_pixels == 3 * 14 * 14


def test_fractional_targets_enter_the_loss_unrounded():
    class Shares:
        """Replaces BitMasks. Crops contain fractions of foreground instead of bits."""

        def crop_and_resize(self, boxes, size):
            return torch.full((len(boxes), size, size), 0.25)

    head, features, instances = make_head(), torch.randn(3, 4, 7, 7), make_positives(3)
    instances._fields["gt_masks"] = Shares()
    with EventStorage(0):
        loss = head(features, [instances])["loss_mask"]
    logits = head.layers(features)[torch.arange(3), instances.gt_classes]
    expected = nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.25))
    torch.testing.assert_close(loss, expected)


def test_the_error_for_a_config_without_the_plugins_keys_says_what_to_call():
    from detectron2.config import get_cfg

    with pytest.raises(KeyError, match="add_mask_head_config"):
        FCNMaskHead(get_cfg(), ShapeSpec(channels=4, height=7, width=7))
