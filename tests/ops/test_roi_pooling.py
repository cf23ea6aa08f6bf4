"""Compares RoI pooling operators with torchvision, slow references and hand-worked examples."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_axis_weights import dense
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torchvision.ops import roi_align as torchvision_roi_align
from torchvision.ops import roi_pool as torchvision_roi_pool

from mask_head_plugin.ops import (
    bin_layout,
    bin_maxima,
    bin_sums,
    precise_roi_pool,
    roi_align,
    roi_pool,
    roi_warp,
)
from mask_head_plugin.ops.axis_weights import (
    MAX_MAP_SIZES,
    precise_roi_pool_weights,
    roi_align_weights,
)

OPERATORS = {
    "align": roi_align,
    "align, max": partial(roi_align, reduction="max"),
    "warp": roi_warp,
    "warp, max": partial(roi_warp, reduction="max"),
    "precise": precise_roi_pool,
    "pool": roi_pool,
}

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def bilinear(feature, y: float, x: float) -> torch.Tensor:
    """Samples a (C, H, W) map at one point, with torchvision's border rule."""
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


def slow_roi_align(features, rois, size, scale, ratio, aligned, reduction="mean", warp=False):
    """Pools sample by sample, with the operators' limit on the size of the adaptive grid."""
    shift = 0.5 if aligned else 0.0
    height, width = features.shape[2:]
    pooled = features.new_zeros(len(rois), features.shape[1], size, size)
    for r, (n, *box) in enumerate(rois.tolist()):
        x0, y0, x1, y1 = (v * scale for v in box)
        if warp:
            (x0, x1), (y0, y1) = slow_cells(x0, x1), slow_cells(y0, y1)
        x0, y0, x1, y1 = x0 - shift, y0 - shift, x1 - shift, y1 - shift
        sides = [y1 - y0, x1 - x0] if aligned else [max(y1 - y0, 1.0), max(x1 - x0, 1.0)]
        grids = []
        for side, cells in zip(sides, (height, width), strict=True):
            limit = math.ceil(MAX_MAP_SIZES * cells / size)
            grids.append(ratio if ratio > 0 else min(max(math.ceil(side / size), 0), limit))
        for i in range(size):
            for j in range(size):
                points = [
                    (
                        y0 + i * (sides[0] / size) + (a + 0.5) * (sides[0] / size) / grids[0],
                        x0 + j * (sides[1] / size) + (b + 0.5) * (sides[1] / size) / grids[1],
                    )
                    for a in range(grids[0])
                    for b in range(grids[1])
                ]
                if reduction == "max":
                    points = [p for p in points if -1 <= p[0] <= height and -1 <= p[1] <= width]
                values = [bilinear(features[int(n)], y, x) for y, x in points]
                if values:
                    values = torch.stack(values)
                    pooled[r, :, i, j] = values.amax(0) if reduction == "max" else values.mean(0)
    return pooled


def slow_cells(start, end):
    """Rounds edges to cells, with halves away from zero.

    Returns the first cell and the end of the range, which includes the cell of the upper edge and
    at least one cell.
    """
    start, end = (math.copysign(math.floor(abs(v) + 0.5), v) for v in (start, end))
    return start, max(end, start) + 1


def slow_roi_pool(features, rois, size, scale):
    height, width = features.shape[2:]
    pooled = features.new_zeros(len(rois), features.shape[1], size, size)
    for r, (n, *box) in enumerate(rois.tolist()):
        x0, y0, x1, y1 = (v * scale for v in box)
        (x0, x1), (y0, y1) = slow_cells(x0, x1), slow_cells(y0, y1)
        for i in range(size):
            for j in range(size):
                top, left = (
                    math.floor(k * ((b - a) / size)) + int(a)
                    for k, a, b in ((i, y0, y1), (j, x0, x1))
                )
                bottom, right = (
                    math.ceil((k + 1) * ((b - a) / size)) + int(a)
                    for k, a, b in ((i, y0, y1), (j, x0, x1))
                )
                top, bottom = max(top, 0), min(bottom, height)
                left, right = max(left, 0), min(right, width)
                if top < bottom and left < right:
                    cells = features[int(n), :, top:bottom, left:right]
                    pooled[r, :, i, j] = cells.flatten(1).amax(1)
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
        torch.autograd.grad(o, i, weights)[0]
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
    """Covers inverted, empty, distant and huge boxes, and maps with a single cell."""
    features = torch.randn(1, 2, *hw, dtype=torch.float64)
    rois = torch.tensor([[0, *box] for box in boxes], dtype=torch.float64)
    actual = roi_align(features, rois, size, 0.25, ratio, aligned)
    expected = slow_roi_align(features, rois, size, 0.25, ratio, aligned)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(features.abs().max()))


@settings(deadline=None, max_examples=80)
@given(
    boxes=st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=4),
    hw=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.integers(1, 4),
    ratio=st.integers(0, 3),
    reduction=st.sampled_from(["mean", "max"]),
    warp=st.booleans(),
)
def test_maxima_and_rounded_boxes_equal_the_slow_reference(boxes, hw, size, ratio, reduction, warp):
    features = torch.randn(1, 2, *hw, dtype=torch.float64)
    rois = torch.tensor([[0, *box] for box in boxes], dtype=torch.float64)
    operator = roi_warp if warp else roi_align
    actual = operator(features, rois, size, 0.25, ratio, reduction=reduction)
    expected = slow_roi_align(features, rois, size, 0.25, ratio, True, reduction, warp)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(features.abs().max()))


@settings(deadline=None, max_examples=80)
@given(
    boxes=st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=4),
    hw=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.integers(1, 4),
)
def test_roi_pool_of_any_finite_box_equals_the_slow_reference(boxes, hw, size):
    features = torch.randn(1, 2, *hw, dtype=torch.float64)
    rois = torch.tensor([[0, *box] for box in boxes], dtype=torch.float64)
    actual = roi_pool(features, rois, size, 0.25)
    assert torch.equal(actual, slow_roi_pool(features, rois, size, 0.25))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_roi_pool_equals_torchvision(spread, channels_last, dtype):
    generator = torch.Generator().manual_seed(3)
    # With few distinct values, maxima are tied. The gradient goes to the first of them.
    features = torch.randint(0, 4, (2, 5, 19, 23), generator=generator).to(dtype)
    features[:, 0, 3:9, 3:9] = float("nan")  # some bins are entirely NaN
    features[:, 1, 4, 3:5] = float("inf")
    features[:, 2, 8:14, 8:14] = float("nan")
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    rois = random_rois(60, (76, 92), generator, spread).to(dtype)
    inputs = [features.clone(memory_format=torch.preserve_format).requires_grad_() for _ in "ab"]
    actual = roi_pool(inputs[0], rois, (5, 7), 0.25)
    expected = torchvision_roi_pool(inputs[1], rois, (5, 7), 0.25)
    assert torch.equal(actual, expected)
    weights = torch.randn(expected.shape, generator=generator, dtype=dtype)
    gradients = [
        torch.autograd.grad(o, i, weights)[0]
        for o, i in ((actual, inputs[0]), (expected, inputs[1]))
    ]
    assert relative_error(*gradients) <= TOLERANCE[dtype]


def test_with_one_cell_per_bin_roi_warp_and_roi_pool_return_the_cells():
    features = torch.randn(1, 3, 9, 9)
    rois = torch.tensor([[0.0, 8.9, 17, 30, 36.2]])  # 4 pixels per cell; the end is changed below
    expected = features[:, :, 4:9, 2:7]
    rois[0, 3:] = torch.tensor([24.9, 32.2])  # cells 2 to 6 and 4 to 8
    assert torch.equal(roi_warp(features, rois, 5, 0.25, 1), expected)
    assert torch.equal(roi_pool(features, rois, 5, 0.25), expected)


@pytest.mark.parametrize("aligned", [True, False])
def test_precise_roi_pool_equals_the_product_of_its_weights(aligned):
    """test_axis_weights compares the weights with exact integrals."""
    features = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    rois = random_rois(40, (36, 48), torch.Generator().manual_seed(0), 2.0)
    wy, wx = (
        dense(
            precise_roi_pool_weights(rois[:, a] / 4, rois[:, a + 2] / 4, p, cells, aligned), cells
        )
        for a, p, cells in ((2, 3, 9), (1, 5, 12))
    )
    expected = torch.einsum("rpy,rcyx,rqx->rcpq", wy, features[rois[:, 0].long()], wx)
    actual = precise_roi_pool(features, rois, (3, 5), 0.25, aligned)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aligned", [True, False])
def test_precise_roi_pool_is_the_limit_of_roi_align(aligned):
    features = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    # The boxes are ordered, inverted, without area, and across the border.
    rois = torch.tensor(
        [[0, 3.0, 2, 25, 19], [1, 22, 20, 5, 1], [0, 9, 9, 9, 9], [1, -9, -30, 50, 13]],
        dtype=torch.float64,
    )
    expected = precise_roi_pool(features, rois, 3, 0.25, aligned)
    errors = [
        float((roi_align(features, rois, 3, 0.25, ratio, aligned) - expected).abs().max())
        for ratio in (16, 256)
    ]
    # Convergence is only first order, because the border rule is discontinuous.
    assert errors[1] <= errors[0] / 8 and errors[1] <= 0.02


def test_gradient_of_precise_roi_pool_with_respect_to_boxes():
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[1.3, 2.1, 17.7, 15.2], [-4.4, 3.3, 30.2, 9.7]], dtype=torch.float64)
    boxes.requires_grad_()

    def pool(x, b):
        rois = torch.cat([torch.tensor([[0.0], [1.0]], dtype=b.dtype), b], dim=1)
        return precise_roi_pool(x, rois, 3, 0.25)

    assert torch.autograd.gradcheck(pool, (features, boxes))


def test_samples_next_to_the_border_jump_are_treated_as_in_torchvision():
    """Rounding decides on which side of the jumps at -1 and at the map's size a sample lies."""
    generator = torch.Generator().manual_seed(1)
    features = torch.full((1, 1, 13, 13), 7.0)
    start = -1 - torch.rand(4000, generator=generator) * 3
    side = torch.rand(4000, generator=generator) * 30
    rois = torch.stack([torch.zeros(4000), start, start, start + side, start + side], dim=1)
    for ratio in (1, 2, 3):
        actual = roi_align(features, rois, 7, 1.0, ratio, True)
        expected = torchvision_roi_align(features, rois, 7, 1.0, ratio, True)
        assert (actual - expected).abs().max() <= 1e-5 * 7


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_correct(name):
    # Distinct, well separated values keep the maxima in place under gradcheck's steps.
    features = torch.randperm(120, dtype=torch.float64).view(2, 2, 5, 6) / 30
    rois = torch.tensor(
        [[0, 1.0, 2, 17, 15], [1, -4, 3, 30, 9], [1, 2, 2, 2, 2]], dtype=torch.float64
    )
    operator = OPERATORS[name]
    assert torch.autograd.gradcheck(lambda x: operator(x, rois, 3, 0.25), features.requires_grad_())


@pytest.mark.parametrize("name", OPERATORS)
def test_without_rois_the_result_is_empty_and_differentiable(name):
    maps = [
        torch.randn(2, 3, 5, 6, requires_grad=True),
        torch.randn(2, 3, 2, 3, requires_grad=True),
    ]
    levels = torch.zeros(0, dtype=torch.int64)
    pooled = OPERATORS[name](maps, torch.zeros(0, 5), 7, (1.0, 0.5), levels=levels)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(x.grad.abs().max() == 0 for x in maps)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_levels_choose_the_map(name, channels_last):
    generator = torch.Generator().manual_seed(5)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [
        torch.randn(2, 3, 16 >> k, 20 >> k, generator=generator).contiguous(memory_format=layout)
        for k in range(3)
    ]
    rois = random_rois(30, (64, 80), generator).float()
    levels = torch.randint(0, 3, (30,), generator=generator)
    levels[levels == 1] = 2  # a map without RoIs
    scales = [1 / 4, 1 / 8, 1 / 16]
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in maps]
    actual = OPERATORS[name](inputs, rois, 4, scales, levels=levels)
    for r, level in enumerate(levels):
        one = OPERATORS[name](maps[level], rois[r : r + 1], 4, scales[level])
        torch.testing.assert_close(actual[r : r + 1], one, rtol=0, atol=1e-6)
    actual.sum().backward()
    assert inputs[0].grad.abs().max() > 0 and inputs[1].grad.abs().max() == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_memory_limits_do_not_change_the_result(name, channels_last, monkeypatch):
    generator = torch.Generator().manual_seed(6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(2, 40, 19, 23, generator=generator).contiguous(memory_format=layout)
    rois = random_rois(50, (19, 23), generator, 1.5).float().requires_grad_(name == "precise")

    def run():
        x = features.clone(memory_format=torch.preserve_format).requires_grad_()
        pooled = OPERATORS[name](x, rois, 5)
        inputs = (x, rois) if name == "precise" else (x,)
        return [pooled.detach(), *torch.autograd.grad(pooled.square().sum(), inputs)]

    expected = run()
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True)), "not reproducible"
    monkeypatch.setattr(bin_sums, "LIST_ENTRIES", 2000)
    monkeypatch.setattr(bin_sums, "BATCH_ELEMENTS", 4000)
    monkeypatch.setattr(bin_maxima, "GROUP_ELEMENTS", 5000)
    monkeypatch.setattr(bin_layout, "MAX_COPY", 16 * 19 * 23)
    for actual, whole in zip(run(), expected, strict=True):
        assert relative_error(actual, whole) <= 1e-6


@pytest.mark.parametrize("name", OPERATORS)
def test_degenerate_boxes_give_finite_values(name):
    boxes = [
        [5.0, 5, 5, 5],
        [9, 7, 3, 2],
        [-80, -90, -70, -60],
        [500, 5, 600, 9],
        [-1e9, -1e9, 1e9, 1e9],
        [-3e38, -3e38, 3e38, 3e38],
        [3e38, 0, -3e38, 5],
    ]
    rois = torch.tensor([[0.0, *box] for box in boxes])
    for hw in ((10, 12), (1, 1)):
        features = torch.randn(1, 2, *hw, requires_grad=True)
        pooled = OPERATORS[name](features, rois, 3)
        pooled.sum().backward()
        assert torch.isfinite(pooled).all() and torch.isfinite(features.grad).all()
        assert pooled[2:4].abs().max() == 0, "boxes off the map must give 0"


def test_infinite_features_outside_the_box_have_no_effect():
    features = torch.zeros(1, 1, 20, 20)
    features[0, 0, 0, 0] = float("inf")
    features[0, 0, 15:] = float("nan")
    rois = torch.tensor([[0.0, 3, 3, 9, 9], [0, 50, 50, 60, 60]])
    for operator in OPERATORS.values():
        assert (operator(features, rois, 4) == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_error_counts_boxes_that_are_not_finite(value):
    rois = torch.zeros(5, 5)
    rois[1:3, 2] = value
    with pytest.raises(ValueError, match="2 of 5 RoIs have NaN or infinite"):
        roi_align(torch.zeros(1, 1, 4, 4), rois, 7)


def test_memory_does_not_grow_with_the_box():
    huge = torch.tensor([-1e9, 0.0]), torch.tensor([1e9, 8.0])
    for axis in (roi_align_weights(*huge, 7, 10), precise_roi_pool_weights(*huge, 7, 10)):
        assert axis.weight.numel() <= 2 * 7 * 10


def test_the_result_is_channels_last():
    pooled = roi_align(torch.randn(1, 4, 8, 8), torch.tensor([[0.0, 0, 0, 8, 8]] * 2), 3)
    assert pooled.is_contiguous(memory_format=torch.channels_last)


def test_a_slice_of_a_channels_last_batch_is_not_copied():
    features = torch.randn(3, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    table = bin_layout.as_table(features[1:])
    assert table.data_ptr() == features[1:].data_ptr() and table.shape == (128, 4)
    rois = torch.tensor([[0.0, 1, 1, 7, 6], [1.0, 0, 2, 5, 8]])
    actual = roi_align(features[1:], rois, 3)
    assert (
        relative_error(
            actual, torchvision_roi_align(features[1:].contiguous(), rois, 3, aligned=True)
        )
        <= 1e-6
    )


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_pooled_in_float32(dtype, name):
    features = torch.randn(2, 20, 100, 100).to(dtype)
    rois = random_rois(20, (100, 100), torch.Generator().manual_seed(0)).float()
    half, single = features.clone().requires_grad_(), features.float().requires_grad_()
    actual, expected = (OPERATORS[name](x, rois, 3) for x in (half, single))
    assert actual.dtype == dtype
    assert relative_error(actual.float(), expected) <= torch.finfo(dtype).eps
    actual.sum().backward()
    expected.sum().backward()
    assert half.grad.dtype == dtype
    assert relative_error(half.grad.float(), single.grad) <= torch.finfo(dtype).eps


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
def test_invalid_shapes_and_image_indices_are_refused(features, rois, message):
    with pytest.raises(ValueError, match=message):
        roi_align(features, rois, 2)


def test_invalid_levels_scales_and_reductions_are_refused():
    maps, rois = [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)], torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"2 feature maps need levels of shape \(3,\), not None"):
        roi_align(maps, rois, 2, (1.0, 0.5))
    with pytest.raises(ValueError, match=r"levels are not all in \[0, 2\)"):
        roi_align(maps, rois, 2, (1.0, 0.5), levels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="1 spatial scales for 2 feature maps"):
        roi_align(maps, rois, 2, levels=torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"levels must be integers, not torch.float32"):
        roi_align(maps, rois, 2, (1.0, 0.5), levels=torch.tensor([0.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match="differ in N, C or type"):
        roi_align([maps[0], maps[1].double()], rois, 2, (1, 0.5), levels=torch.zeros(3).long())
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'max', not 'sum'"):
        roi_align(maps[0], rois, 2, reduction="sum")


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_does_not_change_results_or_gradients(name):
    features = torch.randn(2, 4, 20, 20, requires_grad=True)
    rois = random_rois(9, (20, 20), torch.Generator().manual_seed(0)).float()
    inputs = (features, rois.requires_grad_()) if name == "precise" else (features,)

    def run():
        pooled = OPERATORS[name](features, rois, 3)
        return [pooled, *torch.autograd.grad(pooled.square().sum(), inputs)]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_bins_off_the_map_are_zero_next_to_infinite_features():
    features = torch.zeros(1, 1, 10, 10)
    features[..., -1] = float("inf")
    rois = torch.tensor([[0.0, 2, 2, 40, 8]])
    for operator in (roi_align, precise_roi_pool):
        pooled = operator(features, rois, 4)
        assert pooled[..., 0].min() > 1e38 and (pooled[..., 2:] == 0).all()


def test_precise_roi_pool_is_accurate_in_float32_with_and_without_gradients():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 2, 40, 1300, generator=generator)
    corner = torch.rand(200, 2, generator=generator) * torch.tensor([1290.0, 35])
    side = 10 ** (torch.rand(200, 2, generator=generator) * 5 - 4)
    rois = torch.cat([torch.zeros(200, 1), corner, corner + side], dim=1)
    exact = precise_roi_pool(features.double(), rois.double(), 7)
    for needed in (False, True):
        pooled = precise_roi_pool(features, rois.requires_grad_(needed), 7)
        assert (pooled - exact).abs().max() <= 1e-6 * features.abs().max()


def test_half_precision_gradients_are_summed_in_float32(monkeypatch):
    features = torch.randn(1, 20, 30, 30).bfloat16().requires_grad_()
    rois = random_rois(200, (30, 30), torch.Generator().manual_seed(0), num_images=1).float()
    whole = torch.autograd.grad(roi_align(features, rois, 3).sum(), features)[0]
    monkeypatch.setattr(bin_sums, "LIST_ENTRIES", 500)
    pieces = torch.autograd.grad(roi_align(features, rois, 3).sum(), features)[0]
    assert relative_error(pieces.float(), whole.float()) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", OPERATORS)
def test_one_huge_box_does_not_increase_the_memory_of_the_others(name):
    """The many samples of a box much larger than the map must not use memory for other boxes."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 2, 100, 120, generator=generator)
    rois = random_rois(300, (100, 120), generator, num_images=1).float()
    huge = torch.tensor([[0.0, -1e9, -1e9, 1e9, 1e9]])

    def peak(boxes):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            OPERATORS[name](features, boxes, 7)
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        return max(itertools.accumulate(e.nbytes() for e in events))

    assert peak(torch.cat([rois, huge])) <= peak(rois) + peak(huge) + 1e6


class LargeOperators(TorchDispatchMode):
    """Counts the operators that PyTorch splits among its threads."""

    GRAIN = 1 << 15
    """Smallest number of elements for which PyTorch uses threads. embedding_bag always does."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        values, _ = tree_flatten((args, kwargs, result))
        sizes = [x.numel() for x in values if isinstance(x, torch.Tensor)]
        if not func.is_view and not name.startswith(("empty", "new_empty")):
            # A concatenation copies its inputs one by one.
            sizes = sizes[:-1] if name == "cat" else sizes
            self.count += "embedding_bag" in name or max(sizes, default=0) >= self.GRAIN
        return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["align", "warp", "precise", "pool"])
def test_the_number_of_large_operators_does_not_grow_with_rois_or_channels(name, layout):
    """Each such operator waits for all threads, and a busy process delays one of them."""
    generator = torch.Generator().manual_seed(0)
    counts = []
    for num_rois, num_channels in ((200, 32), (800, 64)):
        maps = [
            torch.randn(2, num_channels, 160 >> k, 200 >> k).to(memory_format=layout)
            for k in range(2)
        ]
        rois = random_rois(num_rois, (320, 400), generator).float()
        levels = (torch.arange(num_rois) % 2).int()
        inputs = [x.requires_grad_() for x in maps]
        with LargeOperators() as operators:
            pooled = OPERATORS[name](inputs, rois, 7, (1 / 4, 1 / 8), levels=levels)
            pooled.backward(torch.ones_like(pooled))
        counts.append(operators.count)
    assert counts[1] <= 50, counts


@pytest.mark.parametrize("size", [0, -1, (7, 0), (2.0, 3.0)])
def test_impossible_output_sizes_are_refused(size):
    for operator in OPERATORS.values():
        with pytest.raises(ValueError, match="output_size must be one or two positive integers"):
            operator(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), size)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(scale):
    for operator in OPERATORS.values():
        with pytest.raises(ValueError, match="spatial scales must be finite and above 0"):
            operator(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2, scale)


def test_coordinates_that_overflow_when_scaled_are_reported():
    rois = torch.tensor([[0, 3e38, 0, 3e38, 5]])
    with pytest.raises(ValueError, match="1 of 1 RoIs have NaN or infinite"):
        roi_align(torch.zeros(1, 1, 4, 4), rois, 2, 2.0)
