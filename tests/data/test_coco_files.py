"""DATASETS.COCO_FILES: consistent class numbers, a fitting mask format, errors that name files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from conftest import SHARED_DATA, small_config
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from mask_head_plugin import ConfigError
from mask_head_plugin.data import (
    check_registered_datasets,
    register_coco_files,
    register_found_coco_files,
)
from mask_head_plugin.dataset_check import check_dataset_files
from mask_head_plugin.dataset_check.config_datasets import files_of
from mask_head_plugin.evaluation import MaskEvaluator

HW = (40, 50)
POLYGON = [[5.0, 5.0, 25.0, 5.0, 25.0, 25.0, 5.0, 25.0]]


def rle() -> dict:
    mask = np.zeros(HW, np.uint8, order="F")
    mask[5:25, 5:25] = 1
    encoded = mask_util.encode(mask)
    return {"size": list(HW), "counts": encoded["counts"].decode()}


def write_files(folder, name, categories, *, segmentation=POLYGON, crowd_rle=False, used=None):
    """Writes a COCO file with one image and object per used category; returns the config entry."""
    images = folder / name
    images.mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    for i, category in categories.items():
        content["categories"].append({"id": i, "name": category})
    for index, i in enumerate(used or categories):
        Image.new("RGB", HW[::-1]).save(images / f"{index}.png")
        size = {"height": HW[0], "width": HW[1]}
        content["images"].append({"id": index + 1, "file_name": f"{index}.png", **size})
        for crowd in (0, 1) if crowd_rle else (0,):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": index + 1,
                    "category_id": i,
                    "bbox": [5, 5, 20, 20],
                    "area": 400,
                    "iscrowd": crowd,
                    "segmentation": rle() if crowd else segmentation,
                }
            )
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return [f"test_{name}", str(path), str(images)]


def coco(categories) -> str:
    return json.dumps({"images": [], "annotations": [], "categories": categories})


def configure(tmp_path, train, val, num_classes=3):
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", str(num_classes))
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.INPUT.MASK_FORMAT = "polygon"
    cfg.DATASETS.COCO_FILES = [train, val]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train[0],), (val[0],)
    register_coco_files(cfg)
    check_registered_datasets(cfg)
    return cfg


CATEGORIES = {3: "cat", 7: "dog", 9: "owl"}


def test_the_training_file_numbers_the_classes_for_all_files(tmp_path):
    train = write_files(tmp_path, "train", CATEGORIES)
    val = write_files(tmp_path, "val", {9: "owl"})
    configure(tmp_path, train, val)
    assert MetadataCatalog.get("test_val").thing_classes == ["cat", "dog", "owl"]
    classes = [r["annotations"][0]["category_id"] for r in DatasetCatalog.get("test_train")]
    assert classes == [0, 1, 2]
    # detectron2 would number the classes of each file separately, which gives 0 here.
    assert DatasetCatalog.get("test_val")[0]["annotations"][0]["category_id"] == 2


def test_a_rewritten_file_is_made_only_for_evaluators(tmp_path):
    train = write_files(tmp_path, "train", CATEGORIES)
    val = write_files(tmp_path, "val", {9: "owl"})
    cfg = configure(tmp_path, train, val)
    DatasetCatalog.get("test_val")
    check_dataset_files(cfg)
    assert (
        files_of("test_val") == tuple(val[1:]) and not Path(cfg.OUTPUT_DIR, "coco_files").exists()
    )
    copy = Path(MetadataCatalog.get("test_val").json_file)
    assert copy.parent == Path(cfg.OUTPUT_DIR, "coco_files")
    assert MetadataCatalog.get("test_val").as_dict()["json_file"] == str(copy)
    assert MetadataCatalog.get("test_train").json_file == train[1]
    assert files_of("test_val") == tuple(val[1:])


def test_perfect_detections_score_100_if_the_file_lacks_a_category(tmp_path):
    train = write_files(tmp_path, "train", CATEGORIES)
    val = write_files(tmp_path, "val", {7: "dog", 9: "owl"})
    cfg = configure(tmp_path, train, val)
    evaluator = COCOEvaluator("test_val", output_dir=str(tmp_path / "results"))
    evaluator.reset()
    evaluator._predictions = [
        {
            "image_id": record["image_id"],
            "instances": [
                {
                    "image_id": record["image_id"],
                    "category_id": annotation["category_id"],
                    "bbox": annotation["bbox"],
                    "score": 0.9,
                    "segmentation": rle(),
                }
                for annotation in record["annotations"]
            ],
        }
        for record in DatasetCatalog.get("test_val")
    ]
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP-owl"] == pytest.approx(100) and np.isnan(results["bbox"]["AP-cat"])
    assert cfg.DATASETS.TEST == ("test_val",)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ({3: "cat", 7: "dog", 9: "emu"}, "id 9 is 'emu' in the first but 'owl' in the second"),
        ({3: "cat", 8: "dog", 9: "owl"}, "'dog' has id 8 in the first but 7 in the second"),
        ({3: "cat", 11: "emu"}, r"'emu' \(id 11\) does not exist in the second"),
    ],
)
def test_the_error_for_contradictory_categories_names_both_data_sets(tmp_path, categories, message):
    train = write_files(tmp_path, "train", CATEGORIES)
    val = write_files(tmp_path, "val", categories)
    with pytest.raises(ConfigError, match=message) as info:
        configure(tmp_path, train, val)
    assert "test_train" in str(info.value) and val[1] in str(info.value)
    assert "DATASETS.TRAIN '()' to evaluate only" in str(info.value)


def test_the_error_for_a_wrong_number_of_classes_gives_both_numbers(tmp_path):
    train = write_files(tmp_path, "train", CATEGORIES)
    val = write_files(tmp_path, "val", CATEGORIES)
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 80, but .*test_train.* has 3 classes"):
        configure(tmp_path, train, val, num_classes=80)


def test_a_file_without_images_is_refused_before_anything_is_built(tmp_path):
    train = write_files(tmp_path, "train", CATEGORIES)
    val = write_files(tmp_path, "val", CATEGORIES)
    content = json.loads((tmp_path / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps({**content, "images": [], "annotations": []}))
    with pytest.raises(ConfigError, match=r"'test_val': .*/val.json lists no images; list them"):
        configure(tmp_path, train, val)


def test_unused_categories_cause_no_error(tmp_path):
    """labelme adds _background_, and Roboflow a class 0 named after the project."""
    train = write_files(tmp_path, "train", {0: "_background_", **CATEGORIES}, used=CATEGORIES)
    val = write_files(tmp_path, "val", {0: "animals", **CATEGORIES, 12: "yak"}, used=CATEGORIES)
    configure(tmp_path, train, val, num_classes=4)
    records = DatasetCatalog.get("test_val")
    assert [x["annotations"][0]["category_id"] for x in records] == [1, 2, 3]
    evaluated = json.loads(Path(MetadataCatalog.get("test_val").json_file).read_text())
    assert [x["name"] for x in evaluated["categories"]] == ["_background_", "cat", "dog", "owl"]


def test_boxes_without_masks_are_loaded_and_evaluated_for_a_model_without_masks(tmp_path):
    files = [
        write_files(tmp_path, split, CATEGORIES, segmentation=[]) for split in ("train", "val")
    ]
    cfg = configure(tmp_path, *files)
    cfg.MODEL.MASK_ON = False
    check_dataset_files(cfg)
    records = DatasetCatalog.get("test_train")
    assert len(DatasetMapper(cfg, is_train=True)(records[0])["instances"]) == 1
    evaluator = MaskEvaluator("test_val", tasks=("bbox",), output_dir=str(tmp_path / "results"))
    evaluator.reset()
    for record in DatasetCatalog.get("test_val"):
        instances = Instances(HW)
        instances.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 25.0, 25.0]]))
        instances.scores = torch.ones(1)
        instances.pred_classes = torch.tensor([record["annotations"][0]["category_id"]])
        evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("segmentation", "crowd_rle", "expected"),
    [(POLYGON, False, "polygon"), (POLYGON, True, "polygon"), (rle(), False, "bitmask")],
    ids=["polygons", "polygons and a run-length crowd", "run-length"],
)
def test_the_mask_format_follows_the_files_and_loads(tmp_path, segmentation, crowd_rle, expected):
    options = {"segmentation": segmentation, "crowd_rle": crowd_rle}
    train = write_files(tmp_path, "train", CATEGORIES, **options)
    val = write_files(tmp_path, "val", CATEGORIES, **options)
    cfg = configure(tmp_path, train, val)
    assert cfg.INPUT.MASK_FORMAT == expected
    mapped = DatasetMapper(cfg, is_train=True)(DatasetCatalog.get("test_train")[0])
    assert len(mapped["instances"]) == 1
    assert (
        type(mapped["instances"].gt_masks).__name__
        == {
            "polygon": "PolygonMasks",
            "bitmask": "BitMasks",
        }[expected]
    )


def test_only_training_files_decide_the_mask_format(tmp_path):
    train = write_files(tmp_path, "train", CATEGORIES)
    val = write_files(tmp_path, "val", CATEGORIES, segmentation=rle())
    assert configure(tmp_path, train, val).INPUT.MASK_FORMAT == "polygon"


def test_a_changed_file_is_read_again(tmp_path):
    train = write_files(tmp_path, "train", CATEGORIES)
    val = write_files(tmp_path, "val", CATEGORIES)
    configure(tmp_path, train, val)
    shutil.rmtree(tmp_path / "train")
    write_files(tmp_path, "train", {**CATEGORIES, 12: "yak"})
    configure(tmp_path, train, val, num_classes=4)


def test_changing_the_mask_format_is_reported(tmp_path, caplog):
    train = write_files(tmp_path, "train", CATEGORIES, segmentation=rle())
    val = write_files(tmp_path, "val", CATEGORIES)
    with caplog.at_level("INFO"):
        configure(tmp_path, train, val)
    assert f"MASK_FORMAT is now bitmask: run-length masks in {train[1]}" in caplog.text


def test_a_tool_that_needs_no_data_registers_existing_files_and_logs_the_others(tmp_path, caplog):
    train = write_files(tmp_path, "train", CATEGORIES)
    cfg = configure(tmp_path, train, write_files(tmp_path, "val", CATEGORIES))
    (train, train_json, images), val = cfg.DATASETS.COCO_FILES
    Path(train_json).unlink()
    DatasetCatalog.pop(train, None)
    register_found_coco_files(cfg, [val[0]])
    assert caplog.messages == []
    register_found_coco_files(cfg, [train, val[0]])
    assert train not in DatasetCatalog.list()
    assert MetadataCatalog.get(val[0]).json_file == val[1]
    assert caplog.messages == [f"DATASETS.COCO_FILES: not on this machine: {train_json}"]
    assert cfg.DATASETS.COCO_FILES == [[train, train_json, images], val]


def test_registering_again_replaces_a_data_set_unless_it_is_built_in(tmp_path):
    train = write_files(tmp_path, "train", CATEGORIES)
    val = write_files(tmp_path, "val", CATEGORIES)
    configure(tmp_path, train, val)
    configure(tmp_path, train, val)
    with pytest.raises(ConfigError, match="already registered"):
        configure(tmp_path, ["shapes_train", *train[1:]], val)
    assert MetadataCatalog.get("shapes_train").thing_classes[0] == "ring"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["a", "missing.json", "."], "annotation file missing.json does not exist"),
        (["a", "{json}", "missing"], "image folder missing does not exist"),
        (["a", "{broken}", "."], "broken.json: the file is not JSON at line 1, column 2"),
        (["a", "{other}", "."], "other.json: 'annotations' missing"),
        (["a", "{utf16}", "."], "utf16.json: byte 0 is not UTF-8"),
        (["a", "{empty}", "."], "empty.json: the file has 0 bytes"),
        (["a", "{listed}", "."], r"listed.json: the file contains \[\]"),
        (["a", "{bare}", "."], "bare.json: the file lists no categories"),
        (["a", "{twice}", "."], "twice.json: .*the categories 'cat' and 'cat' have the id 1"),
        (
            ["a", "{namesakes}", "."],
            "namesakes.json: .*the categories 1 and 2 are both called 'cat'",
        ),
        (["a", "b"], r"\['a', 'b'\] is not \[name"),
        (("a", "b.json", ["day", "night"]), r"several folders, .* --images FOLDER FOLDER --fix"),
        (["../a", "{json}", "."], r"'../a' is not a valid name"),
        ("ab", "is not"),
        (3, r"3 is not \[name"),
        ({"a": 1, "b": 2, "c": 3}, "is not"),
        (["a", "{bom}", "."], "bom.json: the file starts with a byte order mark"),
        (
            ["a", "{text_id}", "."],
            "text_id.json: .*the category id '1' is of type str",
        ),
        (["a", "{no_name}", "."], "no_name.json: .*category 1 has no name"),
    ],
)
def test_invalid_entries_are_named(tmp_path, entry, message):
    paths = {"json": write_files(tmp_path, "train", CATEGORIES)[1]}
    cat = {"id": 1, "name": "cat"}
    contents = {
        "broken": "{",
        "other": '{"images": []}',
        "utf16": "{}".encode("utf-16"),
        "empty": "",
        "listed": "[]",
        "bare": coco([]),
        "bom": coco([cat]).encode("utf-8-sig"),
        "text_id": coco([{"id": "1", "name": "cat"}]),
        "no_name": coco([{"id": 1, "name": None}]),
        "twice": coco([cat, cat]),
        "namesakes": coco([cat, {**cat, "id": 2}]),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        paths[name] = str(path)
    cfg = small_config("Base-MaskRCNN-FPN.yaml")
    entry = [x.format(**paths) for x in entry] if isinstance(entry, list) else entry
    cfg.DATASETS.COCO_FILES = [entry]
    with pytest.raises(ConfigError, match=message):
        register_coco_files(cfg)


def test_the_error_for_a_missing_built_in_data_set_names_its_path():
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "DATASETS.TRAIN", "('coco_2017_train',)")
    with pytest.raises(ConfigError, match=r"'coco_2017_train' is not on this machine: .*train2017"):
        check_registered_datasets(cfg)
    check_registered_datasets(cfg, train=False)


def test_the_error_for_an_unregistered_data_set_suggests_the_nearest():
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "DATASETS.TRAIN", "('shapes_trian',)")
    with pytest.raises(
        ConfigError, match="'shapes_trian' is not registered; did you mean 'shapes_train'"
    ):
        check_registered_datasets(cfg)


@pytest.mark.parametrize(
    ("name", "extra"),
    [("lvis_v1_train", "lvis"), ("cityscapes_fine_instance_seg_train", "cityscapes")],
)
def test_the_error_for_a_missing_package_names_the_extra(monkeypatch, name, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "DATASETS.TRAIN", f"('{name}',)")
    with pytest.raises(ConfigError, match=rf"pip install -e '\.\[{extra}\]'"):
        check_registered_datasets(cfg)


@pytest.mark.parametrize(
    ("kind", "classes", "mask_format"), [("nuclei", 1, "bitmask"), ("coco_photos", 80, "polygon")]
)
def test_real_files_register_and_load(tmp_path, kind, classes, mask_format):
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real images are not at {SHARED_DATA}")
    entries = []
    for split in ("train", "val"):
        folder = SHARED_DATA / f"{kind}_{split}"
        files = (str(folder / "annotations.json"), str(folder / "images"))
        entries.append([f"test_{kind}_{split}", *files])
    cfg = configure(tmp_path, *entries, num_classes=classes)
    assert cfg.INPUT.MASK_FORMAT == mask_format
    mapped = DatasetMapper(cfg, is_train=True)(DatasetCatalog.get(f"test_{kind}_train")[0])
    assert len(mapped["instances"]) > 0
