"""Contact sheets: masks are drawn with their holes, whatever the image's shape."""

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
    draw_masks,
)


def test_the_hole_of_a_mask_keeps_the_image():
    image = np.zeros((75, 100, 3), np.uint8)
    mask = np.zeros((75, 100), bool)
    mask[15:60, 20:80] = True
    mask[30:45, 40:60] = False
    drawn = draw_masks(image, [LabelledMask(mask, 0, "")])
    assert drawn.shape == (*TILE_HW, 3)
    assert drawn[22 * 4, 30 * 4].any() and not drawn[37 * 4, 50 * 4].any()
    assert not drawn[5 * 4, 50 * 4].any()


def test_classes_have_their_own_colours():
    image, mask = np.zeros((30, 40, 3), np.uint8), np.ones((30, 40), bool)
    colours = {
        tuple(draw_masks(image, [LabelledMask(mask, index, "")])[150, 200]) for index in range(5)
    }
    assert len(colours) == 5


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 700), width=st.integers(1, 700), empty=st.booleans())
def test_any_image_fits_its_tile(height, width, empty):
    image = np.zeros((height, width, 3), np.uint8)
    mask = np.zeros((height, width), bool) if empty else np.ones((height, width), bool)
    tile = _on_tile(draw_masks(image, [LabelledMask(mask, 99, "a long label 0.99")]))
    assert tile.shape == (*TILE_HW, 3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
def test_any_number_of_pairs_fills_rows(count):
    pair = np.zeros((TILE_HW[0], 2 * TILE_HW[1], 3), np.uint8)
    sheet = _arrange([pair] * count)
    assert sheet.shape[1] == min(count, NUM_COLUMNS) * (2 * TILE_HW[1] + 12)
