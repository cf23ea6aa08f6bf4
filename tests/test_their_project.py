"""A user's detectron2 project with a DefaultTrainer and this plugin's modules."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from conftest import SMALL_RESNET
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer

from mask_head_plugin import add_mask_head_config
from mask_head_plugin.data import register_coco_files
from mask_head_plugin.dataset_check import check_dataset_files
from mask_head_plugin.evaluation import MaskEvaluator
from mask_head_plugin.structures import RLEMasks


class TheirTrainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return MaskEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))


@pytest.fixture
def their_files(tmp_path):
    """Yields two entries of COCO_FILES, both with the same four images of the embedded data set."""
    metadata = MetadataCatalog.get("shapes_val")
    DatasetCatalog.get("shapes_val")
    content = json.loads(Path(metadata.json_file).read_text())
    content["images"] = content["images"][:4]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in ids]
    path = tmp_path / "cells.json"
    path.write_text(json.dumps(content))
    names = ["test_their_train", "test_their_val"]
    yield [[name, str(path), metadata.image_root] for name in names]
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def test_a_default_trainer_trains_evaluates_and_logs_the_table(their_files, tmp_path):
    cfg = get_cfg()
    add_mask_head_config(cfg)
    cfg.merge_from_file(
        model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    )
    cfg.merge_from_list(SMALL_RESNET)
    cfg.INPUT.MASK_FORMAT = "polygon"  # detectron2's default
    cfg.MODEL.ROI_HEADS.NAME = "PerClassMaskROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "FCNMaskHead"
    cfg.MODEL.META_ARCHITECTURE = "MaskRCNN"
    cfg.MODEL.MASK_OUTPUT = "rle"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    cfg.DATASETS.COCO_FILES = their_files
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("test_their_train",), ("test_their_val",)
    cfg.SOLVER.MAX_ITER = 2
    cfg.OUTPUT_DIR = str(tmp_path)
    register_coco_files(cfg)
    check_dataset_files(cfg)
    assert cfg.INPUT.MASK_FORMAT == "bitmask", "the run lengths in the file need bit masks"

    log = io.StringIO()
    handler = logging.StreamHandler(log)
    detectron2_log = logging.getLogger("detectron2")
    detectron2_log.addHandler(handler)
    try:
        trainer = TheirTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
    finally:
        detectron2_log.removeHandler(handler)
    assert set(trainer._last_eval_results) == {"bbox", "segm", "boundary"}
    assert "Evaluation of test_their_val" in log.getvalue() and "| segm" in log.getvalue()
    (sample,) = next(iter(trainer.build_test_loader(cfg, "test_their_val")))
    trainer.model.eval()
    (output,) = trainer.model([sample])
    assert isinstance(output["instances"].pred_masks, RLEMasks)
    assert (tmp_path / "model_final.pth").is_file()
