"""The repository's trained checkpoint: detections equal stock's, and stock tools accept them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, stock_config
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.layers.mask_ops import _do_paste_mask
from detectron2.utils.visualizer import Visualizer

from mask_head_plugin import load_config
from mask_head_plugin.checkpoint import MaskHeadCheckpointer

NUM_IMAGES = 60


@pytest.fixture(scope="module")
def cfg():
    return load_config(str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml"), ["MODEL.DEVICE", "cpu"])


def load(cfg):
    predictor = DefaultPredictor(cfg)
    MaskHeadCheckpointer(predictor.model).load(str(CHECKPOINT))
    return predictor


@pytest.fixture(scope="module")
def predictors(cfg):
    return load(cfg), load(stock_config(cfg))


def raw_detections(predictor, image):
    """Returns detections at the network's resolution, with masks as probabilities."""
    with torch.no_grad():
        inputs = [{"image": torch.as_tensor(image[:, :, ::-1].transpose(2, 0, 1).copy())}]
        return predictor.model.inference(inputs, do_postprocess=False)[0]


def test_every_weight_of_the_checkpoint_is_used(cfg, predictors, caplog):
    with caplog.at_level("WARNING"):
        load(cfg)
        load(stock_config(cfg))
    assert "not found" not in caplog.text and "not used" not in caplog.text


def test_detections_equal_stock(predictors):
    """Detections must agree, also in order; mask pixels may differ only near the threshold."""
    total = 0
    for record in DatasetCatalog.get("shapes_val")[:NUM_IMAGES]:
        image = cv2.imread(record["file_name"])
        actual, expected = (raw_detections(p, image) for p in predictors)
        assert torch.equal(actual.pred_classes, expected.pred_classes)
        boxes, expected_boxes = actual.pred_boxes.tensor, expected.pred_boxes.tensor
        if len(expected) == 0:
            continue
        assert (actual.scores - expected.scores).abs().max() <= 1e-4
        assert (boxes - expected_boxes).abs().max() <= 1e-3
        # Paste the probabilities, because the masks are compared before detectron2's threshold. The
        # model does not resize the image.
        pasted, stock_pasted = (
            _do_paste_mask(x.pred_masks, x.pred_boxes.tensor, *image.shape[:2], skip_empty=False)[0]
            for x in (actual, expected)
        )
        differing = (pasted >= 0.5) != (stock_pasted >= 0.5)
        assert (stock_pasted[differing] - 0.5).abs().le(1e-4).all()
        final, stock_final = (p(image)["instances"] for p in predictors)
        assert len(final) == len(stock_final)
        pixels = final.pred_masks.numpy() != stock_final.pred_masks.numpy()
        assert pixels.sum() <= differing.sum()
        total += int((expected.scores > 0.5).sum())
    assert total >= 100


def test_the_model_has_a_high_ap(cfg, predictors, tmp_path):
    """Runs the stock COCOEvaluator on the plugin's outputs."""
    loader = build_detection_test_loader(cfg, "shapes_val")
    evaluator = COCOEvaluator("shapes_val", output_dir=str(tmp_path))
    results = inference_on_dataset(predictors[0].model, loader, evaluator)
    assert results["segm"]["AP"] > 50


def test_stock_visualizer_draws_the_plugins_detections(cfg, predictors):
    image = cv2.imread(DatasetCatalog.get("shapes_val")[0]["file_name"])
    instances = predictors[0](image)["instances"]
    assert instances.pred_masks.shape[1:] == image.shape[:2]
    visualizer = Visualizer(image[:, :, ::-1], MetadataCatalog.get("shapes_val"))
    drawn = visualizer.draw_instance_predictions(instances).get_image()
    assert not np.array_equal(drawn, image[:, :, ::-1])
