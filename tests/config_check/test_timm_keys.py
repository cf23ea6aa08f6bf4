"""Invalid configs of timm backbones are refused early; the error states the correct value."""

from __future__ import annotations

import sys

import pytest
from conftest import CONFIGS

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.config_check import check_config

TIMM = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.PRETRAINED", "True"]
# The mean of this model is 0.498, for pixels from 0 to 1.
LITE = [*TIMM, "MODEL.TIMM.NAME", "tf_efficientnet_lite0"]
ONE_MAP = ["MODEL.ROI_HEADS.IN_FEATURES", "['p4']"]
IMAGENET = ["MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"]
IMAGENET += ["MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"]


def checked(tmp_path, *opts):
    shapes = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    cfg = load_config(
        str(CONFIGS / "Base-Small.yaml"), ["OUTPUT_DIR", str(tmp_path), *shapes, *map(str, opts)]
    )
    check_config(cfg, train=True)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            LITE,
            r"PIXEL_STD \[64.0, .*lite0 was trained with other values; set INPUT.FORMAT to RGB, "
            r".*MEAN to \[127.5, 127.5, 127.5\] and MODEL.PIXEL_STD to \[127.5, 127.5, 127.5\]",
        ),
        ([*LITE, *IMAGENET], "was trained with other values"),
        (
            [*TIMM, *IMAGENET, "INPUT.FORMAT", "BGR"],
            r"^the config has INPUT.FORMAT BGR, .*set INPUT.FORMAT to RGB, MODEL.PIXEL_MEAN to "
            r"\[123.675, 116.28",
        ),
        ([*TIMM, "MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"], "was trained with other values"),
    ],
)
def test_pixel_statistics_that_contradict_a_timm_model_are_refused_with_the_correct_ones(
    opts, message, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path, *opts)


def test_pixel_statistics_close_to_those_of_a_timm_model_pass(tmp_path):
    rounded = ["MODEL.PIXEL_MEAN", "[126.99, 127.0, 127.5]"]
    checked(tmp_path, *LITE, *rounded, "MODEL.PIXEL_STD", "[128.01, 128.0, 127.5]")
    checked(tmp_path, *TIMM, *IMAGENET)
    random = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone"]
    checked(tmp_path, *random)  # random weights allow any statistics


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.TIMM.NAME", "convnext_tny"], "is not a model of timm; did you mean convnext_tiny"),
        (["MODEL.TIMM.NAME", "resnet50.a9"], r"timm has no such weights; it has resnet50\.a1_in1k"),
        (["MODEL.TIMM.NAME", "hf-hub:timm/resnet50.a1_in1k"], "is an address; use a name from ti"),
        (["MODEL.TIMM.CHECKPOINT", "nowhere.pth"], "CHECKPOINT nowhere.pth does not exist; save"),
        (
            ["MODEL.TIMM.CHECKPOINT", "x.pth", "MODEL.TIMM.NAME", "tf_efficientnet_lite0"],
            "x.pth does not exist; run python tools/fetch_backbone.py efficientnet_lite0, or save",
        ),
        (
            ["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"],
            "belongs to a backbone of detectron2, not to MODEL.TIMM.NAME convnext_tiny; set",
        ),
        (
            ["MODEL.ROI_HEADS.NAME", "PerClassMaskRes5ROIHeads", *ONE_MAP],
            "contains res5 of detectron2's ResNets, for which convnext_tiny has no weights",
        ),
    ],
)
def test_impossible_initial_weights_of_a_timm_backbone_are_refused(opts, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path, *TIMM, *IMAGENET, *opts)


def test_without_timm_the_error_says_what_to_install(monkeypatch, tmp_path):
    for name in [x for x in sys.modules if x.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)  # makes the import fail
    with pytest.raises(
        ConfigError, match=r"need timm, which is not installed .*: run 'pip install ti"
    ):
        checked(tmp_path, *TIMM)
    checked(tmp_path)


def test_stages_with_pretrained_weights_may_be_frozen(tmp_path, caplog):
    checked(tmp_path, *TIMM, *IMAGENET, "MODEL.BACKBONE.FREEZE_AT", "2")
    assert "random values" not in caplog.text
