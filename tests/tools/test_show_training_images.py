"""tools/show_training_images.py draws training images and reports errors in one line."""

from __future__ import annotations

import sys

import cv2
import pytest
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
