"""Interrupted evaluations resume where they stopped, unless something has changed."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import ROOT, small_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage

from mask_head_plugin import ConfigError
from mask_head_plugin.data import register_coco_files
from mask_head_plugin.engine import Trainer
from mask_head_plugin.engine.resumable_evaluation import prediction_fingerprint
from mask_head_plugin.evaluation import MaskEvaluator

NAME = "test_five_shapes"


@pytest.fixture(scope="module", autouse=True)
def _five_shapes():
    """Registers a data set of five images without an annotation file."""
    records = DatasetCatalog.get("shapes_val")[:5]
    DatasetCatalog.register(NAME, lambda: records)
    classes = MetadataCatalog.get("shapes_val").thing_classes
    MetadataCatalog.get(NAME).set(thing_classes=classes, evaluator_type="coco")
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


class Counting(torch.nn.Module):
    """Records the images passed to a model, and can stop before one of them."""

    def __init__(self, model, stop_before=None):
        super().__init__()
        self.model, self.stop_before, self.seen = model, stop_before, []

    def forward(self, inputs):
        if len(self.seen) == self.stop_before:
            raise KeyboardInterrupt
        self.seen.append(inputs[0]["image_id"])
        return self.model(inputs)


def make(tmp_path, *opts):
    opts = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", f"('{NAME}',)", *opts]
    opts += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "3"]
    cfg = small_config("Base-Small.yaml", *opts)
    torch.manual_seed(0)
    return cfg, Trainer.build_model(cfg)


def test_an_interrupted_evaluation_resumes_with_the_same_result(tmp_path):
    cfg, model = make(tmp_path)
    expected = Trainer.test(cfg, Counting(model))
    with pytest.raises(KeyboardInterrupt):
        Trainer.test(cfg, Counting(model, stop_before=3))
    rest = Counting(model)
    results = Trainer.test(cfg, rest)
    assert len(rest.seen) == 2, "only the remaining two images must be predicted"
    for task in ("bbox", "segm", "boundary"):
        assert results[task] == pytest.approx(expected[task], nan_ok=True)
    again = Counting(model)
    Trainer.test(cfg, again)
    assert len(again.seen) == 5, "a finished evaluation must be repeated completely"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_reported_in_one_line(tmp_path, monkeypatch, workers):
    cfg, model = make(tmp_path, "DATALOADER.NUM_WORKERS", workers)
    records = [dict(record) for record in DatasetCatalog.get(NAME)]
    records[2]["file_name"] = str(tmp_path / "truncated.png")
    content = (ROOT / DatasetCatalog.get(NAME)[2]["file_name"]).read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(DatasetCatalog, "get", lambda _: records)
    with pytest.raises(ConfigError) as error:
        Trainer.test(cfg, model)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/truncated.png (image_id 3) is damaged: OSError")
    assert "\n" not in message and "repair it" in message


def test_a_crash_in_the_metrics_loses_no_predictions(tmp_path, monkeypatch):
    cfg, model = make(tmp_path)
    counting = Counting(model)

    def crash(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(MaskEvaluator, "_evaluate_tasks", crash)
        Trainer.test(cfg, counting)
    assert len(counting.seen) == 5
    counting.seen.clear()
    assert "AP" in Trainer.test(cfg, counting)["segm"]
    assert counting.seen == []


def test_the_fingerprint_depends_on_everything_that_affects_predictions(tmp_path):
    cfg, model = make(tmp_path)
    first = prediction_fingerprint(cfg, model, NAME)
    same, _ = make(tmp_path, "MODEL.WEIGHTS", "", "SOLVER.BASE_LR", "0.5")
    assert prediction_fingerprint(same, model, NAME) == first
    other, _ = make(tmp_path, "INPUT.MIN_SIZE_TEST", "300")
    assert prediction_fingerprint(other, model, NAME) != first
    assert prediction_fingerprint(cfg, model, "shapes_val") != first
    other, _ = make(tmp_path, "DATASETS.PROPOSAL_FILES_TEST", "('x.pkl',)")
    assert prediction_fingerprint(other, model, NAME) != first
    with EventStorage(7):
        assert prediction_fingerprint(cfg, model, NAME) != first
    records = DatasetCatalog.get(NAME)
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: records[:4])
    assert prediction_fingerprint(cfg, model, NAME) != first
    with torch.no_grad():
        model.roi_heads.mask_head.predictor.bias[0] += 1e-3
    assert prediction_fingerprint(cfg, model, NAME) != first


def test_rewriting_the_evaluators_copy_of_a_file_does_not_change_the_fingerprint(tmp_path):
    image = {"id": 1, "file_name": "a.png", "height": 8, "width": 8}
    (tmp_path / "images").mkdir()
    entries = []
    for name, classes in (("copied_train", ["a", "b"]), ("copied_val", ["a"])):
        categories = [{"id": i, "name": x} for i, x in enumerate(classes, 1)]
        content = {"images": [image], "annotations": [], "categories": categories}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        entries.append([name, str(tmp_path / f"{name}.json"), str(tmp_path / "images")])
    cfg, model = make(tmp_path)
    cfg.DATASETS.COCO_FILES = entries
    cfg.DATASETS.TRAIN = ("copied_train",)
    prints = []
    for time_stamp in (1, 2):
        register_coco_files(cfg)
        copy = MetadataCatalog.get("copied_val").json_file
        assert copy != entries[1][1]
        os.utime(copy, (time_stamp, time_stamp))
        prints.append(prediction_fingerprint(cfg, model, "copied_val"))
    assert prints[0] == prints[1]
