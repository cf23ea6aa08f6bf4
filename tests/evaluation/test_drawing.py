"""Drawn objects: holes and small objects stay visible, and neighbours have different colours."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mask_head_plugin.evaluation import drawing
from mask_head_plugin.evaluation.drawing import LabelStyle, draw_instances, instance_colour


def encode(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def draw(masks, labels=None, image=None):
    image = np.zeros((*masks[0].shape, 3), np.uint8) if image is None else image
    colours = [instance_colour(i) for i in range(len(masks))]
    labels = labels or [""] * len(masks)
    return draw_instances(
        image, labels, colours, np.zeros((len(masks), 4)), list(map(encode, masks))
    )


def block(y0, y1, x0, x1, image_hw=(200, 300)):
    mask = np.zeros(image_hw, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_only_the_pixels_of_a_mask_are_tinted_and_holes_keep_the_image():
    mask = block(50, 150, 60, 200)
    mask[80:120, 100:160] = False
    image = np.full((200, 300, 3), 100, np.uint8)
    before = image.copy()
    drawn = draw_instances(image, ["x"], [np.array([200, 0, 0])], np.zeros((1, 4)), [encode(mask)])
    assert np.array_equal(image, before)
    assert drawn[70, 70].tolist() == [145, 55, 55]  # 0.55 of the image, 0.45 of the colour
    assert drawn[100, 130].tolist() == drawn[190, 250].tolist() == [100, 100, 100]
    assert drawn[100, 60, 0] > 180 > 20 > drawn[100, 60, 1]  # the outline
    assert drawn[100, 99, 0] > 180  # the outline of the hole


def test_colours_of_overlapping_masks_do_not_mix():
    image = np.full((200, 300, 3), 100, np.uint8)
    rles = [encode(block(20, 180, 20, 280)), encode(block(80, 120, 100, 200))]
    colours = [np.array([200, 0, 0]), np.array([0, 0, 200])]
    drawn = draw_instances(image, ["", ""], colours, np.zeros((2, 4)), rles)
    assert drawn[40, 40].tolist() == [145, 55, 55] and drawn[100, 150].tolist() == [55, 55, 145]


def test_pictures_are_converted_to_grey():
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    grey = drawing.in_grey(image)
    assert (grey == grey[:, :, :1]).all() and grey.std() > 10


def test_the_outline_drawn_on_a_crop_equals_that_on_the_whole_picture():
    mask = block(40, 150, 20, 120) ^ block(60, 90, 30, 70)
    drawn, whole = draw([mask]), np.zeros((200, 300, 3), np.uint8)
    colour = instance_colour(0)
    below, outline = whole.copy(), [float(x) for x in colour]
    drawing.tint_mask(whole, below, mask.astype(np.uint8), colour, outline)
    assert np.array_equal(drawn[40:], whole[40:])  # the label is in the rows above


def test_a_small_object_stays_visible_on_a_large_one_and_neighbours_differ():
    drawn = draw([block(80, 100, 80, 100), block(60, 190, 40, 250), block(60, 190, 250, 290)])
    assert len({tuple(drawn[y, x]) for y, x in ((90, 90), (150, 150), (150, 270))}) == 3
    assert np.abs(drawn[90, 80] - instance_colour(0)).max() < 30  # its outline


def test_the_first_24_colours_differ():
    colours = [instance_colour(i) for i in range(24)]
    apart = [abs(a - b).sum() for i, a in enumerate(colours) for b in colours[:i]]
    assert min(apart) > 60


def test_boxes_are_drawn_only_without_masks():
    image, boxes = np.zeros((200, 300, 3), np.uint8), np.array([[50.0, 60, 200, 150]])
    without = draw_instances(image, [""], [instance_colour(0)], boxes, None)
    with_masks = draw([np.zeros((200, 300), bool)], ["not drawn"])
    assert without[150 - 1, 120].any() and not without[120, 120].any() and not with_masks.any()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), height=st.integers(1, 400), width=st.integers(1, 400))
def test_labels_stay_inside_any_picture(data, height, width):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    canvas, text = np.zeros((height, width, 3), np.uint8), "a class 0.93"
    style = drawing._fitting_style(text, LabelStyle(0.35), canvas)
    spots = list(drawing._label_spots(text, (x0, y0, x1, y1), style, canvas))
    assert len(spots) == 3 or (not spots and (width < 60 or height < 16))
    for left, top, right, bottom in spots:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    draw([block(y0, y1, x0, x1, (height, width))], [text])


def test_a_label_covers_exactly_the_pixels_of_its_spot():
    canvas = np.full((100, 200, 3), 7, np.uint8)
    style = LabelStyle(0.5, 2)
    spot = next(drawing._label_spots("x 0.93", (50, 60, 90, 90), style, canvas))
    drawing.write_label(canvas, "x 0.93", spot[0], spot[1] + style.extent("x 0.93")[1], style)
    rows, columns = np.nonzero((canvas != 7).any(axis=2))
    assert spot == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert spot[3] <= 60


def labels_drawn(monkeypatch, masks) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(drawing, "write_label", lambda *args: texts.append(args[1]))
    draw(masks, [f"label {i}" for i in range(len(masks))])
    return texts


def test_a_label_that_would_hide_small_objects_is_left_out(monkeypatch):
    crowd = [block(y, y + 6, x, x + 6) for y in range(0, 200, 12) for x in range(0, 300, 12)]
    assert labels_drawn(monkeypatch, crowd) == []
    assert labels_drawn(monkeypatch, [crowd[200]]) == ["label 0"]


def test_labels_do_not_overlap_and_the_first_ones_win(monkeypatch):
    same = [block(50, 150, 60, 200)] * 5
    assert labels_drawn(monkeypatch, same) == ["label 0", "label 1", "label 2"]


@pytest.mark.parametrize("image_hw", [(1, 1), (1, 500), (3000, 4000)])
def test_lines_get_thicker_on_large_images(image_hw):
    scale, thickness = drawing._line_size(*image_hw)
    assert thickness == (3 if image_hw == (3000, 4000) else 1) and scale >= 0.35


def test_contact_sheets_use_the_shared_drawing_functions():
    source = (ROOT / "mask_head_plugin" / "evaluation" / "contact_sheet.py").read_text()
    assert "findContours" not in source and "tint_mask(" in source
