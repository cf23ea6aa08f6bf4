"""Operators on a device other than the CPU do not mix tensors of two devices."""

from __future__ import annotations

import functools

import pytest
import torch
from other_device import DEVICE, OnOtherDevice, OtherDevice

from mask_head_plugin import ops
from mask_head_plugin.modeling import MASK_LOSS_REGISTRY
from mask_head_plugin.ops import mask_target

OPERATORS = {
    "ROIAlign": ops.roi_align,
    "ROIAlign, 2": functools.partial(ops.roi_align, sampling_ratio=2, aligned=False),
    "ROIAlign, max": functools.partial(ops.roi_align, reduction="max"),
    "ROIWarp": ops.roi_warp,
    "ROIPool": ops.roi_pool,
    "PrROIPool": ops.precise_roi_pool,
}


def on_both(function, *tensors):
    """Returns the results of a function on the CPU and on the other device."""
    expected = function(*tensors)
    with OtherDevice():
        actual = function(
            *(OnOtherDevice(x.detach()).requires_grad_(x.requires_grad) for x in tensors)
        )
    return expected, actual


def rois_and_levels():
    rois = torch.tensor(
        [[0.0, 1, 2, 30, 25], [1, 5, 5, 9, 7], [0, -50, -50, -20, -9], [1, 8, 3, 60, 50]]
    )
    return rois, torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", OPERATORS)
def test_roi_pooling_runs_on_any_device(name, dtype):
    operator = OPERATORS[name]

    def pool(first, second, rois, levels):
        pooled = operator([first, second], rois, 2, [0.5, 0.25], levels=levels)
        inputs = [x for x in (first, second, rois) if x.requires_grad]
        return pooled, *torch.autograd.grad(pooled.float().square().sum(), inputs)

    maps = [torch.randn(2, 3, *hw, dtype=dtype, requires_grad=True) for hw in ((16, 20), (8, 10))]
    rois, levels = rois_and_levels()
    rois.requires_grad_(name == "PrROIPool")
    expected, actual = on_both(pool, *maps, rois, levels)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.device == DEVICE and torch.equal(mine.values, theirs)


@pytest.mark.parametrize("name", [name for name, _ in MASK_LOSS_REGISTRY])
def test_mask_losses_run_on_any_device(name):
    loss, classes = MASK_LOSS_REGISTRY.get(name), torch.tensor([1, 0, 3])
    couples = hasattr(loss, "activation")

    def with_gradient(mask_logits, gt_masks, classes):
        value = loss(mask_logits, *([classes] if couples else []), gt_masks)
        return value, *torch.autograd.grad(value, mask_logits)

    mask_logits = torch.randn(3, 4, 7, 7) if couples else torch.randn(3, 7, 7)
    gt_masks = (torch.rand(3, 7, 7) > 0.5).float()
    expected, actual = on_both(with_gradient, mask_logits.requires_grad_(), gt_masks, classes)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.device == DEVICE and torch.equal(mine.values, theirs)


def test_mask_targets_run_on_any_device():
    masks, boxes = torch.rand(3, 30, 40) > 0.5, torch.tensor([[3.0, 4, 30, 25]] * 3)
    expected, actual = on_both(lambda *x: mask_target._crop_with_operator(*x, 7), masks, boxes)
    assert torch.equal(actual.values, expected)


def test_run_lengths_are_encoded_from_any_device():
    masks, boxes = torch.rand(5, 28, 28), torch.tensor([[3.0, 4, 30, 25]] * 5)
    expected, actual = on_both(lambda *x: ops.encode_masks(*x, (50, 60)), masks, boxes)
    assert actual == expected


def test_the_simulated_device_refuses_to_mix_devices():
    """The tests above rely on these errors."""
    values, index = torch.rand(3), torch.tensor([2, 0])
    with OtherDevice():
        there, there_index = torch.arange(3, device=DEVICE), OnOtherDevice(index)
        assert torch.equal((there + 1)[index].values, torch.tensor([3, 1]))
        assert there.tolist() == [0, 1, 2] and int(there.max()) == 2
        assert torch.tensor([7, 8], device=DEVICE).values.tolist() == [7, 8]
        assert (there * torch.tensor(2)).device == DEVICE  # a scalar on the CPU is allowed
        for mixed in (lambda: there + values, lambda: values[there_index]):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
