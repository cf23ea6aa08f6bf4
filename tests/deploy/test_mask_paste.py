"""Masks pasted without PyTorch equal those of the eager model."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from mask_head_plugin.deploy.mask_paste import paste_masks
from mask_head_plugin.ops import encode_masks

ROUNDING = 1e-5


def surface(probs, box, image_hw):
    """Computes the (H, W) values of a pasted mask with grid_sample."""
    (height, width), (x0, y0, x1, y1) = image_hw, box
    x = (np.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (np.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1)[None]
    probs, grid = torch.from_numpy(probs)[None, None].double(), torch.from_numpy(grid).double()
    return torch.nn.functional.grid_sample(probs, grid, align_corners=False)[0, 0].numpy()


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_masks_equal_the_eager_models_except_at_the_threshold(threshold):
    rng = np.random.default_rng(0)
    image_hw = 83, 117
    for side in (7, 28):
        corner = rng.uniform(-30, 110, (60, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(0.2, 120, (60, 2))], 1)
        boxes = np.round(boxes.astype(np.float32) * 4) / 4
        probs = rng.uniform(size=(60, side, side)).astype(np.float32)
        probs[::3] = probs[::3].round()
        found = paste_masks(probs, boxes, image_hw, threshold)
        expected = encode_masks(
            torch.from_numpy(probs), torch.from_numpy(boxes), image_hw, threshold
        )
        for k, (own, eager) in enumerate(zip(found, expected, strict=True)):
            differs = coco_mask.decode(own) != coco_mask.decode(eager)
            if differs.any():
                values = surface(probs[k], boxes[k].astype(np.float64), image_hw)
                assert np.abs(values[differs] - threshold).max() < ROUNDING
        eager = [rle["counts"].decode() for rle in expected]
        same = [own["counts"] == other for own, other in zip(found, eager, strict=True)]
        assert np.mean(same) > 0.6


def test_a_hand_worked_mask_of_one_column():
    """The example of ops/mask_rle.py: in a box of 4 rows, rows 0 and 1 belong to the mask."""
    mask = np.array([[[1, 1], [0.2, 0.2]]], np.float32)
    (rle,) = paste_masks(mask, np.array([[-2, 0, 4, 4]], np.float32), (6, 1), 0.5)
    assert coco_mask.decode(rle)[:, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert rle["size"] == [6, 1] and isinstance(rle["counts"], str)


def test_a_pixel_on_the_threshold_belongs_to_the_mask():
    """The mask has the values 1 and 0 at pixels 0 and 2, so pixel 1 is exactly 0.5."""
    mask = np.array([[[1, 1], [0, 0]]], np.float32)
    (rle,) = paste_masks(mask, np.array([[-2, -0.5, 4, 3.5]], np.float32), (4, 1), 0.5)
    assert coco_mask.decode(rle)[:, 0].tolist() == [1, 1, 0, 0]


def test_boxes_without_area_or_outside_the_image_give_empty_masks():
    boxes = np.array(
        [[5, 5, 5, 9], [9, 5, 5, 9], [np.nan, 0, 5, 5], [0, 0, np.inf, 5], [90, 90, 99, 99]],
        np.float32,
    )
    probs = np.ones((5, 4, 4), np.float32)
    for rle in paste_masks(probs, boxes, (20, 30), 0.5):
        assert coco_mask.area(rle) == 0 and coco_mask.decode(rle).shape == (20, 30)
    nan = np.full((1, 4, 4), np.nan, np.float32)
    (rle,) = paste_masks(nan, np.array([[0, 0, 9, 9]], np.float32), (20, 30), 0.5)
    assert coco_mask.area(rle) == 0
    assert paste_masks(probs[:0], boxes[:0], (20, 30), 0.5) == []


def test_a_mask_covering_the_image_is_a_single_run():
    (rle,) = paste_masks(
        np.ones((1, 28, 28), np.float32), np.array([[-9, -9, 99, 99]], np.float32), (50, 40), 0.5
    )
    assert coco_mask.decode(rle).all()
    assert rle["counts"] == coco_mask.encode(np.ones((50, 40), np.uint8, "F"))["counts"].decode()


def test_pasting_never_allocates_a_full_image():
    """A mask of 8000 x 8000 pixels would take 64 MB as bytes."""
    rng = np.random.default_rng(0)
    boxes = np.tile(np.array([[100, 100, 7900, 7900]], np.float32), (5, 1))
    probs = rng.uniform(size=(5, 28, 28)).astype(np.float32)
    tracemalloc.start()
    paste_masks(probs, boxes, (8000, 8000), 0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
