"""LazyConfig files differ from detectron2's only in the plugin's modules, and results agree."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, relative_error
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from made_lazy import shrink
from made_training import assert_same_losses_and_gradients, make_batch
from omegaconf import OmegaConf

from mask_head_plugin import ConfigError
from mask_head_plugin.image_file_mapper import ImageFileMapper
from mask_head_plugin.lazy_config import (
    PLUGIN_TARGETS,
    counterpart,
    find_stock_config,
    use_plugin_modules,
)

LAZY = CONFIGS / "lazy"
ZOO = Path(model_zoo.__file__).parent / "configs"
VITDET = "projects/ViTDet/configs"
STOCK_TARGETS = {plugin: stock for stock, plugin in PLUGIN_TARGETS.items()}


def stock_name(path: Path) -> str | None:
    """Returns the name of the config in detectron2 that corresponds to one of our files, if any."""
    folder = path.parent.relative_to(LAZY)
    if folder.parts[:1] == ("vitdet",):
        return f"{VITDET}/{folder.relative_to('vitdet')}/{path.name}"
    folders = (
        (folder,) if folder.parts else ("COCO-InstanceSegmentation", "COCO-PanopticSegmentation")
    )
    return next((f"{x}/{path.name}" for x in folders if (ZOO / x / path.name).is_file()), None)


COUNTERPARTS = [path for path in sorted(LAZY.rglob("*.py")) if stock_name(path)]


def load_both(path: Path):
    """Returns detectron2's config and ours. Skips the test if detectron2's config is missing."""
    try:
        stock = LazyConfig.load(str(find_stock_config(stock_name(path))))
    except ConfigError as error:
        pytest.skip(str(error))
    return stock, LazyConfig.load(str(path))


def flat(node, prefix=""):
    """Returns the values of a nested config by dotted path."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for key, value in items for k, v in flat(value, f"{prefix}.{key}").items()}
    if isinstance(node, functools.partial):
        return {prefix: (node.func, node.args, node.keywords)}
    # Each load creates new functions from the same code.
    return {prefix: getattr(node, "__code__", node)}


def content(cfg):
    parts = {
        key: cfg[key] for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train")
    }
    root = OmegaConf.create(parts, flags={"allow_objects": True})
    return flat(OmegaConf.to_container(root, resolve=True))


@pytest.mark.parametrize(
    "path", COUNTERPARTS, ids=lambda p: str(p.relative_to(LAZY).with_suffix(""))
)
def test_a_counterpart_differs_only_in_the_plugins_modules(path):
    stock, ours = map(content, load_both(path))
    assert ours.keys() == stock.keys()
    differing = {key for key, value in stock.items() if ours[key] != value}
    assert {key.rpartition(".")[2] for key in differing} == {"_target_"}
    mappers = {f".dataloader.{x}.mapper._target_" for x in ("train", "test")}
    assert {ours[key] for key in mappers} == {ImageFileMapper}
    differing -= mappers
    for key in differing:
        assert STOCK_TARGETS[ours[key]] is stock[key]
    expected = {".model.roi_heads.mask_head._target_"}
    if "panoptic" not in path.stem:
        expected.add(".model._target_")
    assert expected <= differing and len(differing) >= 3


def test_every_lazy_config_of_the_zoo_has_a_counterpart():
    zoo = [*ZOO.glob("COCO-InstanceSegmentation/*.py"), *ZOO.glob("new_baselines/*.py")]
    assert {stock_name(path) for path in COUNTERPARTS} >= {str(x.relative_to(ZOO)) for x in zoo}
    assert len(zoo) == 17


def test_every_vitdet_config_has_a_counterpart():
    try:
        source = find_stock_config(f"{VITDET}/common/coco_loader_lsj.py").parents[1]
    except ConfigError as error:
        pytest.skip(str(error))
    files = {x.relative_to(source) for x in source.rglob("*mask_rcnn*.py")}
    assert {x.relative_to(LAZY / "vitdet") for x in LAZY.rglob("vitdet/*/*.py")} == files


def test_a_config_in_detectron2s_source_tree_is_found(tmp_path, monkeypatch):
    name = f"{VITDET}/COCO/mask_rcnn_vitdet_b_100ep.py"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(
        "from detectron2 import model_zoo\n"
        "model = model_zoo.get_config('common/models/mask_rcnn_vitdet.py').model\n"
        "dataloader = optimizer = lr_multiplier = train = dict()\n"
    )
    monkeypatch.setenv("DETECTRON2_SOURCE", str(tmp_path))
    cfg = LazyConfig.load(str(LAZY / "vitdet" / "COCO" / Path(name).name))
    assert cfg.model.roi_heads.mask_head._target_ in STOCK_TARGETS
    monkeypatch.setenv("DETECTRON2_SOURCE", str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=rf"other/{name} does not exist.*set DETECTRON2_SOURCE"):
        counterpart(name)


def test_the_error_names_a_config_that_this_detectron2_lacks():
    with pytest.raises(ConfigError, match=r"has no config new_baselines/mask_rcnn_R_5\.py"):
        counterpart("new_baselines/mask_rcnn_R_5.py")


def test_a_model_without_a_mask_head_is_refused():
    retinanet = model_zoo.get_config("common/models/retinanet.py").model
    with pytest.raises(ConfigError, match="no MaskRCNNConvUpsampleHead"):
        use_plugin_modules(retinanet)


def test_modules_are_replaced_only_once_and_also_if_given_by_name():
    model = model_zoo.get_config("common/models/cascade_rcnn.py").model
    model.roi_heads.mask_head._target_ = (
        "detectron2.modeling.roi_heads.mask_head.MaskRCNNConvUpsampleHead"
    )
    once = flat(OmegaConf.to_container(use_plugin_modules(model)))
    assert flat(OmegaConf.to_container(use_plugin_modules(model))) == once
    # Class-agnostic boxes have no rows to select, and the cascade keeps detectron2's ROI heads.
    changed = {key for key, value in once.items() if value in STOCK_TARGETS}
    heads = "roi_heads.mask_head", "roi_heads.mask_pooler", "roi_heads.box_pooler"
    assert changed == {"._target_", *(f".{x}._target_" for x in heads)}


FAMILIES = {
    "R50-FPN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    "R50-C4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py",
    "cascade": "common/models/cascade_rcnn.py",
    "new baseline": "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py",
    "panoptic": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py",
    "RegNetY": "new_baselines/mask_rcnn_regnety_4gf_dds_FPN_200ep_LSJ.py",
    "ViTDet": "common/models/mask_rcnn_vitdet.py",
}


def twins(name: str):
    """Returns the plugin's model and the stock model of a shrunk LazyConfig, with equal weights."""
    models = []
    for change in (use_plugin_modules, lambda model: model):
        cfg = LazyConfig.load(str(ZOO / name)).model
        shrink(cfg)
        torch.manual_seed(3)
        models.append(instantiate(change(cfg)))
    plugin, stock = models
    assert list(plugin.state_dict()) == list(stock.state_dict())
    # detectron2 initialises the predictors near zero. Larger weights lead to distinct masks and
    # scores. Box predictors keep their weights; otherwise, a cascade would move the boxes out of
    # the image.
    with torch.no_grad():
        for parameter_name, parameter in plugin.named_parameters():
            if "predictor" in parameter_name and "bbox_pred" not in parameter_name:
                parameter.normal_(std=0.1)
    stock.load_state_dict(plugin.state_dict(), strict=True)
    return plugin, stock


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_gradients_and_detections_equal_stock(family):
    if family == "ViTDet":
        pytest.importorskip("timm")  # detectron2's ViT imports it
    plugin, stock = twins(FAMILIES[family])
    batch = make_batch(sem_seg_classes=54 if family == "panoptic" else 0)
    assert_same_losses_and_gradients(plugin, stock, batch)
    found, expected = detections(plugin, batch), detections(stock, batch)
    assert sum(map(len, expected)) > 20
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pred_classes.tolist() == theirs.pred_classes.tolist()
        assert relative_error(ours.scores, theirs.scores) <= 1e-5
        assert relative_error(ours.pred_boxes.tensor, theirs.pred_boxes.tensor) <= 1e-5
        differing = np.asarray(ours.pred_masks) != np.asarray(theirs.pred_masks)
        assert differing.mean() < 1e-3


@torch.no_grad()
def detections(model, batch):
    outputs = model.eval()([{**x, "height": 64, "width": 80} for x in batch])
    return [x["instances"] for x in outputs]
