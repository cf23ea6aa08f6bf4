"""Compares run lengths with masks that detectron2 pastes, and with hand-worked examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import CountOperators
from detectron2.layers.mask_ops import _do_paste_mask, paste_masks_in_image
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mask_head_plugin.ops import encode_masks, mask_rle


def paste_and_encode(mask_probs, boxes, image_hw, threshold=0.5):
    """Pastes masks with detectron2 onto the whole image, as on CUDA, and encodes the result."""
    pasted, _ = _do_paste_mask(mask_probs[:, None], boxes, *image_hw, skip_empty=False)
    return [encode_bits((mask >= threshold).numpy()) for mask in pasted]


def encode_bits(mask):
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def count_differing_pixels(actual, expected):
    """Returns the number of pixels that differ between two lists of encoded masks."""
    assert len(actual) == len(expected)
    return sum(
        int((coco_mask.decode(a) != coco_mask.decode(e)).sum())
        for a, e in zip(actual, expected, strict=True)
        if a != e
    )


def smooth_masks(num_masks, side, seed):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(num_masks, 1, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(low, (side, side), mode="bilinear")[:, 0].sigmoid()


def slow_pixel(mask, box, y, x):
    """Interpolates the value of a pixel in Python floats, with zeros around the mask."""
    side = len(mask)
    v = (y + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
    u = (x + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
    total = 0.0
    for i, j in itertools.product(range(side), range(side)):
        total += max(0.0, 1 - abs(v - i)) * max(0.0, 1 - abs(u - j)) * mask[i][j]
    return total


def test_hand_worked_column():
    # The example in the docstring of mask_rle: rows with the values 1 and 0.2 at y = 1 and 3.
    mask = torch.tensor([[[1.0, 1.0], [0.2, 0.2]]])
    (rle,) = encode_masks(mask, torch.tensor([[0.0, 0, 4, 4]]), (6, 4))
    assert coco_mask.decode(rle)[:, 1].tolist() == [1, 1, 0, 0, 0, 0]
    assert rle["size"] == [6, 4]


def test_runs_that_cross_columns_are_merged():
    (rle,) = encode_masks(torch.ones(1, 3, 3), torch.tensor([[0.0, 0, 2, 5]]), (5, 4))
    assert rle == coco_mask.frPyObjects({"counts": [0, 10, 10], "size": [5, 4]}, 5, 4)


def test_equals_detectron2_on_thousands_of_masks():
    num_pixels = num_different = num_masks = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        image_hw, side = tuple(rng.integers(1, 130, 2).tolist()), int(rng.integers(1, 30))
        corner = rng.uniform(-0.2, 1.0, (40, 2)) * image_hw[::-1]
        boxes = np.concatenate([corner, corner + rng.uniform(0.01, 1, (40, 2)) * image_hw[::-1]], 1)
        boxes = torch.from_numpy(boxes).float()
        masks = smooth_masks(40, side, seed)
        meet = (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < torch.tensor(image_hw[::-1])).all(1)
        masks, boxes = masks[meet], boxes[meet]
        expected = paste_masks_in_image(masks, boxes, image_hw)
        actual = encode_masks(masks, boxes, image_hw)
        num_different += count_differing_pixels(actual, [encode_bits(m.numpy()) for m in expected])
        num_pixels += expected.numel()
        num_masks += len(masks)
    assert num_masks > 1500
    assert num_different <= num_pixels / 1e6, f"{num_different} of {num_pixels}"


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_mask_equals_detectron2_except_at_the_threshold(data):
    side = data.draw(st.integers(1, 6), "M")
    image_hw = data.draw(st.tuples(st.integers(1, 25), st.integers(1, 25)), "image_hw")
    threshold = data.draw(st.sampled_from([0.5, 0.3, 0.7, 1.0]), "threshold")
    level = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 1.0]) | st.floats(0, 1, width=32)
    values = data.draw(st.lists(level, min_size=side**2, max_size=side**2), "mask")
    quarter = st.integers(-80, 160).map(lambda n: n / 4)
    x0, y0 = data.draw(quarter), data.draw(quarter)
    w, h = (data.draw(st.integers(1, 160).map(lambda n: n / 4)) for _ in range(2))
    masks, boxes = (
        torch.tensor(values).view(1, side, side),
        torch.tensor([[x0, y0, x0 + w, y0 + h]]),
    )
    (actual,) = encode_masks(masks, boxes, image_hw, threshold)
    assert actual["size"] == list(image_hw)
    actual = coco_mask.decode(actual)
    (expected,) = paste_and_encode(masks, boxes, image_hw, threshold)
    for y, x in np.argwhere(actual != coco_mask.decode(expected)):
        value = slow_pixel(masks[0].tolist(), boxes[0].tolist(), y, x)
        assert abs(value - threshold) < 1e-5, (y, x, value)


def test_masks_are_batched_in_chunks_of_columns(monkeypatch):
    masks, rng = smooth_masks(9, 14, 0), np.random.default_rng(0)
    corner = rng.uniform(0, 20, (9, 2))
    boxes = torch.from_numpy(
        np.concatenate([corner, corner + rng.uniform(3, 30, (9, 2))], 1)
    ).float()
    expected = encode_masks(masks, boxes, (50, 50))
    monkeypatch.setitem(mask_rle.MAX_COLUMNS, "cpu", 7)
    with CountOperators() as count:
        assert encode_masks(masks, boxes, (50, 50)) == expected
    chunks = count.calls["aten.nonzero.default"]
    assert chunks > 10
    # On a GPU, there would be only one other synchronisation, which reads the number of columns.
    assert count.calls["aten._local_scalar_dense.default"] == 1


def test_boxes_without_pixels_have_empty_masks():
    nan, inf = float("nan"), float("inf")
    boxes = [[30.0, 2, 40, 9], [-20, 2, -10, 9], [2, 30, 9, 40], [2, -20, 9, -10], [5, 5, 5, 9]]
    boxes += [[9, 5, 5, 9], [nan, 0, 5, 5], [0, 0, inf, 5], [3.1, 3.1, 3.3, 3.3]]
    rles = encode_masks(torch.ones(len(boxes), 7, 7), torch.tensor(boxes), (20, 25))
    assert [int(coco_mask.area(rle)) for rle in rles] == [0] * len(boxes)
    assert all(rle["size"] == [20, 25] for rle in rles)


def test_a_tiny_box_around_a_pixel_centre_gives_that_pixel():
    (rle,) = encode_masks(torch.ones(1, 7, 7), torch.tensor([[3.4, 5.4, 3.6, 5.6]]), (20, 25))
    assert np.argwhere(coco_mask.decode(rle)).tolist() == [[5, 3]]


def test_saturated_masks_include_pixels_on_the_edge_of_the_box():
    boxes, full = torch.tensor([[1.5, 2.5, 4.5, 6.5]]), torch.ones(1, 4, 4)
    (closed,) = encode_masks(full, boxes, (9, 9))
    (open_,) = encode_masks(full * 0.999, boxes, (9, 9))
    assert int(coco_mask.area(closed)) == 4 * 5 - 4, "corners have a quarter of the value"
    assert int(coco_mask.area(open_)) == 2 * 3


def test_a_low_threshold_extends_masks_beyond_the_box():
    boxes = torch.tensor([[10.0, 10, 20, 20]])
    narrow, wide = (encode_masks(torch.ones(1, 2, 2), boxes, (40, 40), t)[0] for t in (0.5, 0.1))
    assert int(coco_mask.area(narrow)) < 100 < int(coco_mask.area(wide))
    assert wide == paste_and_encode(torch.ones(1, 2, 2), boxes, (40, 40), 0.1)[0]


@pytest.mark.parametrize("fill", [0.0, 1.0, 0.6, float("nan")])
def test_uniform_masks_cover_all_or_none_of_the_image(fill):
    (rle,) = encode_masks(torch.full((1, 5, 5), fill), torch.tensor([[-9.0, -9, 99, 99]]), (30, 20))
    assert int(coco_mask.area(rle)) == (600 if fill >= 0.5 else 0)


def test_no_masks_and_half_precision_masks_are_encoded():
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 5)) == []
    masks, boxes = smooth_masks(3, 28, 1).half(), torch.tensor([[1.0, 2, 30, 40]] * 3)
    assert encode_masks(masks, boxes, (50, 50)) == encode_masks(masks.float(), boxes, (50, 50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 1, 5, 5), torch.zeros(2, 4), (9, 9)), r"\(R, M, M\), not \(2, 1, 5, 5\)"),
        ((torch.zeros(2, 5, 6), torch.zeros(2, 4), (9, 9)), r"\(R, M, M\), not \(2, 5, 6\)"),
        ((torch.zeros(2, 5, 5), torch.zeros(3, 4), (9, 9)), r"boxes must be \(2, 4\)"),
        ((torch.zeros(2, 5, 5), torch.zeros(2, 4), (0, 9)), r"image_hw is \(0, 9\)"),
        ((torch.zeros(2, 5, 5), torch.zeros(2, 4), (9, 9), 0.0), "threshold 0.0"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        encode_masks(*arguments)


@pytest.mark.cuda
def test_cuda_equals_the_cpu():
    masks, boxes = smooth_masks(50, 28, 2), torch.rand(50, 4) * 50
    boxes[:, 2:] += boxes[:, :2] + 1
    on_cuda = encode_masks(masks.cuda(), boxes.cuda(), (120, 110))
    assert count_differing_pixels(on_cuda, encode_masks(masks, boxes, (120, 110))) <= 1
