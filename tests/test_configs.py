"""Configs of the model zoo and their counterparts here differ only in the plugin's keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CONFIG_FILES, CONFIGS, STOCK_NAMES
from detectron2 import model_zoo
from detectron2.config import get_cfg

from mask_head_plugin import add_mask_head_config
from mask_head_plugin.config import flatten

ZOO = Path(model_zoo.__file__).parent / "configs"
# Maps a folder of the zoo to our folder and the prefix of our file names.
FOLDERS = {
    "COCO-InstanceSegmentation": ("coco", ""),
    "LVISv0.5-InstanceSegmentation": ("lvis", "v0.5_"),
    "LVISv1-InstanceSegmentation": ("lvis", "v1_"),
    "Cityscapes": ("cityscapes", ""),
    "Misc": ("misc", ""),
    "Detectron1-Comparisons": ("detectron1_comparisons", ""),
}
PLUGIN_KEYS = {"MODEL.META_ARCHITECTURE", "MODEL.ROI_HEADS.NAME", "MODEL.ROI_MASK_HEAD.NAME"}


def merged(path: Path, *, plugin: bool) -> dict[str, object]:
    cfg = get_cfg()
    if plugin:
        add_mask_head_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)
    return flatten(cfg)


def zoo_files() -> list[Path]:
    files = [p for folder in FOLDERS for p in sorted((ZOO / folder).glob("*mask_rcnn*.yaml"))]
    files.append(ZOO / "COCO-PanopticSegmentation" / "panoptic_fpn_R_50_1x.yaml")
    return [p for p in files if "dconv" not in p.name]


def counterpart(zoo_file: Path) -> Path:
    folder, prefix = {**FOLDERS, "COCO-PanopticSegmentation": ("panoptic", "")}[
        zoo_file.parent.name
    ]
    return CONFIGS / folder / (prefix + zoo_file.name)


@pytest.mark.parametrize("zoo_file", zoo_files(), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_counterpart_differs_only_in_the_plugins_keys(zoo_file):
    ours, zoo = merged(counterpart(zoo_file), plugin=True), merged(zoo_file, plugin=False)
    differing = {key for key, value in zoo.items() if ours[key] != value}
    assert differing <= PLUGIN_KEYS
    for key in differing:
        assert STOCK_NAMES[str(ours[key])] == zoo[key]
    assert ours["MODEL.ROI_MASK_HEAD.NAME"] == "FCNMaskHead"
    new_keys = flatten_new_keys()
    assert set(ours) - set(zoo) == new_keys


def flatten_new_keys() -> set[str]:
    plugin = get_cfg()
    add_mask_head_config(plugin)
    return set(flatten(plugin)) - set(flatten(get_cfg()))


def test_every_mask_config_of_the_zoo_has_a_counterpart():
    assert len(zoo_files()) == 28
    assert len([p for p in zoo_files() if p.parent.name == "COCO-InstanceSegmentation"]) == 11


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_every_config_merges_and_states_its_version(path):
    assert merged(path, plugin=True)["VERSION"] == 2


def test_plugin_defaults_do_not_change_a_stock_config():
    stock, plugin = get_cfg(), get_cfg()
    add_mask_head_config(plugin)
    both = flatten(plugin)
    assert all(both[key] == value for key, value in flatten(stock).items())
