"""Comparisons of LazyConfig models: reading the settings, and building both models."""

from __future__ import annotations

import pytest
import torch
from conftest import CONFIGS
from detectron2.config import LazyConfig, instantiate

from mask_head_plugin import ConfigError
from mask_head_plugin.comparison import compare, twins
from mask_head_plugin.comparison.zoo import find_config

NEW = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ"
SMALL_FILE = f"""
from detectron2.model_zoo import get_config
from made_lazy import shrink
from mask_head_plugin.lazy_config import PARTS

_cfg = get_config("{NEW}.py")
model, dataloader, optimizer, lr_multiplier, train = (_cfg[x] for x in PARTS)
shrink(model)
dataloader.test.dataset.names = "shapes_val"
dataloader.test.mapper.augmentations[0].short_edge_length = 96
"""


@pytest.fixture
def small(tmp_path):
    """Returns the config file of a small model, and a file with its weights."""
    file, weights = tmp_path / "small.py", tmp_path / "small.pth"
    file.write_text(SMALL_FILE)
    model = instantiate(LazyConfig.load(str(file)).model)
    for name, parameter in model.named_parameters():
        if "predictor" in name and "bbox_pred" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"model": model.state_dict()}, weights)
    return file, weights


def test_settings_are_read_from_the_lazy_config():
    cfg = twins.load_model_config(find_config(NEW), [])
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert cfg.DATASETS.TEST == ("coco_2017_val",) and cfg.INPUT.FORMAT == "BGR"
    heads = cfg.MODEL.ROI_HEADS
    assert (heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST, heads.NUM_CLASSES) == (0.05, 0.5, 80)
    assert (cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.MASK_OUTPUT) == (100, "rle")


def test_options_that_a_lazy_model_ignores_are_refused():
    with pytest.raises(ConfigError, match=r"option MODEL.RPN.NMS_THRESH: .*LazyConfig"):
        twins.load_model_config(find_config(NEW), ["MODEL.RPN.NMS_THRESH", "0.6"])


def test_the_two_models_of_a_lazy_config_compare_as_equal(small, tmp_path):
    file, weights = small
    opts = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.001"]
    args = (str(file), str(weights), None, tmp_path / "out", 3, opts, 0.001)
    found = compare.compare_config(*args)
    assert found.verdict == "equal" and found.agreement.confident >= 100
    assert found.agreement.score < 1e-4 and 0 < found.agreement.mask_prob


def test_a_config_that_uses_our_modules_also_gets_a_stock_model(small):
    file, weights = small
    ours = (
        "from mask_head_plugin.lazy_config import use_plugin_modules\nuse_plugin_modules(model)\n"
    )
    file.write_text(file.read_text() + ours)
    cfg = twins.load_model_config(find_config(str(file)), ["MODEL.MASK_OUTPUT", "bitmask"])
    both = twins.load_twins(cfg, weights, str(file))
    assert both.plugin.mask_output == "bitmask"
    for part in ("", "roi_heads.mask_head", "roi_heads.box_pooler", "roi_heads.box_predictor"):
        modules = [type(x.get_submodule(part)).__module__ for x in (both.stock, both.plugin)]
        assert modules[0].startswith("detectron2.") and modules[1].startswith("mask_head_plugin.")
    file.write_text(file.read_text() + "model.roi_heads.mask_pooler.reduction = 'max'\n")
    with pytest.raises(
        ConfigError, match=r"stock model to compare with cannot be built: .*reduction"
    ):
        twins.load_twins(cfg, weights, str(file))


def test_models_without_masks_or_with_other_augmentations_are_refused(small):
    file, _ = small
    text = file.read_text()
    file.write_text(f"{text}model.roi_heads.mask_head = None\n")
    with pytest.raises(ConfigError, match="no MaskRCNNConvUpsampleHead"):
        twins.load_model_config(find_config(str(file)), [])
    file.write_text(f"{text}dataloader.test.mapper.augmentations = []\n")
    with pytest.raises(ConfigError, match="must be a single ResizeShortestEdge"):
        twins.load_model_config(find_config(str(file)), [])


def test_our_copy_of_a_zoo_config_is_compared_with_the_published_figures():
    found = find_config(str(CONFIGS / "lazy" / f"{NEW}.py"))
    assert found.published.model_id == 42047764
    assert twins.load_model_config(found, []).MODEL.MASK_OUTPUT == "rle"
