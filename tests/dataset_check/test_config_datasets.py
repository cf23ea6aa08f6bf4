"""DATASETS.CHECK: what stops training, what is logged, and what is cached between runs."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from broken_data import encode, make_good
from conftest import small_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mask_head_plugin import ConfigError
from mask_head_plugin.data import check_registered_datasets, register_coco_files
from mask_head_plugin.dataset_check import check_dataset_files
from mask_head_plugin.dataset_check import config_datasets as module


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mask_head_plugin" / "dataset_checks"


@pytest.fixture
def data(tmp_path, cache):
    return {split: make_good(tmp_path / split, k) for k, split in enumerate(("train", "val"))}


@pytest.fixture
def registered():
    """Yields a function that registers data sets for the duration of a test."""
    names = []

    def register(name, data):
        register_coco_instances(name, {}, str(data.json_file), str(data.images))
        names.append(name)

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def configure(tmp_path, data, *opts):
    cfg = small_config(
        "Base-MaskRCNN-FPN.yaml",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "2",
        *opts,
        "OUTPUT_DIR",
        str(tmp_path / "output"),
    )
    cfg.INPUT.MASK_FORMAT = "polygon"
    cfg.DATASETS.COCO_FILES = [
        [f"checked_{split}", str(x.json_file), str(x.images)] for split, x in data.items()
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("checked_train",), ("checked_val",)
    return cfg


def run(cfg):
    register_coco_files(cfg)
    check_registered_datasets(cfg)
    check_dataset_files(cfg)


def test_evaluation_does_not_need_the_training_data(tmp_path, data, registered):
    registered("lost_train", data["train"])
    cfg = configure(tmp_path, data, "DATASETS.CHECK", "error")
    cfg.DATASETS.TRAIN = ("lost_train",)
    cfg.DATASETS.COCO_FILES = cfg.DATASETS.COCO_FILES[1:]
    data["train"].json_file.unlink()
    register_coco_files(cfg)
    check_dataset_files(cfg, train=False)
    with pytest.raises(ConfigError, match=r"DATASETS\.CHECK"):
        check_dataset_files(cfg)


def test_a_valid_data_set_passes_with_an_empty_report(tmp_path, data):
    run(configure(tmp_path, data))
    report = json.loads((tmp_path / "output" / "dataset_check.json").read_text())
    assert report == {"errors": 0, "warnings": 0, "hints": 0, "findings": []}


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_error_lists_ten_findings_their_number_the_report_and_the_command(
    tmp_path, data, split
):
    broken = data[split]
    for annotation in broken.content["annotations"]:
        annotation["area"] = -1
        annotation["bbox"] = [0, 0]
    with pytest.raises(ConfigError) as info:
        run(configure(tmp_path, {**data, split: broken.write()}))
    lines = str(info.value).splitlines()
    assert lines[0] == "the data sets have 12 errors:"
    assert len([x for x in lines if str(broken.json_file) in x and "annotation 1" in x]) == 10
    assert "  and 2 more" in lines
    report = tmp_path / "output" / "dataset_check.json"
    assert f"{report} lists all of them" in str(info.value)
    assert json.loads(report.read_text())["errors"] == 12
    (command,) = [x for x in lines if "tools/check_dataset.py --json" in x]
    assert f"--images {broken.images} --fix " in command and str(broken.json_file) in command


def test_no_fix_command_is_suggested_if_it_would_fail(tmp_path, data):
    data["train"].content["annotations"] = [data["train"].annotation(16)]  # a crowd
    data["train"].write()
    with pytest.raises(ConfigError, match="only-crowds") as info:
        run(configure(tmp_path, data))
    assert "tools/check_dataset.py" not in str(info.value)


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (
            1,
            "1 of 4 images have more than 1 objects, the limit set by TEST.DETECTIONS_PER_IMAGE; "
            "image 1 has 2",
        ),
        (2, ""),
        (-1, ""),
    ],
)
def test_images_with_more_objects_than_can_be_detected_are_counted(tmp_path, data, limit, told):
    for _ in ("checked", "checked before"):
        run(configure(tmp_path, data, "TEST.DETECTIONS_PER_IMAGE", str(limit)))
        report = json.loads((tmp_path / "output" / "dataset_check.json").read_text())
        assert [x["message"] for x in report["findings"]] == [told] * bool(told)
        assert all(x["file"] == str(data["val"].json_file) for x in report["findings"])


def test_warn_only_logs_errors(tmp_path, data, caplog):
    data["train"].annotation(13)["area"] = -1
    data["train"].write()
    with caplog.at_level(logging.WARNING):
        run(configure(tmp_path, data, "DATASETS.CHECK", "warn"))
    assert "area-invalid" in caplog.text and "annotation 13" in caplog.text


def test_off_skips_the_check(tmp_path, data, monkeypatch):
    monkeypatch.setattr(module, "check_with_cache", None)
    run(configure(tmp_path, data, "DATASETS.CHECK", "off"))
    assert not (tmp_path / "output" / "dataset_check.json").exists()


def test_any_other_value_is_refused(tmp_path, data):
    with pytest.raises(ConfigError, match=r"DATASETS.CHECK 'no' is not one of \('error', 'warn'"):
        run(configure(tmp_path, data, "DATASETS.CHECK", "no"))


def test_a_second_run_reads_only_the_cache_and_repeats_the_warnings(
    tmp_path, data, monkeypatch, caplog
):
    data["train"].annotation(13)["bbox"] = [0, 0, 22, 32]
    data["train"].write()
    run(configure(tmp_path, data))
    monkeypatch.setattr(module, "check_content", None)
    with caplog.at_level(logging.INFO):
        run(configure(tmp_path, data))
    assert "have already been checked" in caplog.text and "box-loose" in caplog.text


def test_a_changed_image_or_annotation_is_checked_again(tmp_path, data, cache):
    run(configure(tmp_path, data))
    path = data["train"].path(3)
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ConfigError, match="image-truncated"):
        run(configure(tmp_path, data))
    make = path.with_suffix(".other")
    make.write_bytes(b"x" * status.st_size)
    make.replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ConfigError, match="image-unreadable"):
        run(configure(tmp_path, data))
    path.unlink()
    with pytest.raises(ConfigError, match="image-file-missing"):
        run(configure(tmp_path, data))
    data["val"].annotation(13)["area"] = -1
    data["val"].write()
    with pytest.raises(ConfigError, match="area-invalid"):
        run(configure(tmp_path, data))


def test_images_with_changed_permissions_are_checked_again(tmp_path, data, cache, caplog):
    run(configure(tmp_path, data))
    path = data["train"].path(3)
    path.chmod(0o600 if path.stat().st_mode & 0o777 != 0o600 else 0o644)
    with caplog.at_level("INFO"):
        run(configure(tmp_path, data))
    checked = f"{data['train'].json_file} and its images have already been checked"
    assert checked not in caplog.text


@pytest.mark.parametrize("name", ["masks.py", "image_files.py"])
def test_the_cache_is_not_used_after_the_code_has_changed(tmp_path, data, cache, monkeypatch, name):
    run(configure(tmp_path, data))
    before, read_bytes = set(cache.iterdir()), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: read_bytes(p) + b"#" * (p.name == name))
    run(configure(tmp_path, data))
    assert len(before) == 2 and len(set(cache.iterdir()) - before) == 2


def test_a_damaged_cache_is_ignored(tmp_path, data, cache):
    data["train"].annotation(13)["area"] = -1
    data["train"].write()
    with pytest.raises(ConfigError, match="area-invalid"):
        run(configure(tmp_path, data))
    for text in ("", "[]", '{"fingerprint": 1}', "\0"):
        assert len(list(cache.iterdir())) == 2
        for path in cache.iterdir():
            path.write_text(text)
        with pytest.raises(ConfigError, match="area-invalid"):
            run(configure(tmp_path, data))


def test_the_check_works_without_a_writable_cache(tmp_path, data, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    run(configure(tmp_path, data))
    run(configure(tmp_path, data))


def test_data_sets_registered_by_code_are_checked(tmp_path, data, registered):
    data["train"].annotation(13)["category_id"] = 99
    registered("by_code", data["train"].write())
    cfg = configure(tmp_path, {})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("by_code",), ()
    with pytest.raises(ConfigError, match="image 2, annotation 13: its category_id 99"):
        run(cfg)


def test_categories_that_differ_between_train_and_test_are_reported(tmp_path, data, registered):
    data["val"].content["categories"][1]["name"] = "fox"
    registered("code_train", data["train"])
    registered("code_val", data["val"].write())
    cfg = configure(tmp_path, {})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("code_train",), ("code_val",)
    with pytest.raises(ConfigError, match="category 7 is 'dog' only in the second") as info:
        run(cfg)
    assert "categories-disagree" in str(info.value) and str(data["val"].json_file) in str(
        info.value
    )


def test_the_number_of_classes_must_match_the_model(tmp_path, data, registered):
    registered("by_code", data["train"])
    cfg = configure(tmp_path, {}, "MODEL.ROI_HEADS.NUM_CLASSES", "3")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("by_code",), ()
    with pytest.raises(ConfigError, match="2 categories, but the model has 3"):
        run(cfg)


def test_run_lengths_require_bit_masks(tmp_path, data, registered):
    data["train"].annotation(13).update(bbox=[0, 0, 20, 30], segmentation=encode(0, 0, 20, 30))
    registered("by_code", data["train"].write())
    cfg = configure(tmp_path, {})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("by_code",), ()
    with pytest.raises(ConfigError, match=r"annotation 13: .*INPUT.MASK_FORMAT is polygon"):
        run(cfg)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    run(cfg)
    cfg.INPUT.MASK_FORMAT = "polygon"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("by_code",)  # evaluation does not load masks
    run(cfg)


def test_a_test_file_that_lacks_a_category_is_checked(tmp_path, data):
    val = data["val"]
    val.content["categories"] = val.content["categories"][:1]
    val.content["annotations"] = [
        {**x, "area": -1} for x in val.content["annotations"] if x["category_id"] == 3
    ]
    with pytest.raises(ConfigError) as info:
        run(configure(tmp_path, {**data, "val": val.write()}))
    assert str(val.json_file) in str(info.value)


def test_non_coco_data_sets_are_logged_and_the_embedded_one_is_not_checked(tmp_path, caplog, cache):
    DatasetCatalog.register("by_function", list)
    try:
        cfg = configure(tmp_path, {})
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_train",), ("by_function",)
        with caplog.at_level(logging.INFO):
            check_dataset_files(cfg)
        assert "data set by_function is not checked" in caplog.text
        assert "shapes" not in caplog.text
    finally:
        DatasetCatalog.remove("by_function")
        MetadataCatalog.remove("by_function")
