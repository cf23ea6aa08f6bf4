"""Compares targets from bit masks with those of detectron2 and with hand-worked examples."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import CountOperators, fake_gpu
from detectron2.structures import BitMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile
from torchvision.ops import roi_align

from mask_head_plugin.ops import crop_masks, mask_target


def exact_shares(bit_masks, boxes, size):
    """Returns the fraction of foreground in each pixel of the targets, computed in float64."""
    rois = torch.cat([torch.arange(len(boxes))[:, None], boxes], dim=1).double()
    return roi_align(bit_masks[:, None].double(), rois, size, 1.0, 0, True)[:, 0]


def random_masks(num_masks, hw, seed):
    rng = np.random.default_rng(seed)
    low = torch.from_numpy(rng.normal(size=(num_masks, 1, 5, 6))).float()
    return torch.nn.functional.interpolate(low, hw, mode="bilinear")[:, 0] > 0


def check_equals_detectron2(bit_masks, boxes, size):
    """Returns the number of pixels that differ. Each of them must be about half foreground."""
    actual = crop_masks(bit_masks, boxes, size)
    expected = BitMasks(bit_masks).crop_and_resize(boxes, size)
    assert actual.dtype == torch.bool and actual.shape == expected.shape
    different = actual != expected
    close = (exact_shares(bit_masks, boxes, size) - 0.5).abs() <= 1e-6
    assert not (different & ~close).any()
    return int(different.sum())


@pytest.mark.parametrize("size", [14, 28])
def test_equals_detectron2_except_for_ties(size):
    bit_masks = random_masks(70, (90, 130), size)
    rng = np.random.default_rng(0)
    corner = rng.uniform(-10, [120, 80], (70, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 100, (70, 2))], axis=1)
    different = check_equals_detectron2(bit_masks, torch.from_numpy(boxes).float(), size)
    assert different <= 5, "ties are rare unless boxes lie on whole pixels"


@settings(deadline=None, max_examples=60)
@given(
    boxes=st.lists(
        st.tuples(*[st.integers(-80, 80).map(lambda n: n / 4)] * 2, *[st.integers(1, 120)] * 2),
        min_size=1,
        max_size=4,
    ),
    hw=st.tuples(st.integers(4, 20), st.integers(4, 20)),  # MAX_MAP_SIZES must have no effect
    size=st.integers(1, 5),
)
def test_any_ordered_box_equals_detectron2_except_for_ties(boxes, hw, size):
    boxes = torch.tensor([[x, y, x + w / 4, y + h / 4] for x, y, w, h in boxes])
    check_equals_detectron2(random_masks(len(boxes), hw, 0), boxes, size)


@pytest.mark.parametrize(("shape", "size"), [((1, 4, 4), 0), ((1, 0, 4), 2), ((1, 4, 0), 2)])
def test_sizes_of_zero_are_refused(shape, size):
    with pytest.raises(ValueError, match="no side may be 0"):
        crop_masks(torch.zeros(shape, dtype=torch.bool), torch.zeros(1, 4), size)


def test_a_box_of_whole_pixels_gives_exactly_those_pixels():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()[None]
    target = crop_masks(mask, torch.tensor([[1.0, 0, 3, 2]]), 2)
    assert target.tolist() == [[[True, True], [False, True]]]


def test_inverted_and_outside_boxes_have_no_target():
    masks = torch.ones(3, 9, 9, dtype=torch.bool)
    boxes = torch.tensor([[5.0, 5, 2, 8], [20, 20, 30, 30], [-9, -9, -3, -3]])
    assert not crop_masks(masks, boxes, 4).any()


def test_no_masks_give_an_empty_target():
    assert crop_masks(torch.zeros(0, 9, 9, dtype=torch.bool), torch.zeros(0, 4), 4).shape == (
        0,
        4,
        4,
    )


def test_the_cuda_path_gives_the_same_targets(monkeypatch):
    monkeypatch.setattr(mask_target, "_crop_by_sums", mask_target._crop_with_operator)
    check_equals_detectron2(random_masks(5, (30, 40), 1), torch.tensor([[3.0, 4, 30, 25]] * 5), 7)


def test_deterministic_mode_on_cuda_also_uses_the_operator(monkeypatch):
    """torchvision's function would sample every pixel in this mode. Fake tensors need no GPU."""
    module = sys.modules["torchvision.ops.roi_align"]
    monkeypatch.setattr(module, "is_compile_supported", lambda device_type: device_type == "cuda")
    monkeypatch.setattr(module, "_roi_align", lambda *arguments: pytest.fail("samples every pixel"))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with fake_gpu():
            masks = torch.empty(3, 30, 40, dtype=torch.bool, device="cuda")
            boxes = torch.empty(3, 4, device="cuda")
            with CountOperators() as count:
                assert crop_masks(masks, boxes, 7).shape == (3, 7, 7)
    finally:
        torch.use_deterministic_algorithms(before)
    assert count.calls["torchvision.roi_align.default"] == 1


def test_invalid_input_is_refused():
    masks = torch.zeros(2, 9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"boxes \(R, 4\), not \(2, 9, 9\) and \(3, 4\)"):
        crop_masks(masks, torch.zeros(3, 4), 4)
    with pytest.raises(ValueError, match="1 of 2 boxes have NaN"):
        crop_masks(masks, torch.tensor([[0.0, 0, 1, 1], [0, float("nan"), 1, 1]]), 4)


def test_the_number_of_operators_does_not_grow_with_the_number_of_boxes():
    """Each operator waits for its slowest thread, which a busy process can delay."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(128, 2, generator=generator) * 150
    boxes = torch.cat([corner, corner + 3 + 140 * torch.rand(128, 2, generator=generator)], dim=1)
    bits = torch.rand(128, 290, 300, generator=generator) > 0.5
    with profile() as profiler:
        crop_masks(bits, boxes, 14)
    (count,) = [x.count for x in profiler.key_averages() if x.key == "aten::embedding_bag"]
    assert count < 16
