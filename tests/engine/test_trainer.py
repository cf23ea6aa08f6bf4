"""Trainer: the evaluator that it chooses for a data set, and the memory format of its models."""

from __future__ import annotations

import pytest
import torch
from conftest import small_config
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, PascalVOCDetectionEvaluator

from mask_head_plugin.engine import Trainer
from mask_head_plugin.evaluation import ALL_DETECTIONS, MaskEvaluator


def test_coco_data_sets_get_the_mask_evaluator():
    evaluator = Trainer.build_evaluator(small_config("Base-MaskRCNN-FPN.yaml"), "shapes_val")
    assert isinstance(evaluator, MaskEvaluator) and evaluator._max_detections == 100


def test_all_detections_allowed_by_the_config_are_evaluated():
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "TEST.DETECTIONS_PER_IMAGE", "400")
    assert Trainer.build_evaluator(cfg, "shapes_val")._max_detections == 400


def test_without_a_limit_all_detections_are_evaluated():
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "TEST.DETECTIONS_PER_IMAGE", "-1")
    assert Trainer.build_evaluator(cfg, "shapes_val")._max_detections == ALL_DETECTIONS


def test_keypoints_and_proposals_are_evaluated_by_detectron2():
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "MODEL.KEYPOINT_ON", "True")
    both = Trainer.build_evaluator(cfg, "shapes_val")
    assert isinstance(both, DatasetEvaluators)
    assert [type(x) for x in both._evaluators] == [MaskEvaluator, COCOEvaluator]
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "MODEL.META_ARCHITECTURE", "ProposalNetwork")
    assert isinstance(Trainer.build_evaluator(cfg, "shapes_val"), COCOEvaluator)


def test_each_of_several_data_sets_has_its_own_folder(tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('shapes_val', 'shapes_train')"]
    cfg = small_config("Base-MaskRCNN-FPN.yaml", *opts)
    folders = [Trainer.build_evaluator(cfg, name)._folder for name in cfg.DATASETS.TEST]
    assert folders == [tmp_path / "inference" / name for name in cfg.DATASETS.TEST]


def test_the_evaluator_type_of_the_data_set_decides():
    evaluator = Trainer.build_evaluator(small_config("Base-MaskRCNN-FPN.yaml"), "voc_2007_val")
    assert isinstance(evaluator, PascalVOCDetectionEvaluator)


def test_an_unknown_evaluator_type_is_named():
    MetadataCatalog.get("test_strange").evaluator_type = "strange"
    with pytest.raises(ValueError, match="'test_strange' has evaluator_type 'strange'"):
        Trainer.build_evaluator(small_config("Base-MaskRCNN-FPN.yaml"), "test_strange")


def test_models_on_the_cpu_use_channels_last():
    model = Trainer.build_model(small_config("Base-MaskRCNN-FPN.yaml"))
    weight = model.roi_heads.mask_head.mask_fcn1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        maps = model.backbone(torch.zeros(1, 3, 64, 64))
    assert maps["p2"].is_contiguous(memory_format=torch.channels_last)
