"""MaskEvaluator: mask scores rank masks and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BitMasks, Boxes, Instances

from mask_head_plugin.evaluation import MaskEvaluator


@pytest.fixture
def one_image(tmp_path):
    """A data set of one image with two squares of one class."""
    squares = [[2, 2, 10, 10], [20, 20, 10, 10]]
    annotations = [
        {
            "id": k + 1,
            "image_id": 7,
            "category_id": 1,
            "iscrowd": 0,
            "bbox": box,
            "area": 100,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for k, box in enumerate(squares)
        for x, y, w, h in [box]
    ]
    content = {
        "info": {},
        "images": [{"id": 7, "file_name": "7.png", "height": 40, "width": 40}],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": annotations,
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    name = f"one_image_{tmp_path.name}"
    DatasetCatalog.register(name, list)
    metadata = {"thing_classes": ["square"], "thing_dataset_id_to_contiguous_id": {1: 0}}
    MetadataCatalog.get(name).set(json_file=str(path), **metadata)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def evaluate(evaluator, scores, mask_scores=None):
    """Three detections: both squares, and between them a box with a mask that is wrong."""
    detections = Instances((40, 40))
    boxes = [[2.0, 2, 12, 12], [2, 2, 12, 12], [20, 20, 30, 30]]
    detections.pred_boxes = Boxes(torch.tensor(boxes))
    detections.scores, detections.pred_classes = torch.tensor(scores), torch.zeros(3).long()
    masks = torch.zeros(3, 40, 40, dtype=torch.bool)
    masks[0, 2:12, 2:12] = masks[1, 30:, 30:] = masks[2, 20:30, 20:30] = True
    detections.pred_masks = BitMasks(masks).tensor
    if mask_scores is not None:
        detections.mask_scores = torch.tensor(mask_scores)
    evaluator.reset()
    evaluator.process([{"image_id": 7}], [{"instances": detections}])
    return evaluator.evaluate()


def test_mask_scores_rank_masks_only(one_image, tmp_path):
    evaluator = MaskEvaluator(one_image, output_dir=str(tmp_path))
    plain = evaluate(evaluator, [0.9, 0.8, 0.7])
    scored = evaluate(evaluator, [0.9, 0.8, 0.7], [0.9, 0.1, 0.7])
    assert scored["bbox"] == pytest.approx(plain["bbox"], nan_ok=True)
    assert plain["segm"]["AP"] < 90 and scored["segm"]["AP"] > 99, "the wrong mask comes last"
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [(round(x["score"], 4), round(x["mask_score"], 4)) for x in results] == [
        (0.9, 0.9),
        (0.8, 0.1),
        (0.7, 0.7),
    ]


def test_without_mask_scores_it_is_coco_evaluator(one_image, tmp_path):
    folders = [str(tmp_path / name) for name in ("a", "b")]
    evaluators = (
        MaskEvaluator(one_image, output_dir=folders[0]),
        COCOEvaluator(one_image, output_dir=folders[1]),
    )
    ours, stock = (evaluate(evaluator, [0.9, 0.8, 0.7]) for evaluator in evaluators)
    for task in ("bbox", "segm"):
        assert ours[task] == pytest.approx(stock[task], nan_ok=True)


def test_masks_alone(one_image):
    evaluator = MaskEvaluator(one_image, tasks=("segm",))
    assert set(evaluate(evaluator, [0.9, 0.8, 0.7], [0.9, 0.1, 0.7])) == {"segm"}
