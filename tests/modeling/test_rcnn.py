"""MaskRCNN: the run lengths that it returns equal the masks that detectron2 pastes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from conftest import build_twins, small_config
from detectron2.engine import DefaultPredictor
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.utils.analysis import flop_count_operators
from pycocotools import mask as coco_mask

from mask_head_plugin.modeling import MaskRCNN
from mask_head_plugin.structures import RLEMasks

DETECT_ALL = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "20")


@pytest.fixture(scope="module")
def twins():
    cfg = small_config("Base-MaskRCNN-FPN.yaml", *DETECT_ALL)
    return cfg, *(model.eval() for model in build_twins(cfg))


def make_inputs():
    image = torch.randint(0, 255, (3, 96, 128), generator=torch.Generator().manual_seed(0))
    return [{"image": image.float(), "height": 150, "width": 190}, {"image": image.float()}]


def test_masks_equal_those_of_detectron2(twins):
    _, plugin, stock = twins
    with torch.no_grad():
        ours, theirs = plugin(make_inputs()), stock(make_inputs())
    for actual, expected in zip(ours, theirs, strict=True):
        actual, expected = actual["instances"], expected["instances"]
        assert isinstance(actual.pred_masks, RLEMasks) and not actual.has("mask_probs")
        assert actual.image_size == expected.image_size and len(actual) == len(expected) >= 3
        assert torch.equal(actual.pred_classes, expected.pred_classes)
        different = actual.pred_masks.numpy() != expected.pred_masks.numpy()
        assert different.mean() < 1e-5
        assert expected.pred_masks.any() and not expected.pred_masks.all()


def test_bitmask_and_raw_outputs_have_detectron2s_format(twins):
    _, plugin, _ = twins
    with torch.no_grad():
        raw = plugin.inference(make_inputs(), do_postprocess=False)
        plugin.mask_output = "bitmask"
        dense = plugin(make_inputs())
        plugin.mask_output = "rle"
    assert raw[0].pred_masks.shape[1:] == (1, 28, 28)
    assert dense[0]["instances"].pred_masks.dtype == torch.bool
    assert build_model(small_config("Base-MaskRCNN-FPN.yaml", "MODEL.MASK_OUTPUT", "bitmask"))


def test_operations_are_counted_by_detectron2s_tools(twins):
    """The tools trace the model, and a traced model cannot return run lengths."""
    _, plugin, stock = twins
    for inputs in ([{**make_inputs()[0], "height": 70, "width": 90}], make_inputs()[1:]):
        ours, theirs = (flop_count_operators(model, inputs) for model in (plugin, stock))
        # For each RoI, the plugin predicts the mask of one class with a bmm. Stock predicts the
        # masks of all classes with a convolution.
        assert 0.9 * theirs["conv"] < ours["conv"] < theirs["conv"] and ours["bmm"] > 0
    assert plugin.mask_output == "rle"
    adapter = TracingAdapter(plugin, make_inputs()[1:], allow_non_tensor=True)
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    (found,) = adapter.outputs_schema(traced(*adapter.flattened_inputs))
    with torch.no_grad():
        (expected,) = plugin(make_inputs()[1:])
    assert torch.equal(found["instances"].pred_masks, expected["instances"].pred_masks.dense())


def test_given_boxes_get_masks(twins):
    _, plugin, _ = twins
    with torch.no_grad():
        (given,) = plugin.inference(make_inputs()[1:], do_postprocess=False)
        given.remove("pred_masks")
        (output,) = plugin.inference(make_inputs()[1:], [given])
    assert len(output["instances"].pred_masks) == len(output["instances"]) >= 3


def test_a_model_without_masks_detects():
    cfg = small_config("Base-MaskRCNN-FPN.yaml", *DETECT_ALL, "MODEL.MASK_ON", "False")
    with torch.no_grad():
        (output,) = build_model(cfg).eval()(make_inputs()[:1])
    assert len(output["instances"]) > 5 and not output["instances"].has("pred_masks")


def test_an_image_without_detections_has_no_masks():
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.1")
    with torch.no_grad():
        (output,) = build_model(cfg).eval()(make_inputs()[:1])
    assert output["instances"].pred_masks.shape == (0, 150, 190)


def test_test_time_augmentation_gives_dense_masks(twins):
    cfg, plugin, _ = twins
    cfg = cfg.clone()
    cfg.TEST.AUG.MIN_SIZES = (64,)
    image = make_inputs()[0]["image"].to(torch.uint8)
    with torch.no_grad():
        (output,) = GeneralizedRCNNWithTTA(cfg, plugin)(
            [{"image": image, "height": 96, "width": 128}]
        )
    assert output["instances"].pred_masks.shape[1:] == (96, 128)


def test_default_predictor_returns_run_lengths(twins):
    cfg, _, _ = twins
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    instances = DefaultPredictor(cfg)(cv2.GaussianBlur(image, (5, 5), 0))["instances"].to("cpu")
    masks = instances.pred_masks
    assert len(masks) == len(instances)
    assert all(coco_mask.decode(rle).shape == (60, 80) for rle in masks.rles)


def test_an_unknown_mask_output_is_refused():
    with pytest.raises(ValueError, match="mask_output 'polygon' is not one of"):
        build_model(small_config("Base-MaskRCNN-FPN.yaml", "MODEL.MASK_OUTPUT", "polygon"))
    assert issubclass(MaskRCNN, torch.nn.Module)
