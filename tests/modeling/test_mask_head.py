"""FCNMaskHead: selected prediction equals dense prediction, logging, loss terms."""

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

from mask_head_plugin.modeling import MASK_LOSS_REGISTRY, FCNMaskHead
from mask_head_plugin.modeling.mask_head import STATISTICS_PERIOD, select_class_logits
from mask_head_plugin.modeling.mask_loss import binary_cross_entropy, check_losses

IMAGE_HW = (64, 64)


def make_head(num_classes=3, **kwargs) -> FCNMaskHead:
    return FCNMaskHead(
        ShapeSpec(channels=4, height=7, width=7),
        num_classes=num_classes,
        conv_dims=[4, 4],
        **kwargs,
    )


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
    # The batched product may round each RoI in its own way.
    torch.testing.assert_close(probs[0], probs[3])
    assert torch.allclose(probs[0], probs[1], atol=1e-4) == cls_agnostic


def test_statistics_are_those_of_all_pixels_since_the_last_log():
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


def test_masks_and_targets_are_drawn_at_the_visualisation_period():
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


def test_state_dict_has_detectron2s_names_only():
    names = {"mask_fcn1.weight", "mask_fcn1.bias", "deconv.weight", "deconv.bias"}
    assert set(make_head().state_dict()) == names | {"predictor.weight", "predictor.bias"}


def test_single_loss_is_named_as_in_detectron2_and_several_by_term():
    MASK_LOSS_REGISTRY._do_register("twice_bce", lambda z, g: 2 * binary_cross_entropy(z, g))
    try:
        instances, features = make_positives(4), torch.randn(4, 4, 7, 7)
        head = make_head(
            losses=[("binary_cross_entropy", 0.5), ("twice_bce", 3.0)], loss_weight=2.0
        )
        with EventStorage(0):
            terms = head(features, [instances])
            head.losses = [("binary_cross_entropy", 1.0)]
            single = head(features, [instances])
        assert set(terms) == {"loss_mask_binary_cross_entropy", "loss_mask_twice_bce"}
        assert set(single) == {"loss_mask"}
        bce = single["loss_mask"]
        torch.testing.assert_close(terms["loss_mask_binary_cross_entropy"], bce)
        torch.testing.assert_close(terms["loss_mask_twice_bce"], 12 * bce)
    finally:
        del MASK_LOSS_REGISTRY._obj_map["twice_bce"]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "at least one"),
        ([["dise", 1.0]], "no loss 'dise'; choose from .*binary_cross_entropy"),
        (["binary_cross_entropy"], "not a pair"),
        ([["binary_cross_entropy", "1"]], "not a pair"),
        ([5], "not a pair"),
        ([["binary_cross_entropy", 1.0], ["binary_cross_entropy", 2.0]], "twice"),
    ],
)
def test_malformed_losses_are_refused_with_the_key(losses, message):
    with pytest.raises(ValueError, match=f"MODEL.ROI_MASK_HEAD.LOSSES.*{message}"):
        check_losses(losses)


def test_binary_cross_entropy_of_a_hand_worked_example():
    logits = torch.tensor([[[0.0, np.log(3.0)]]], dtype=torch.float64)  # p = 1/2, 3/4
    targets = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    expected = (-np.log(0.5) - np.log(0.25)) / 2
    assert binary_cross_entropy(logits, targets).item() == pytest.approx(expected, abs=1e-12)


def test_binary_cross_entropy_gradient():
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 2, (2, 3, 3)).double()
    assert torch.autograd.gradcheck(lambda z: binary_cross_entropy(z, targets), logits)


def test_binary_cross_entropy_of_no_rois_is_zero_with_a_graph():
    logits = torch.zeros(0, 3, 3, requires_grad=True)
    loss = binary_cross_entropy(logits, torch.zeros(0, 3, 3))
    loss.backward()
    assert loss == 0 and logits.grad is not None


def test_half_precision_autocast_gives_the_loss_of_full_precision():
    head, instances, features = make_head(), make_positives(4), torch.randn(4, 4, 7, 7)
    nn.init.normal_(head.predictor.weight)
    with EventStorage(0):
        expected = head(features, [instances])["loss_mask"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = head(features, [instances])["loss_mask"]
    assert relative_error(actual.float(), expected) < 0.02


def test_images_without_positives_among_others_are_skipped():
    head, features = make_head(), torch.randn(4, 4, 7, 7)
    empty = Instances(IMAGE_HW)
    empty.proposal_boxes, empty.gt_classes = (
        Boxes(torch.zeros(0, 4)),
        torch.zeros(0, dtype=torch.int64),
    )
    with EventStorage(0):
        alone = head(features, [make_positives(4)])["loss_mask"]
        beside = head(features, [empty, make_positives(4)])["loss_mask"]
    assert torch.equal(alone, beside)


def test_statistics_of_another_storage_are_not_mixed_in():
    head, instances = make_head(), make_positives(3)
    with EventStorage(0):
        head(torch.randn(3, 4, 7, 7), [instances])
        with EventStorage(5):
            head(torch.randn(3, 4, 7, 7), [instances])
        assert head._num_pixels == 3 * 14 * 14


def test_targets_that_are_shares_count_as_such_in_the_loss():
    class Shares:
        """Like BitMasks, but crops to the share of foreground."""

        def crop_and_resize(self, boxes, size):
            return torch.full((len(boxes), size, size), 0.25)

    head, features, instances = make_head(), torch.randn(3, 4, 7, 7), make_positives(3)
    instances._fields["gt_masks"] = Shares()
    with EventStorage(0):
        loss = head(features, [instances])["loss_mask"]
    logits = head.layers(features)[torch.arange(3), instances.gt_classes]
    expected = nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.25))
    torch.testing.assert_close(loss, expected)


def test_a_config_without_the_plugins_keys_names_the_call():
    from detectron2.config import get_cfg

    with pytest.raises(KeyError, match="add_mask_head_config"):
        FCNMaskHead(get_cfg(), ShapeSpec(channels=4, height=7, width=7))
