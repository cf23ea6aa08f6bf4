"""The table of published model zoo results, and the lookup of configs and weights."""

from __future__ import annotations

import shutil
import urllib.error
from pathlib import Path

import iopath.common.download
import pytest
from conftest import CHECKPOINT, CONFIGS
from detectron2 import model_zoo
from detectron2.model_zoo.model_zoo import _ModelZooUrls

from mask_head_plugin import ConfigError
from mask_head_plugin.comparison.zoo import ZOO_MODELS, find_config, find_weights

R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
R50_FILE, R50_ID = "model_final_f10217.pkl", "137849600"
NEW = "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ"
URLS = _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX


@pytest.mark.parametrize("model", ZOO_MODELS, ids=lambda x: x.config)
def test_every_row_matches_a_config_and_a_model_of_the_zoo(model):
    assert Path(find_config(model.config).file).is_file()
    assert URLS[model.config].startswith(f"{model.model_id}/")
    assert model.source.endswith("detectron2/blob/main/MODEL_ZOO.md")
    if model.config.startswith("new_baselines/"):
        assert model.train_seconds is model.train_gigabytes is None
        assert 0 < model.inference_seconds < 0.1
    else:
        assert 0 < model.inference_seconds < model.train_seconds < 1 < model.train_gigabytes
    assert model.box_ap is None or abs(model.box_ap - model.mask_ap) < 7


def test_the_table_contains_every_mask_baseline_of_coco_and_lvis():
    listed = {x.config for x in ZOO_MODELS}
    folders = ("COCO-InstanceSegmentation/", "LVISv0.5-InstanceSegmentation/", "new_baselines/")
    assert {x for x in URLS if x.startswith(folders)} <= listed
    assert len(listed) == len(ZOO_MODELS) == 27


def test_the_published_ap_of_r50_fpn_3x():
    published = find_config(f"{R50}.yaml").published
    assert (published.box_ap, published.mask_ap, published.model_id) == (41.0, 37.2, int(R50_ID))


@pytest.mark.parametrize("name", [R50, f"{R50}.yaml"])
def test_a_config_is_found_by_its_name_in_the_zoo(name):
    found = find_config(name)
    assert found.zoo_name == R50 and found.is_zoo_file and Path(found.file).is_file()


@pytest.mark.parametrize("name", [NEW, f"{NEW}.py"])
def test_a_lazy_config_is_found_by_its_name_in_the_zoo(name):
    found = find_config(name)
    assert found.zoo_name == NEW and found.is_zoo_file and found.is_lazy
    assert Path(found.file).is_file() and found.published.mask_ap == 43.7


def test_the_file_ending_decides_between_yaml_and_lazy_configs():
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
    assert [find_config(name + x).is_lazy for x in ("", ".yaml", ".py")] == [False, False, True]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("coco/mask_rcnn_R_50_FPN_3x.yaml", R50),
        (
            "lvis/v0.5_mask_rcnn_R_50_FPN_1x.yaml",
            "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
        ),
        ("lvis/v1_mask_rcnn_R_50_FPN_1x.yaml", None),
        ("cityscapes/mask_rcnn_R_50_FPN.yaml", "Cityscapes/mask_rcnn_R_50_FPN"),
        ("misc/mask_rcnn_R_50_FPN_3x_gn.yaml", "Misc/mask_rcnn_R_50_FPN_3x_gn"),
        ("misc/mask_rcnn_R_50_FPN_1x_stock_roi_heads.yaml", None),
        ("shapes/mask_rcnn_shapes.yaml", None),
        ("lazy/new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py", NEW),
        ("lazy/mask_rcnn_R_50_C4_1x.py", "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x"),
        ("lazy/cascade_mask_rcnn_R_50_FPN_1x.py", None),
        ("lazy/vitdet/COCO/mask_rcnn_vitdet_b_100ep.py", None),
    ],
)
def test_our_configs_are_matched_with_their_counterparts_in_the_zoo(file, name):
    found = find_config(str(CONFIGS / file))
    assert found.zoo_name == name and not found.is_zoo_file


def test_an_unknown_config_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=f"mask_rcnn_R_5_.*did you mean {R50}.yaml"):
        find_config("COCO-InstanceSegmentation/mask_rcnn_R_5_FPN_3x.yaml")
    with pytest.raises(ConfigError, match=f"did you mean {NEW}.py"):
        find_config(NEW.replace("101", "11"))


@pytest.mark.parametrize(
    "name",
    [
        R50_FILE,
        f"{R50_ID}/{R50_FILE}",
        f"{R50}/{R50_ID}/{R50_FILE}",
        f"{R50_ID}.pkl",
        f"{R50_ID}.safetensors",
    ],
)
def test_weights_in_a_folder_are_found_by_zoo_name_or_model_id(tmp_path, name):
    (tmp_path / "137260431.pkl").touch()  # weights of another model
    with pytest.raises(ConfigError, match=f"one of {R50_FILE}, .*{R50_ID}.pth"):
        find_weights(str(tmp_path), find_config(R50))
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert find_weights(str(tmp_path), find_config(R50)) == path


def test_a_weights_file_is_used_directly_and_a_missing_one_is_refused():
    assert find_weights(str(CHECKPOINT), find_config(R50)) == CHECKPOINT
    with pytest.raises(ConfigError, match=r"no/such.pkl does not exist"):
        find_weights("no/such.pkl", find_config(R50))


def test_weights_are_downloaded_once_from_the_zoos_url(tmp_path, monkeypatch):
    urls = []

    def download(url, filename, reporthook):
        urls.append(url)
        shutil.copy(CHECKPOINT, filename)
        return filename, None

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(iopath.common.download.request, "urlretrieve", download)
    config = find_config("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x")
    paths = [find_weights("zoo", config) for _ in range(2)]
    assert urls == [model_zoo.get_checkpoint_url(f"{config.zoo_name}.yaml")]
    assert paths[0] == paths[1] and paths[0].read_bytes() == CHECKPOINT.read_bytes()
    assert paths[0].is_relative_to(tmp_path)


def test_without_network_the_error_gives_the_url_and_explains_how_to_use_a_local_file(
    tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(iopath.common.download.request, "urlretrieve", fail)
    with pytest.raises(ConfigError) as error:
        find_weights("zoo", find_config(R50))
    message = str(error.value)
    assert f"https://dl.fbaipublicfiles.com/detectron2/{R50}/{R50_ID}/{R50_FILE}" in message
    assert "no network" in message and f"fetch {R50_FILE}" in message
    assert "--weights PATH" in message and "\n" not in message


def test_a_config_without_zoo_weights_is_refused_with_advice():
    with pytest.raises(ConfigError, match=r"no weights for .*shapes.yaml; give --weights"):
        find_weights("zoo", find_config(str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")))
