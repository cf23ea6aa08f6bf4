"""Errors of load_config are one line and suggest the nearest key. train_net.py exits with 2."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
import torch
from conftest import CONFIGS, ROOT
from detectron2.engine import default_argument_parser
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.messages import nearest_name


def write(tmp_path, text, name="x.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "MODEL:\n  ROI_HEAD:\n    NUM_CLASSES: 3\n",
            r"'MODEL.ROI_HEAD' does not exist; did you mean MODEL.ROI_HEADS\?$",
        ),
        ("MODEL:\n  ROI_MASK_HEAD:\n    LOSES: []\n", "did you mean MODEL.ROI_MASK_HEAD.LOSSES?"),
        (
            "SOLVER:\n  MAX_ITER: many\n",
            "SOLVER.MAX_ITER takes a value of type int.*40000.*not .*str",
        ),
        ("SOLVER:\n  BASE_LR: [1]\n", "SOLVER.BASE_LR takes a value of type float"),
        ("SOLVER: 3\n", "SOLVER takes"),
        ("a: [1\n", "not plain YAML"),
        ("MODEL: !!python/object/apply:os.system ['true']\n", "not plain YAML"),
        ("", "does not contain"),
        ("- 1\n- 2\n", "does not contain"),
        ("_BASE_: nowhere.yaml\n", "_BASE_ .*nowhere.yaml does not exist"),
        ("_BASE_: x.yaml\n", "is its own _BASE_"),
        ("_BASE_: .\n", "or its _BASE_: .*directory"),
        ("OUTPUT_DIR:\n", "OUTPUT_DIR has no value; its default is './output'"),
    ],
)
def test_errors_in_config_files_are_explained_in_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as info:
        load_config(path)
    assert path in str(info.value) and "\n" not in str(info.value)


def test_the_error_for_a_missing_file_names_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"does not exist; did you mean .*mask_rcnn_shapes.yaml\?"
    ):
        load_config(str(CONFIGS / "shapes" / "mask_rcnn_shape.yaml"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "coco/mask_rcnn_R_50_FPN_3x.yaml"),
        ("mask_rcnn_R_50_FPN_3x.yaml", "coco/mask_rcnn_R_50_FPN_3x.yaml"),
        ("coco/mask_rcnn_R_50_FPN_3.yaml", "coco/mask_rcnn_R_50_FPN_3x.yaml"),
        (
            "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
            "lvis/v1_mask_rcnn_R_50_FPN_1x.yaml",
        ),
    ],
)
def test_the_error_for_a_missing_file_names_the_packaged_counterpart(name, meant):
    with pytest.raises(ConfigError, match=rf"does not exist; did you mean {re.escape(meant)}\?$"):
        load_config(name)
    load_config(meant)


def test_the_error_for_a_missing_file_names_nothing_if_nothing_is_similar():
    with pytest.raises(ConfigError, match=r"nope\.yaml does not exist$"):
        load_config("nope.yaml")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_RL", "1"], "option SOLVER.BASE_RL: .*did you mean SOLVER.BASE_LR?"),
        (["NUM_CLASSES", "1"], "did you mean MODEL.*NUM_CLASSES"),
        (["SOLVER.MAX_ITER", "1.5"], "type int"),
        (["SOLVER.MAX_ITER"], "has no value"),
        (["OUTPUT_DIR", "x", "--resume"], "^--resume must come before the KEY VALUE options"),
        (["--resume", "OUTPUT_DIR", "x"], "^--resume must come before the KEY VALUE options"),
        (["SOLVER", "1"], "option SOLVER is a section"),
        (["SOLVER.MAX_ITER.X", "1"], "SOLVER.MAX_ITER.X"),
    ],
)
def test_errors_in_options_are_explained(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config("", opts)


@settings(deadline=None, max_examples=60)
@given(
    key=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20),
    value=st.text(max_size=10),
)
def test_any_option_works_or_raises_a_config_error(key, value):
    try:
        load_config("", [key, value])
    except ConfigError as error:
        assert "\n" not in str(error)


def test_nearest_name_prefers_the_same_leaf():
    choices = ["SOLVER.STEPS", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"]
    assert nearest_name("MODEL.ROI_HEAD.NUM_CLASSES", choices) == "MODEL.ROI_HEADS.NUM_CLASSES"
    assert nearest_name("zzz", choices) is None


def test_without_cuda_the_device_becomes_cpu_with_a_log_message(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_config().MODEL.DEVICE == "cpu"
    assert "MODEL.DEVICE is now cpu" in caplog.text


@pytest.fixture
def run_train_net(monkeypatch, capsys):
    """Returns a function that runs train_net.py and returns its exit code and stderr lines."""

    def run(*args: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["train_net.py", *args])
        code = runpy.run_path(str(ROOT / "train_net.py"))["main"]()
        return code, capsys.readouterr().err.splitlines()

    return run


def test_train_net_exits_with_2_and_one_line(run_train_net):
    code, lines = run_train_net("--config-file", "configs/shapes/nowhere.yaml")
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(
        "train_net.py: config file configs/shapes/nowhere.yaml does not exist"
    )


def test_requesting_more_gpus_than_available_is_an_error(run_train_net):
    code, lines = run_train_net("--num-gpus", "99")
    assert code == 2 and "--num-gpus 99" in lines[-1]


def test_train_net_has_the_flags_of_detectron2_with_their_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py"])
    ours = vars(runpy.run_path(str(ROOT / "train_net.py"))["parse_args"]())
    stock = vars(default_argument_parser().parse_args([]))
    assert {**stock, "opts": []}.items() <= ours.items()
