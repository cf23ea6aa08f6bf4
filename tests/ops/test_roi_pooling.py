"""roi_align against torchvision, a slow reference, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align as torchvision_roi_align

from mask_head_plugin.ops import roi_align
from mask_head_plugin.ops.axis_weights import MAX_IMAGE_SIZES, roi_align_weights

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def bilinear(feature, y: float, x: float) -> torch.Tensor:
    """One sample of a (C, H, W) map with the border rule of torchvision."""
    height, width = feature.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros_like(feature[:, 0, 0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = feature[:, top, left] * (1 - dx) + feature[:, top, right] * dx
    lower = feature[:, bottom, left] * (1 - dx) + feature[:, bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def slow_roi_align(features, rois, size, scale, ratio, aligned) -> torch.Tensor:
    """The definition, sample by sample; RoIs in any order, the adaptive grid capped."""
    shift = 0.5 if aligned else 0.0
    pooled = features.new_zeros(len(rois), features.shape[1], size, size)
    for r, (n, *box) in enumerate(rois.tolist()):
        x0, y0, x1, y1 = (v * scale - shift for v in box)
        sides = [y1 - y0, x1 - x0] if aligned else [max(y1 - y0, 1.0), max(x1 - x0, 1.0)]
        grids = []
        for side, cells in zip(sides, features.shape[2:], strict=True):
            limit = math.ceil(MAX_IMAGE_SIZES * cells / size)
            grids.append(ratio if ratio > 0 else min(max(math.ceil(side / size), 0), limit))
        if min(grids) == 0:
            continue
        for i in range(size):
            for j in range(size):
                for a in range(grids[0]):
                    for b in range(grids[1]):
                        y = y0 + i * (sides[0] / size) + (a + 0.5) * (sides[0] / size) / grids[0]
                        x = x0 + j * (sides[1] / size) + (b + 0.5) * (sides[1] / size) / grids[1]
                        pooled[r, :, i, j] += bilinear(features[int(n)], y, x)
        pooled[r] /= grids[0] * grids[1]
    return pooled


def random_rois(num_rois, image_hw, generator, spread=1.0, num_images=2):
    height, width = image_hw
    extent = torch.tensor([width, height]).double() * spread
    a, b = (
        torch.rand(num_rois, 2, generator=generator, dtype=torch.float64) * extent for _ in "ab"
    )
    offset = (spread - 1) / 2 * torch.tensor([width, height]).double()
    boxes = torch.cat([torch.minimum(a, b) - offset, torch.maximum(a, b) - offset], dim=1)
    images = torch.randint(0, num_images, (num_rois, 1), generator=generator).double()
    return torch.cat([images, boxes], dim=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3, 4])
def test_equals_torchvision(ratio, aligned, spread, channels_last, dtype):
    generator = torch.Generator().manual_seed(ratio)
    features = torch.randn(2, 5, 19, 23, generator=generator, dtype=dtype)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    rois = random_rois(60, (76, 92), generator, spread).to(dtype)
    arguments = (rois, (5, 7), 0.25, ratio, aligned)
    inputs = [features.clone(memory_format=torch.preserve_format).requires_grad_() for _ in "ab"]
    actual, expected = (
        roi_align(inputs[0], *arguments),
        torchvision_roi_align(inputs[1], *arguments),
    )
    scale = features.abs().max()
    assert (actual - expected).abs().max() <= TOLERANCE[dtype] * scale
    weights = torch.randn(expected.shape, generator=generator, dtype=dtype)
    gradients = [
        torch.autograd.grad((o * weights).sum(), i)[0]
        for o, i in ((actual, inputs[0]), (expected, inputs[1]))
    ]
    assert relative_error(*gradients) <= TOLERANCE[dtype]


coordinates = st.floats(-300, 300, width=32)


@settings(deadline=None, max_examples=80)
@given(
    boxes=st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=4),
    hw=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.integers(1, 4),
    ratio=st.integers(0, 3),
    aligned=st.booleans(),
)
def test_any_finite_box_equals_the_slow_reference(boxes, hw, size, ratio, aligned):
    """Inverted, zero-area, far outside and huge boxes, one-pixel maps."""
    features = torch.randn(1, 2, *hw, dtype=torch.float64)
    rois = torch.tensor([[0, *box] for box in boxes], dtype=torch.float64)
    actual = roi_align(features, rois, size, 0.25, ratio, aligned)
    expected = slow_roi_align(features, rois, size, 0.25, ratio, aligned)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(features.abs().max()))


def test_axis_weights_of_the_example_in_the_docstring():
    start, end = torch.tensor([1.5]), torch.tensor([3.5])  # 1.0 and 3.0 after the half-pixel shift
    result = roi_align_weights(start, end, 1, 10, 1.0, 2, True)
    assert result.weights.tolist() == [[[0.25, 0.5, 0.25]]]
    assert (result.first, result.count) == ([1], [3])


def test_samples_next_to_the_jump_fall_on_torchvisions_side():
    """At -1 and at the map's size the border rule jumps; rounding decides which side counts."""
    generator = torch.Generator().manual_seed(1)
    features = torch.full((1, 1, 13, 13), 7.0)
    start = -1 - torch.rand(4000, generator=generator) * 3
    side = torch.rand(4000, generator=generator) * 30
    rois = torch.stack([torch.zeros(4000), start, start, start + side, start + side], dim=1)
    for ratio in (1, 2, 3):
        actual = roi_align(features, rois, 7, 1.0, ratio, True)
        expected = torchvision_roi_align(features, rois, 7, 1.0, ratio, True)
        assert (actual - expected).abs().max() <= 1e-5 * 7


def test_gradient():
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(
        [[0, 1.0, 2, 17, 15], [1, -4, 3, 30, 9], [1, 2, 2, 2, 2]], dtype=torch.float64
    )
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, 3, 0.25), features)


def test_no_rois_give_an_empty_result_with_a_gradient():
    features = torch.randn(2, 3, 5, 6, requires_grad=True)
    pooled = roi_align(features, torch.zeros(0, 5), 7)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert features.grad.abs().max() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_boxes_that_are_not_finite_are_counted_in_the_error(value):
    rois = torch.zeros(5, 5)
    rois[1:3, 2] = value
    with pytest.raises(ValueError, match="2 of 5 RoIs have NaN or infinite"):
        roi_align(torch.zeros(1, 1, 4, 4), rois, 7)


def test_memory_does_not_grow_with_the_box():
    huge = torch.tensor([[0.0, -1e9, -1e9, 1e9, 1e9], [0, 0, 0, 8, 8]])
    weights = roi_align_weights(huge[:, 1], huge[:, 3], 7, 10, 1.0, 0, True).weights
    assert weights.numel() <= 2 * 7 * 10
    assert torch.isfinite(roi_align(torch.randn(1, 1, 10, 10), huge, 7)).all()


@pytest.mark.parametrize("ratio", [0, 2])
def test_coordinates_that_overflow_give_finite_values(ratio):
    rois = torch.tensor([[0, -3e38, -3e38, 3e38, 3e38], [0, 3e38, 0, -3e38, 5]])
    assert torch.isfinite(roi_align(torch.randn(1, 1, 10, 10), rois, 7, 1.0, ratio)).all()


def test_result_is_channels_last():
    pooled = roi_align(torch.randn(1, 4, 8, 8), torch.tensor([[0.0, 0, 0, 8, 8]] * 2), 3)
    assert pooled.is_contiguous(memory_format=torch.channels_last)


def test_a_slice_of_a_channels_last_batch_is_read_where_it_is():
    features = torch.randn(3, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    rois = torch.tensor([[0.0, 1, 1, 7, 6], [1.0, 0, 2, 5, 8]])
    actual = roi_align(features[1:], rois, 3)
    assert (
        relative_error(
            actual, torchvision_roi_align(features[1:].contiguous(), rois, 3, aligned=True)
        )
        <= 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_pooled_in_float32(dtype):
    features = torch.randn(2, 4, 200, 200).to(dtype)
    rois = random_rois(20, (200, 200), torch.Generator().manual_seed(0)).float()
    actual = roi_align(features, rois, 3)
    assert actual.dtype == dtype
    expected = torchvision_roi_align(features.float(), rois, 3, aligned=True)
    assert relative_error(actual.float(), expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("features", "rois", "message"),
    [
        (torch.zeros(1, 4, 4), torch.zeros(1, 5), "features must be"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), torch.zeros(1, 5), "features must be"),
        (torch.zeros(1, 1, 0, 4), torch.zeros(1, 5), "features must be"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 4), "rois must be"),
        (torch.zeros(1, 1, 4, 4), torch.tensor([[1.0, 0, 0, 1, 1]]), r"not all in \[0, 1\)"),
        (torch.zeros(1, 1, 4, 4), torch.tensor([[-1.0, 0, 0, 1, 1]]), r"not all in \[0, 1\)"),
    ],
)
def test_wrong_shapes_and_image_indices_are_refused(features, rois, message):
    with pytest.raises(ValueError, match=message):
        roi_align(features, rois, 2)


def test_forward_and_backward_under_autocast_stay_in_float32():
    features = torch.randn(2, 4, 20, 20, requires_grad=True)
    rois = random_rois(9, (20, 20), torch.Generator().manual_seed(0)).float()
    expected = roi_align(features, rois, 3)
    (gradient,) = torch.autograd.grad(expected.sum(), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = roi_align(features, rois, 3)
        (autocast_gradient,) = torch.autograd.grad(actual.sum(), features)
    assert torch.equal(actual, expected) and torch.equal(autocast_gradient, gradient)
