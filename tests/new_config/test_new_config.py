"""Written configs are complete and pass train_net.py's checks; splits keep photographs together."""

from __future__ import annotations

import json
import logging
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT, load_script
from PIL import Image
from pycocotools import mask as coco_mask

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.config_check.unread_keys import own_keys
from mask_head_plugin.engine.run import check_and_register
from mask_head_plugin.new_config import DataFiles, Request, new_config, summary, write_new_config
from mask_head_plugin.new_config.device import Device
from mask_head_plugin.new_config.trial import Estimate

HW = (64, 96)
TILES = [f"photo{k}_x{x}_y0.png" for k in range(6) for x in (0, 96)]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch, tmp_path):
    """Simulates a small device, skips the trial, and uses a temporary cache."""
    monkeypatch.setattr(new_config, "find_device", lambda kind: Device(kind or "cpu", True, 1e8, 2))
    monkeypatch.setattr(new_config, "try_config", lambda cfg: Estimate(0.5, 0.1, 2e9))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_files(folder, names=TILES, *, objects=2, kinds=("polygons",), classes=("a", "b")):
    """Writes images and a COCO file, with alternating kinds of masks."""
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": k, "name": name} for k, name in enumerate(classes, start=1)]
    for k, name in enumerate(names):
        Image.fromarray(rng.integers(0, 255, (*HW, 3), np.uint8)).save(images / name)
        content["images"].append({"id": k, "file_name": name, "height": HW[0], "width": HW[1]})
        for n in range(objects):
            x, y, w, h = (int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(18, 30, 2)))
            mask = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            number = len(content["annotations"])
            if kinds[number % len(kinds)] == "run lengths":
                mask = coco_mask.merge(coco_mask.frPyObjects(mask, *HW))
                mask["counts"] = mask["counts"].decode()
            content["annotations"].append(
                {"id": number + 1, "image_id": k, "category_id": 1 + n % 2, "iscrowd": 0}
                | {"bbox": [x, y, w, h], "area": w * h, "segmentation": mask}
            )
    return write(folder, content)


def write(folder, content):
    (folder / "all.json").write_text(json.dumps(content))
    return DataFiles(folder / "all.json", folder / "images")


def test_a_config_passes_the_checks_of_training_without_warnings(tmp_path, monkeypatch, caplog):
    data = make_files(tmp_path / "data")
    output = tmp_path / "configs" / "cells.yaml"
    new = write_new_config(Request(data, None, output))
    assert new.files == [output, *(output.with_suffix(f".{x}.json") for x in ("train", "val"))]
    monkeypatch.chdir(tmp_path / "data" / "images")  # paths must work from any folder
    caplog.clear()
    cfg = load_config(str(output))
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    with caplog.at_level(logging.WARNING):
        check_and_register(cfg, train=True, own=own_keys(str(output)))
    assert [x.getMessage() for x in caplog.records if "no CUDA" not in x.getMessage()] == []
    assert cfg.DATASETS.TEST == ("cells_val",) and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert cfg.INPUT.MASK_FORMAT == "polygon" and cfg.TEST.EVAL_PERIOD > 0


def test_a_config_within_configs_has_a_relative_base(tmp_path, monkeypatch):
    data = make_files(tmp_path / "data")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "Base-Small.yaml").write_text(
        (ROOT / "configs" / "Base-Small.yaml").read_text()
    )
    monkeypatch.setattr(new_config, "CONFIGS", tmp_path / "project")
    output = tmp_path / "project" / "mine" / "cells.yaml"
    write_new_config(Request(data, data, output))
    assert yaml.safe_load(output.read_text())["_BASE_"] == "../Base-Small.yaml"


def test_a_split_keeps_photographs_together_and_is_reproducible(tmp_path):
    data = make_files(tmp_path / "data", kinds=("polygons", "run lengths"))
    parts = []
    for name in ("one", "two"):
        new = write_new_config(Request(data, None, tmp_path / f"{name}.yaml", split_share=0.34))
        assert f"warning: {tmp_path / name}.train.json" in summary(new), (
            "warnings must name the written file"
        )
        files = [tmp_path / f"{name}.{part}.json" for part in ("train", "val")]
        parts.append([json.loads(file.read_text()) for file in files])
    assert parts[0] == parts[1]
    photos = [{x["file_name"][:6] for x in part["images"]} for part in parts[0]]
    assert len(photos[0]) == 4 and len(photos[1]) == 2 and not photos[0] & photos[1]


@pytest.mark.parametrize("names", [["one.png"], ["a_x0_y0.png", "a_x96_y0.png"]])
def test_a_single_photograph_is_trained_on_without_validation(tmp_path, names):
    data = make_files(tmp_path / "data", names)
    output = tmp_path / "one.yaml"
    new = write_new_config(Request(data, None, output))
    written = yaml.safe_load(output.read_text())
    assert written["DATASETS"]["TEST"] == [] and "EVAL_PERIOD" not in written["TEST"]
    assert new.files == [output] and "validation" not in summary(new)


def test_mixed_masks_become_bit_masks_and_unused_classes_are_named(tmp_path):
    kinds = ("polygons", "run lengths")
    data = make_files(tmp_path / "data", kinds=kinds, classes=("a", "b", "nobody"))
    new = write_new_config(Request(data, data, tmp_path / "mixed.yaml"))
    text = (tmp_path / "mixed.yaml").read_text()
    assert "MASK_FORMAT: bitmask" in text and "NUM_CLASSES: 3" in text
    assert "Without objects: nobody" in text
    told = summary(new)
    assert "image-in-both-splits" in told and "mixed-formats" in told, (
        "warnings about the data must be shown"
    )
    assert told.endswith(f"python train_net.py --config-file {tmp_path / 'mixed.yaml'}")
    assert "for each of" in told and "2.0 GB" in told


def test_more_than_300_objects_per_image_are_allowed_for(tmp_path):
    data = make_files(tmp_path / "data", ["a.png", "b.png"], objects=310)
    write_new_config(Request(data, data, tmp_path / "many.yaml"))
    assert (
        yaml.safe_load((tmp_path / "many.yaml").read_text())["TEST"]["DETECTIONS_PER_IMAGE"] == 400
    )


def test_a_config_for_a_gpu_is_based_on_the_zoo_and_scales_with_gpus(tmp_path, monkeypatch):
    gpu = Device("cuda", False, 8e9, 2)
    monkeypatch.setattr(new_config, "find_device", lambda kind: gpu)
    data = make_files(tmp_path / "data")
    new = write_new_config(Request(data, data, tmp_path / "gpu.yaml", device="cuda"))
    cfg = load_config(str(tmp_path / "gpu.yaml"))
    assert cfg.MODEL.WEIGHTS.startswith("detectron2://ImageNetPretrained")
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 1 and new.estimate is None
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.02 / 16 * cfg.SOLVER.IMS_PER_BATCH)


@pytest.mark.parametrize("fault", ["box", "none", "crowds", "syntax"])
def test_errors_in_the_data_stop_the_tool_and_nothing_is_written(tmp_path, fault):
    data = make_files(tmp_path / "data")
    content = json.loads(data.json_file.read_text())
    if fault == "box":
        content["annotations"][3]["bbox"] = [0, 0, -1, 5]
    elif fault == "none":
        content["annotations"] = []
    elif fault == "crowds":
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1
    write(tmp_path / "data", content)
    if fault == "syntax":
        data.json_file.write_text("{")
    with pytest.raises(ConfigError, match=r"have \d+ errors?:\n  .*all\.json"):
        write_new_config(Request(data, None, tmp_path / "out" / "cells.yaml"))
    assert not (tmp_path / "out").exists()


def test_only_the_flag_allows_overwriting_and_input_is_never_overwritten(tmp_path):
    data = make_files(tmp_path / "data")
    output = tmp_path / "cells.yaml"
    output.with_suffix(".val.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"cells\.val\.json exists; .* --overwrite"):
        write_new_config(Request(data, None, output))
    assert not output.exists()
    write_new_config(Request(data, None, output, overwrite=True))
    assert output.exists() and output.with_suffix(".val.json").read_text() != "mine"
    before = data.json_file.read_text()
    data.json_file.rename(tmp_path / "data" / "x.train.json")
    renamed = DataFiles(tmp_path / "data" / "x.train.json", data.images)
    for name, told in (("x.yaml", "input"), ("images", "yaml")):
        with pytest.raises(ConfigError, match=told):
            write_new_config(Request(renamed, None, tmp_path / "data" / name, overwrite=True))
    assert renamed.json_file.read_text() == before


def test_a_config_that_fails_its_trial_is_not_written(tmp_path, monkeypatch):
    def fail(cfg):
        raise MemoryError

    monkeypatch.setattr(new_config, "try_config", fail)
    data = make_files(tmp_path / "data")
    with pytest.raises(ConfigError, match="does not fit into the free memory"):
        write_new_config(Request(data, None, tmp_path / "cells.yaml"))
    assert not list(tmp_path.glob("cells*"))


def test_the_tool_ends_with_the_command_and_reports_errors_in_one_line(
    tmp_path, monkeypatch, capsys
):
    tool = load_script("tools/new_config.py")
    data = make_files(tmp_path / "data")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["new_config.py", *map(str, args)])
        return tool.main(), *capsys.readouterr()

    files = ("--train", data.json_file, "--train-images", data.images)
    code, out, _ = run(*files, "--output", tmp_path / "cells.yaml", "--split", 0.4)
    assert code == 0 and out.splitlines()[-1].endswith(f"--config-file {tmp_path / 'cells.yaml'}")
    code, _, err = run(*files, "--output", tmp_path / "cells.yaml")
    assert code == 2 and err.count("\n") == 1 and "--overwrite" in err
    wrong = ("--train", data.json_file, "--train-images", tmp_path / "nowhere")
    code, _, err = run(*wrong, "--output", tmp_path / "x.yaml")
    assert code == 2 and "--train-images" in err and str(tmp_path / "nowhere") in err
    for flags in (("--split", 1.5), ("--val-images", "x"), ("--val", "x", "--split", 0.2)):
        with pytest.raises(SystemExit):
            run(*files, "--output", tmp_path / "x.yaml", *flags)
