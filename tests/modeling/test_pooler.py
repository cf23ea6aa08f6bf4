"""MultiLevelRoIPooler against detectron2's ROIPooler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_instances, relative_error
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from mask_head_plugin.modeling import MultiLevelRoIPooler
from mask_head_plugin.modeling.pooler import POOLER_TYPES

IMAGE_HW = (128, 192)
SCALES = (1 / 4, 1 / 8, 1 / 16)


def make_input(scales, num_images=2, dtype=torch.float32):
    features = [
        torch.randn(num_images, 3, int(IMAGE_HW[0] * s), int(IMAGE_HW[1] * s), dtype=dtype)
        for s in scales
    ]
    rng = np.random.default_rng(0)
    boxes = [
        random_instances(9, IMAGE_HW, 2, rng, "polygon", dtype).gt_boxes for _ in range(num_images)
    ]
    return features, boxes


@pytest.mark.parametrize("scales", [SCALES, SCALES[-1:]], ids=["FPN", "single level"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_equals_detectron2s_pooler(pooler_type, sampling_ratio, scales):
    # Boxes of 8 to 90 pixels; the canonical size spreads them over all levels.
    arguments = (7, scales, sampling_ratio, pooler_type, 32, 3)
    features, boxes = make_input(scales)
    plugin_features = [x.clone().requires_grad_() for x in features]
    stock_features = [x.clone().requires_grad_() for x in features]
    actual = MultiLevelRoIPooler(*arguments)(plugin_features, boxes)
    expected = ROIPooler(*arguments)(stock_features, boxes)
    assert actual.shape == (18, 3, 7, 7)
    assert relative_error(actual, expected) <= 1e-6
    weights = torch.randn_like(expected)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(plugin_features, stock_features, strict=True):
        assert y.grad.abs().max() > 0, "a level without boxes proves nothing"
        assert relative_error(x.grad, y.grad) <= 1e-6


def test_no_boxes_give_an_empty_result_with_a_gradient():
    features, _ = make_input(SCALES)
    features = [x.requires_grad_() for x in features]
    pooled = MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2")(
        features, [Boxes(torch.zeros(0, 4))] * 2
    )
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()


def test_unknown_type_and_broken_pyramid_are_refused_by_name():
    with pytest.raises(ValueError, match=r"POOLER_TYPE 'RoiAlign'.*ROIAlignV2"):
        MultiLevelRoIPooler(7, SCALES, 0, "RoiAlign")
    with pytest.raises(ValueError, match="do not halve"):
        MultiLevelRoIPooler(7, (1 / 4, 1 / 16), 0, "ROIAlign")


def test_boxes_that_are_not_finite_are_refused_and_not_dropped():
    features, boxes = make_input(SCALES)
    boxes[1].tensor[2, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 18 boxes have NaN"):
        MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2")(features, boxes)


def test_no_images_give_an_empty_result():
    features = [torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 4, 4)]
    assert MultiLevelRoIPooler(7, SCALES[:2], 0, "ROIAlignV2")(features, []).shape == (0, 3, 7, 7)


@pytest.mark.parametrize("scales", [[], [0.0], [-0.5]])
def test_impossible_scales_are_refused(scales):
    with pytest.raises(ValueError, match="scales"):
        MultiLevelRoIPooler(7, scales, 0, "ROIAlignV2")


def test_wrong_number_of_maps_or_images_is_refused():
    features, boxes = make_input(SCALES)
    pooler = MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2")
    with pytest.raises(ValueError, match="2 feature maps for 3"):
        pooler(features[:2], boxes)
    with pytest.raises(ValueError, match="1 images, maps of 2"):
        pooler(features, boxes[:1])


def test_a_trace_pools_other_boxes_than_its_example():
    features, boxes = make_input(SCALES)
    pooler = MultiLevelRoIPooler(7, SCALES, 0, "ROIAlignV2", 32, 3)

    def pool(x0, x1, x2, first, second):
        return pooler([x0, x1, x2], [Boxes(first), Boxes(second)])

    example = (*features, *(b.tensor for b in boxes))
    traced = torch.jit.trace(pool, example, check_trace=False)
    _, others = make_input(SCALES)
    others = [b.tensor[:4] * 0.9 for b in others]
    expected = pooler(features, [Boxes(b) for b in others])
    assert relative_error(traced(*features, *others), expected) <= 1e-5
