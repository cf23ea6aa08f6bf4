"""Compares the plugin's ROI heads with detectron2's for equal features, proposals and weights."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    build_twins,
    copy_instances,
    random_instances,
    random_proposals,
    relative_error,
    small_config,
)
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import mask_head as stock_mask_head
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

IMAGE_HW = (96, 128)
CASES = {
    "FPN": ("Base-MaskRCNN-FPN.yaml", {"p2": 4, "p3": 8, "p4": 16, "p5": 32}, 16),
    "C4": ("Base-MaskRCNN-C4.yaml", {"res4": 16}, 64),
    "DC5": ("Base-MaskRCNN-DC5.yaml", {"res5": 16}, 128),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make_features(case: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    _, strides, channels = CASES[case]
    return {
        name: torch.randn(2, channels, IMAGE_HW[0] // s, IMAGE_HW[1] // s, dtype=dtype)
        for name, s in strides.items()
    }


def train_once(heads: nn.Module, features, proposals, targets):
    """Returns losses and the gradient of each parameter and map."""
    heads.train()
    heads.zero_grad()
    features = {name: x.clone().requires_grad_() for name, x in features.items()}
    images = ImageList(torch.zeros(2, 3, *IMAGE_HW), [IMAGE_HW] * 2)
    torch.manual_seed(5)  # sampling of proposals
    with EventStorage(0):
        _, losses = heads(images, features, copy_instances(proposals), copy_instances(targets))
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in heads.named_parameters()}
    gradients.update({name: x.grad for name, x in features.items()})
    return losses, gradients


@pytest.fixture
def _stock_loss_in_the_type_of_its_logits(monkeypatch):
    """Makes detectron2's mask loss comparable in float64.

    detectron2 casts the targets to float32, and PyTorch returns the loss in the targets' type.
    """

    def loss_function(logits, targets, **kwargs):
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), **kwargs)

    functional = SimpleNamespace(binary_cross_entropy_with_logits=loss_function)
    monkeypatch.setattr(stock_mask_head, "F", functional)


@pytest.mark.usefixtures("_stock_loss_in_the_type_of_its_logits")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_stock(case, mask_format, dtype):
    rng = np.random.default_rng(3)
    # FrozenBN, as in the zoo: batch statistics in res5 would amplify rounding errors.
    cfg = small_config(CASES[case][0], "MODEL.RESNETS.NORM", "FrozenBN")
    plugin, stock = build_twins(cfg)
    targets = [random_instances(n, IMAGE_HW, 5, rng, mask_format, dtype) for n in (5, 3)]
    proposals = random_proposals(targets, 60, rng)
    features = make_features(case, dtype)
    plugin_heads, stock_heads = plugin.roi_heads.to(dtype), stock.roi_heads.to(dtype)
    losses, gradients = train_once(plugin_heads, features, proposals, targets)
    stock_losses, stock_gradients = train_once(stock_heads, features, proposals, targets)
    assert losses.keys() == stock_losses.keys()
    for name, expected in stock_losses.items():
        assert expected > 0.01, f"{name} is too small to compare: {expected}"
        assert relative_error(losses[name], expected) <= TOLERANCE[dtype], name
    assert gradients.keys() == stock_gradients.keys()
    for name, expected in stock_gradients.items():
        assert (gradients[name] is None) == (expected is None), name
        if expected is not None:
            assert relative_error(gradients[name], expected) <= TOLERANCE[dtype], name
    assert stock_gradients["mask_head.predictor.weight"].abs().max() > 0


@pytest.mark.parametrize("case", CASES)
def test_detections_equal_stock(case):
    rng = np.random.default_rng(4)
    plugin, stock = build_twins(
        small_config(CASES[case][0], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.1")
    )
    targets = [random_instances(n, IMAGE_HW, 5, rng, "polygon") for n in (5, 3)]
    proposals = random_proposals(targets, 60, rng)
    features = make_features(case, torch.float32)
    images = ImageList(torch.zeros(2, 3, *IMAGE_HW), [IMAGE_HW] * 2)
    with torch.no_grad():
        outputs = [
            m.roi_heads.eval()(images, features, copy_instances(proposals))[0]
            for m in (plugin, stock)
        ]
    for actual, expected in zip(*outputs, strict=True):
        assert len(expected) > 10
        assert torch.equal(actual.pred_classes, expected.pred_classes)
        assert relative_error(actual.scores, expected.scores) <= 1e-5
        assert relative_error(actual.pred_boxes.tensor, expected.pred_boxes.tensor) <= 1e-5
        assert actual.pred_masks.shape == expected.pred_masks.shape
        assert relative_error(actual.pred_masks, expected.pred_masks) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_training_without_any_object_gives_finite_losses_and_gradients(case):
    rng = np.random.default_rng(6)
    plugin, _ = build_twins(small_config(CASES[case][0]))
    targets = [random_instances(0, IMAGE_HW, 5, rng, "bitmask") for _ in range(2)]
    proposals = random_proposals(targets, 20, rng)
    features = make_features(case, torch.float32)
    losses, gradients = train_once(plugin.roi_heads, features, proposals, targets)
    assert losses["loss_mask"] == 0
    assert all(torch.isfinite(loss) for loss in losses.values())
    # DistributedDataParallel needs a gradient, even if zero, for each parameter of the mask head.
    for name, gradient in gradients.items():
        if name.startswith("mask_head"):
            assert gradient is not None and gradient.abs().max() == 0, name


@pytest.mark.parametrize("case", CASES)
def test_inference_without_detections_returns_empty_masks(case):
    rng = np.random.default_rng(7)
    plugin, _ = build_twins(
        small_config(CASES[case][0], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.1")
    )
    targets = [random_instances(2, IMAGE_HW, 5, rng, "bitmask") for _ in range(2)]
    features = make_features(case, torch.float32)
    images = ImageList(torch.zeros(2, 3, *IMAGE_HW), [IMAGE_HW] * 2)
    with torch.no_grad():
        outputs, _ = plugin.roi_heads.eval()(images, features, random_proposals(targets, 9, rng))
    side = 14 if case == "C4" else 28
    assert [x.pred_masks.shape for x in outputs] == [(0, 1, side, side)] * 2


def test_detectron2s_rotated_pooler_is_still_available():
    cfg = small_config(
        "Base-MaskRCNN-FPN.yaml", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"
    )
    plugin, _ = build_twins(cfg)
    assert type(plugin.roi_heads.box_pooler).__name__ == "ROIPooler"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pooler_type", ["ROIWarp", "PrROIPool"])
def test_both_poolers_come_from_the_config(pooler_type, case):
    heads = ["ROI_BOX_HEAD", "ROI_MASK_HEAD"] if case != "C4" else ["ROI_BOX_HEAD"]
    opts = [o for head in heads for o in (f"MODEL.{head}.POOLER_TYPE", pooler_type)]
    if pooler_type == "ROIWarp":
        opts += [o for head in heads for o in (f"MODEL.{head}.POOLER_REDUCTION", "max")]
    plugin = build_model(small_config(CASES[case][0], *opts)).roi_heads
    names = ["box_pooler", "mask_pooler"] if case != "C4" else ["pooler"]
    for name in names:
        pooler = getattr(plugin, name)
        assert pooler.pooler_type == pooler_type
        assert pooler.reduction == ("max" if pooler_type == "ROIWarp" else "mean")
