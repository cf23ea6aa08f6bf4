"""Contact sheets show the holes of masks, do not hide small objects, and fit images of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_head_plugin.evaluation.contact_sheet import (
    NUM_COLUMNS,
    TILE_HW,
    LabelledMask,
    _arrange,
    _on_tile,
    _true_masks,
    draw_masks,
)


def test_the_image_shows_through_the_hole_of_a_mask():
    image = np.zeros((75, 100, 3), np.uint8)
    mask = np.zeros((75, 100), bool)
    mask[15:60, 20:80] = True
    mask[30:45, 40:60] = False
    drawn = draw_masks(image, [LabelledMask(mask, 0, "")])
    assert drawn.shape == (*TILE_HW, 3)
    assert drawn[22 * 4, 30 * 4].any() and not drawn[37 * 4, 50 * 4].any()
    assert not drawn[5 * 4, 50 * 4].any()


def test_classes_have_different_colours():
    image, mask = np.zeros((30, 40, 3), np.uint8), np.ones((30, 40), bool)
    colours = {
        tuple(draw_masks(image, [LabelledMask(mask, index, "")])[150, 200]) for index in range(5)
    }
    assert len(colours) == 5


def test_labels_cover_no_small_objects_and_appear_where_there_is_room():
    image = np.full((300, 400, 3), 90, np.uint8)

    def drawn(masks, label):
        return draw_masks(image, [LabelledMask(mask, 0, label) for mask in masks])

    crowd = np.zeros((150, 300, 400), bool)
    for k in range(150):
        y, x = 20 * (k // 15), 26 * (k % 15)
        crowd[k, y + 3 : y + 11, x + 3 : x + 13] = True
    changed = (drawn(crowd, "crescent 0.98") != drawn(crowd, "")).any(axis=2)
    assert changed[crowd.any(axis=0)].mean() < 0.01  # a few labels fit below the last row
    few = crowd[[16, 58, 140]]
    changed = (drawn(few, "crescent 0.98") != drawn(few, "")).any(axis=2)
    assert changed.any() and not changed[few.any(axis=0)].any()


def test_keypoints_and_other_fields_of_annotations_are_ignored():
    square = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
    plain = {"bbox": [10, 10, 20, 20], "bbox_mode": 1, "category_id": 0, "segmentation": [square]}
    record = {"height": 40, "width": 50}
    with_keypoints = [
        {**plain, "keypoints": [15, 15, 2, 20, 20, 2]},
        {**plain, "keypoints": []},
        {**plain, "keypoints": None, "attributes": {"occluded": True}},
        plain,
    ]
    expected = _true_masks({**record, "annotations": [plain] * 4}, ["cat"])
    found = _true_masks({**record, "annotations": with_keypoints}, ["cat"])
    assert len(found) == 4 and all(x.label == "cat" for x in found)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.mask, b.mask) and a.mask.sum() == 400


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 700), width=st.integers(1, 700), empty=st.booleans())
def test_any_image_fits_its_tile(height, width, empty):
    image = np.zeros((height, width, 3), np.uint8)
    mask = np.zeros((height, width), bool) if empty else np.ones((height, width), bool)
    tile = _on_tile(draw_masks(image, [LabelledMask(mask, 99, "a long label 0.99")]))
    assert tile.shape == (*TILE_HW, 3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
def test_any_number_of_pairs_is_arranged_in_rows(count):
    pair = np.zeros((TILE_HW[0], 2 * TILE_HW[1], 3), np.uint8)
    sheet = _arrange([pair] * count, ("left", "right"))
    assert sheet.shape[1] == min(count, NUM_COLUMNS) * (2 * TILE_HW[1] + 12)
