"""With DATASETS.CHECK warn, a run leaves out records that it cannot use, and says which."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from broken_data import CASES, make_good
from conftest import small_config
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask_head_plugin import ConfigError
from mask_head_plugin.data import TrainLoader, check_and_leave_out, register_coco_files
from mask_head_plugin.data.train_loader import ImageNamingMapper
from mask_head_plugin.dataset_check import check_dataset_files
from mask_head_plugin.dataset_check.findings import ERROR, KEPT, KINDS, WHOLE_FILE_KEPT
from mask_head_plugin.image_file_mapper import ImageFileMapper

BROKEN = [broken for broken in CASES if KINDS[broken.kind].severity == ERROR]


@pytest.fixture
def good(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_good(tmp_path)


def configure(tmp_path, data):
    cfg = small_config(
        "Base-MaskRCNN-FPN.yaml",
        *("MODEL.ROI_HEADS.NUM_CLASSES", "2", "DATASETS.CHECK", "warn"),
        *("DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path / "output")),
    )
    cfg.DATASETS.COCO_FILES = [["warned", str(data.json_file), str(data.images)]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("warned",)
    return cfg


@pytest.mark.parametrize("broken", BROKEN, ids=lambda x: x.name.replace(" ", "-"))
def test_any_error_is_left_out_or_refused_in_plain_words(good, tmp_path, broken):
    good.write(broken.break_it(good))
    cfg = configure(tmp_path, good)
    try:
        register_coco_files(cfg)
        check_and_leave_out(cfg)
        TrainLoader(cfg)
    except ConfigError as error:
        assert broken.after_fix == "none" or f"[{broken.kind}]" in str(error)
        return
    mapper = ImageNamingMapper(ImageFileMapper(cfg))
    records = DatasetCatalog.get("warned")
    assert all(mapper(record) for record in records)
    content = json.loads(Path(MetadataCatalog.get("warned").json_file).read_text())
    assert {x["id"] for x in content["images"]} == {x["image_id"] for x in records}
    kept = broken.kind in KEPT | WHOLE_FILE_KEPT
    assert kept == (cfg.DATASETS.COCO_FILES[0][1] == str(good.json_file))


def test_the_warning_counts_and_names_the_records_and_the_copy_is_evaluated(good, tmp_path, caplog):
    good.annotation(13)["category_id"] = 99
    good.path(4).unlink()
    cfg = configure(tmp_path, good.write())
    register_coco_files(cfg)
    with caplog.at_level(logging.WARNING):
        check_and_leave_out(cfg)
    assert (
        "left out 1 of 4 images and 2 of 6 annotations, which the run cannot use (1 "
        "image-file-missing, 1 unknown-category): image 4, image 2 annotation 13; the run uses"
    ) in caplog.text
    assert [x["image_id"] for x in DatasetCatalog.get("warned")] == [1, 2, 3]
    evaluated = json.loads(Path(MetadataCatalog.get("warned").json_file).read_text())
    assert [x["id"] for x in evaluated["annotations"]] == [11, 12, 14, 16]


def test_without_a_copy_an_unknown_category_is_refused_with_its_file_and_image(good, tmp_path):
    good.annotation(13)["category_id"] = 99
    cfg = configure(tmp_path, good.write())
    register_coco_files(cfg)
    with pytest.raises(ConfigError, match=r"(?s)annotation 13: .*The run would fail on them"):
        check_dataset_files(cfg)
    with pytest.raises(ConfigError, match=r"annotations.json: image 2: .* category 99"):
        DatasetCatalog.get("warned")
