"""A stock model and a plugin model built from the same config and weights."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, STOCK_NAMES
from detectron2.data import DatasetCatalog, DatasetMapper
from safetensors.numpy import load_file

from mask_head_plugin import ConfigError
from mask_head_plugin.comparison import timed_model, twins
from mask_head_plugin.comparison.zoo import find_config
from mask_head_plugin.machine import peak_megabytes

CONFIG = str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")


def load_cfg(config=CONFIG, *opts, folder="output"):
    cfg = twins.load_model_config(find_config(config), ["MODEL.DEVICE", "cpu", *opts])
    cfg.OUTPUT_DIR = str(folder)
    return cfg


def names(cfg):
    model = cfg.MODEL
    return model.META_ARCHITECTURE, model.ROI_HEADS.NAME, model.ROI_MASK_HEAD.NAME


def write_weights(path, change):
    """Writes the checkpoint in the zoo's format after `change` has edited its weights."""
    weights = {name: x.astype(np.float32) for name, x in load_file(CHECKPOINT).items()}
    change(weights)
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}))
    return path


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
            ("PerClassMaskROIHeads", "StandardROIHeads"),
        ),
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x",
            ("PerClassMaskRes5ROIHeads", "Res5ROIHeads"),
        ),
        (
            str(CONFIGS / "coco" / "mask_rcnn_R_50_FPN_3x.yaml"),
            ("PerClassMaskROIHeads", "StandardROIHeads"),
        ),
    ],
)
def test_the_two_configs_differ_only_in_the_swapped_names(config, heads, tmp_path):
    stock, plugin = twins.twin_configs(load_cfg(config, folder=tmp_path))
    assert names(plugin) == ("MaskRCNN", heads[0], "FCNMaskHead")
    assert names(stock) == ("GeneralizedRCNN", heads[1], "MaskRCNNConvUpsampleHead")
    assert (plugin.MODEL.MASK_OUTPUT, stock.MODEL.MASK_OUTPUT) == ("rle", "bitmask")
    for cfg in (stock, plugin):
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.ROI_HEADS.NAME = cfg.MODEL.ROI_MASK_HEAD.NAME = ""
        cfg.MODEL.MASK_OUTPUT = ""
    assert stock == plugin


def test_stock_names_match_those_that_the_other_tests_swap():
    assert twins.STOCK_NAMES == STOCK_NAMES


def test_a_mask_output_option_overrides_the_default_for_zoo_configs(tmp_path):
    zoo = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
    cfg = load_cfg(zoo, "MODEL.MASK_OUTPUT", "bitmask", folder=tmp_path)
    assert twins.twin_configs(cfg)[1].MODEL.MASK_OUTPUT == "bitmask"


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.ROI_MASK_HEAD.NAME", "MLPMaskHead"),
        ("MODEL.ROI_MASK_HEAD.SCORING.ENABLED", "True"),
        ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "PrROIPool"),
        ("MODEL.ROI_BOX_HEAD.POOLER_REDUCTION", "max"),
        ("MODEL.ROI_MASK_HEAD.LOSSES", "[['softmax_cross_entropy', 1.0]]"),
    ],
    ids=lambda opts: opts[1],
)
def test_settings_that_detectron2_lacks_are_refused(opts, tmp_path):
    with pytest.raises(ConfigError, match=r"counterpart|the stock model"):
        twins.twin_configs(load_cfg(CONFIG, *opts, folder=tmp_path))


def test_losses_that_do_not_affect_inference_are_accepted(tmp_path):
    losses = ("MODEL.ROI_MASK_HEAD.LOSSES", "[['dice', 1.0]]")
    twins.twin_configs(load_cfg(CONFIG, *losses, folder=tmp_path))


def test_a_config_without_masks_is_refused():
    with pytest.raises(ConfigError, match="MASK_ON is False"):
        load_cfg("COCO-Detection/faster_rcnn_R_50_FPN_1x")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return twins.load_twins(load_cfg(folder=tmp_path_factory.mktemp("twins")), CHECKPOINT)


def test_both_models_load_every_weight_of_the_file(loaded):
    weights = load_file(CHECKPOINT)
    assert loaded.num_tensors == len(weights)
    assert loaded.num_values == sum(x.size for x in weights.values())
    for model in (loaded.stock, loaded.plugin):
        assert not model.training
        for name, value in model.state_dict().items():
            assert np.array_equal(value.numpy(), weights[name].astype(np.float32))
    assert type(loaded.stock).__module__.startswith("detectron2.")
    assert type(loaded.stock.roi_heads).__module__.startswith("detectron2.")
    assert type(loaded.plugin.roi_heads.mask_head).__module__.startswith("mask_head_plugin.")


def test_weights_from_a_zoo_pickle_are_identical(loaded, tmp_path):
    path = write_weights(tmp_path / "zoo.pkl", lambda weights: None)
    again = twins.load_twins(load_cfg(folder=tmp_path), path)
    for name, value in loaded.plugin.state_dict().items():
        assert torch.equal(again.plugin.state_dict()[name], value)


PREDICTOR = "roi_heads.mask_head.predictor"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{PREDICTOR}.bias"), rf"1 missing: {PREDICTOR}.bias; "),
        (lambda w: w.update({"a.b": np.zeros(2)}), r"1 not in the model: a\.b; "),
        (
            lambda w: w.update({f"{PREDICTOR}.bias": np.zeros(7)}),
            rf"1 of another shape: {PREDICTOR}.bias is \(7,\) in the file and \(5,\) in ",
        ),
        (
            lambda w: [w.pop(x) for x in list(w) if x.endswith(("fc1.weight", "norm.bias"))],
            r"21 missing: .*fpn_lateral2 .*; use weights trained with this config$",
        ),
    ],
)
def test_weights_that_do_not_fit_exactly_are_listed(change, message, loaded, tmp_path):
    path = write_weights(tmp_path / "zoo.pkl", change)
    with pytest.raises(ConfigError, match=message):
        twins.load_exactly(loaded.plugin, path, loaded.cfg)


class Code:
    def __reduce__(self):
        return print, ("code of the pickle ran",)


def test_pickles_with_code_or_without_weights_are_refused(loaded, tmp_path, capsys):
    path = write_weights(tmp_path / "code.pkl", lambda weights: weights.update(x=Code()))
    other = tmp_path / "list.pkl"
    other.write_bytes(pickle.dumps([1, 2]))
    for file in (path, other):
        with pytest.raises(ConfigError, match=f"--weights: {file}"):
            twins.load_exactly(loaded.plugin, file, loaded.cfg)
    assert "code of the pickle ran" not in capsys.readouterr().out


def test_timing_changes_no_result_and_leaves_no_hook(loaded):
    x = DatasetMapper(loaded.cfg, is_train=False)(DatasetCatalog.get("shapes_val")[0])
    for model in (loaded.stock, loaded.plugin):
        watched = timed_model.TimedModel(model)
        instances, found = watched.detect(x)
        with torch.no_grad():
            expected = model([x])[0]["instances"]
            raw = model.inference([x], do_postprocess=False)[0]
        assert len(found) == len(expected) > 0
        assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert np.array_equal(np.asarray(found.masks), np.asarray(expected.pred_masks))
        assert torch.equal(found.mask_probs, raw.pred_masks[:, 0])
        assert 0 < watched.network_seconds[0] < watched.seconds[0]
        assert not model.roi_heads._forward_hooks


def test_peak_memory_counts_only_tensors_alive_at_the_same_time():
    def step():
        for _ in range(3):
            torch.zeros(1_000_000)

    assert peak_megabytes(step, "cpu") == pytest.approx(4, rel=0.01)
