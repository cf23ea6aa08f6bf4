"""Images that are prepared without detectron2 equal those that detectron2 prepares."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from PIL import Image

from mask_head_plugin import model_input
from mask_head_plugin.model_input import IMAGE_FORMATS, is_scaled_down, model_hw, resized

rng = np.random.default_rng(0)


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_image_formats_equal_detectron2s(image_format):
    rgb = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    found = model_input.rgb_in_format(rgb, image_format)
    right = convert_PIL_to_numpy(Image.fromarray(rgb), image_format)
    assert np.array_equal(found, right.astype(found.dtype))
    assert found.dtype == (np.float32 if image_format == "YUV-BT.601" else np.uint8)


def test_the_error_names_an_unknown_format():
    with pytest.raises(ValueError, match="'HSV' is not one of"):
        model_input.rgb_in_format(np.zeros((1, 1, 3), np.uint8), "HSV")


def sizes(number):
    for _ in range(number):
        h, w, new_h, new_w = (int(x) for x in rng.integers(1, 120, 4))
        yield h, w, new_h, new_w
    yield 480, 640, 800, 1067


@pytest.mark.parametrize("channels", [1, 3])
def test_resized_8_bit_images_equal_detectron2s_bit_for_bit(channels):
    for h, w, *hw in sizes(40):
        image = rng.integers(0, 256, (h, w, channels)).astype(np.uint8)
        right = ResizeTransform(h, w, *hw).apply_image(image)
        assert np.array_equal(resized(image, tuple(hw)), right)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_pillow_pixels_differ_by_at_most_one_grey_level(channels, monkeypatch):
    monkeypatch.setattr(model_input, "Image", None)
    for h, w, *hw in sizes(40):
        image = rng.integers(0, 256, (h, w, channels)).astype(np.uint8)
        right = ResizeTransform(h, w, *hw).apply_image(image)
        found = resized(image, tuple(hw))
        assert found.dtype == np.uint8
        limit = 0 if hw[0] >= h or hw[1] == w else 1
        assert np.abs(found.astype(int) - right).max() <= limit, (h, w, hw)


def test_resized_floats_equal_detectron2s():
    for h, w, *hw in sizes(40):
        image = rng.standard_normal((h, w, 3)).astype(np.float32)
        right = ResizeTransform(h, w, *hw).apply_image(image)
        np.testing.assert_allclose(resized(image, tuple(hw)), right, atol=1e-4)


def test_the_size_follows_detectron2s_rule():
    for _ in range(2000):
        h, w = (int(x) for x in rng.integers(20, 2000, 2))
        shortest, longest = int(rng.choice([96, 800])), int(rng.choice([333, 1333]))
        right = ResizeShortestEdge.get_output_shape(h, w, shortest, longest)
        assert model_hw((h, w), shortest, longest) == right


def test_size_0_keeps_the_image_size_up_to_a_memory_limit():
    assert model_hw((300, 299), 0, 100) == (300, 299)
    assert not is_scaled_down((300, 300), 0, 100) and is_scaled_down((300, 301), 0, 100)
    assert model_hw((300, 301), 0, 100) == (100, 100)


def test_an_image_is_scaled_to_fit_a_model_of_fixed_size():
    assert model_hw((480, 640), 800, 1333, (800, 1088)) == (800, 1067)
    assert model_hw((480, 640), 800, 1333, (640, 640)) == (480, 640)
    assert model_hw((640, 480), 800, 1333, (800, 1333)) == (800, 600)
    assert model_hw((20, 10), 0, 1333, (64, 64)) == (20, 10)
    assert model_hw((10, 2000), 800, 1333, (64, 64)) == (1, 64)
