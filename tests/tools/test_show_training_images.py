"""tools/show_training_images.py draws training images and reports errors in one line."""

from __future__ import annotations

import sys

import cv2
import pytest
from broken_data import make_good
from conftest import CONFIGS, load_script


def run(monkeypatch, *arguments):
    tool = load_script("tools/show_training_images.py")
    monkeypatch.setattr(sys, "argv", ["show_training_images.py", *map(str, arguments)])
    tool.main()


def test_the_picture_is_drawn_without_warnings_about_keys_of_a_base(monkeypatch, tmp_path, caplog):
    timm = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "resnet10t"]
    config = CONFIGS / "shapes" / "mask_rcnn_shapes.yaml"  # its _BASE_ sets keys of a ResNet
    picture = tmp_path / "seen.png"
    opts = [*timm, "OUTPUT_DIR", tmp_path, "SEED", 3, "INPUT.COPY_PASTE.PROBABILITY", 1.0]
    run(monkeypatch, "--config-file", config, "--output", picture, *opts)
    assert cv2.imread(str(picture)).std() > 0
    assert "has no effect" not in caplog.text


def test_an_unknown_key_is_reported_in_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--config-file", CONFIGS / "Base-Small.yaml", "INPUT.COPY", 1)
    told = capsys.readouterr().err
    assert end.value.code == 2 and len(told.splitlines()) == 1 and "INPUT.COPY" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--iteration", "-3"], "--iteration -3 is below 0"),
        (["--output", "x.txt"], "--output x.txt: name a file that ends in .png"),
        (["--image", "nobody.jpg"], "--image nobody.jpg: no image of DATASETS.TRAIN"),
    ],
)
def test_wrong_arguments_are_refused(monkeypatch, tmp_path, capsys, arguments, told):
    config = CONFIGS / "shapes" / "mask_rcnn_shapes.yaml"
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--config-file", config, *arguments, "OUTPUT_DIR", tmp_path)
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_one_photograph_of_a_file_with_errors_can_be_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = make_good(tmp_path)
    data.annotation(13)["category_id"] = 99
    files = f"[['mine', '{data.write().json_file}', '{data.images}']]"
    opts = ["DATASETS.COCO_FILES", files, "DATASETS.TRAIN", "['mine']", "OUTPUT_DIR", tmp_path]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.CHECK", "warn"]
    run(monkeypatch, "--config-file", CONFIGS / "Base-Small.yaml", "--image", "3.jpg", *opts)
    assert cv2.imread(str(tmp_path / "training_images.png")).std() > 0
