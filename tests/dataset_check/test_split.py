"""Splits keep photographs together and categories balanced; filters keep the chosen categories."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from mask_head_plugin import ConfigError
from mask_head_plugin.dataset_check.new_files import write_new_files
from mask_head_plugin.dataset_check.photographs import photograph_names, photographs
from mask_head_plugin.dataset_check.split import keep_categories, split
from mask_head_plugin.dataset_check.train_test_overlap import shared_images


def data_set(names, categories=("cat",), folder=None):
    """Returns a file's content with one object per image, in alternating categories."""
    content = {"images": [], "annotations": [], "info": {"year": 2026}}
    content["categories"] = [{"id": 5 * k, "name": x} for k, x in enumerate(categories, start=1)]
    for k, name in enumerate(names):
        content["images"].append({"id": k, "file_name": name})
        category_id = content["categories"][k % len(categories)]["id"]
        content["annotations"].append({"id": k + 1, "image_id": k, "category_id": category_id})
        if folder is not None:
            Image.fromarray(np.full((4, 4, 3), k, np.uint8)).save(folder / name)
    return content


@pytest.mark.parametrize(
    ("one_photograph", "others"),
    [
        (["a_0_0.png", "a_0_512.png"], ["b_0_0.png"]),
        (["a_0_512.png", "a_512_512.png"], []),
        (["a_12_0_512.png", "a_12_512_512.png"], ["a_13_0_512.png"]),
        (["a_2020_0_512.png", "a_2020_512_512.png"], []),
        (["a_0_0.png", "a_0_1.png", "a_1_0.png", "a_1_1.png"], []),
        (["a-00-00.png", "a-00-01.png", "a-01-00.png", "a-01-01.png"], []),
        (["a_0_0_512_512.png", "a_512_0_1024_512.png"], ["b_0_0_512_512.png"]),
        (["x/a_x0_y512.tif", "x/a_x512_y0.tif"], ["y/a_x0_y512.tif"]),
        (["a_r1_c2.png", "a_r2_c7.png"], ["ar1_c2.png"]),
        (["P01__1__0___0.png", "P01__1__824___0.png"], ["P02__1__0___0.png"]),
        (["a_tile_1.jpg", "a_tile2.jpg"], ["b_tile_1.jpg"]),
        (["a_patch3_4.jpg", "a_patch3_5.jpg"], ["b.jpg"]),
        (["x/tile_0_0.png", "x/tile_0_1.png"], ["y/tile_0_0.png"]),
        (["x/image_0_0.png", "x/image_0_64.png"], []),
        ([f"a_jpg.rf.{x * 32}.jpg" for x in "01f"], [f"b_jpg.rf.{'0' * 32}.jpg"]),
        (["a.jpg", f"a_jpg.rf.{'0' * 32}.jpg"], ["b.jpg"]),
        (["a_0_0.png", "a_0_64.png", "a.png"], ["b.png"]),
        (["x\\a_x0_y0.png", "x/a_x0_y9.png"], []),
        ([], [f"scene_{k:02d}_{n:04d}.jpg" for k in (1, 2, 3) for n in (1, 2, 3)]),
        ([], [f"scene_{k}_{n}.jpg" for k in (1, 2, 3) for n in range(1, 40)]),
        ([], ["scene_01_0001.jpg", "scene_02_0002.jpg", "scene_03_0007.jpg"]),
        ([], [f"IMG_{day}_{time}.jpg" for day in (20231005, 20231006) for time in (91500, 180000)]),
        ([], ["IMG_20231005_101112.jpg", "IMG_20231005_101530.jpg", "IMG_20231006_090001.jpg"]),
        ([], [f"cam_2020_{month:02d}_{day:02d}.jpg" for month in (1, 2, 3) for day in (1, 2, 3)]),
        ([], [f"2018-03-12_14-{k:02d}-{second:02d}.png" for k in (5, 6) for second in (30, 31)]),
        ([], ["2018_03_04_14_05.png", "2018_03_04_14_06.png"]),
        ([], ["pexels_1280_720.jpg", "pexels_640_480.jpg"]),
        ([], ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"]),
        ([], ["2007_000032.jpg", "2007_000033.jpg", "1_306_png.jpg", "1_307_png.jpg"]),
        ([], ["IMG_0001.jpg", "IMG_0002.jpg", "000000000139.jpg", "000000000285.jpg"]),
        ([], ["image_0_0.png", "image_0_64.png", "tile_0_0.png", "tile_0_1.png"]),
        ([], [f"roof_tile_{k}.jpg" for k in range(50)]),
    ],
)
def test_tiles_and_versions_of_a_photograph_are_recognised_by_name(one_photograph, others):
    given = [name or k for k, name in enumerate(photograph_names(one_photograph + others))]
    names, of_others = given[: len(one_photograph)], given[len(one_photograph) :]
    assert len(set(names)) == min(1, len(one_photograph)) and 0 not in names
    assert len(set(of_others)) == len(others) and not set(of_others) & set(names)


def test_files_with_identical_content_are_one_photograph(tmp_path):
    data_set(["a.png", "b.png", "c.png"], folder=tmp_path)
    (tmp_path / "d.png").write_bytes((tmp_path / "b.png").read_bytes())
    names = ["a.png", "b.png", "c.png", "d.png", "missing.png"]
    groups = photographs(names, [str(tmp_path / name) for name in names])
    assert groups[1] == groups[3] and len(set(groups)) == 4


def test_no_photograph_is_in_both_parts_of_a_split(tmp_path):
    names = [f"{place}_{k}_0_{k + 99}_99.png" for place in ("bay", "cape") for k in range(10)]
    parts = split(data_set(names), str(tmp_path), 0.5)
    paths = [[(str(tmp_path), str(tmp_path / x["file_name"])) for x in p["images"]] for p in parts]
    assert [len(x) for x in paths] == [10, 10] and shared_images(*paths) == []


def test_a_split_keeps_photographs_together_loses_nothing_and_has_the_requested_size(tmp_path):
    tiles = [f"{k:02d}_{x}_{y}.png" for k in range(40) for x in (0, 64) for y in (0, 64)]
    content = data_set(tiles, ("cat", "dog", "fox"))
    train, val = split(content, str(tmp_path), 0.25, seed=3)
    photographs_of = [{x["file_name"][:2] for x in part["images"]} for part in (train, val)]
    assert not photographs_of[0] & photographs_of[1] and len(val["images"]) == 40
    for section in ("images", "annotations"):
        both = sorted(train[section] + val[section], key=lambda x: x["id"])
        assert both == content[section]
    for part in (train, val):
        ids = {x["id"] for x in part["images"]}
        assert {x["image_id"] for x in part["annotations"]} == ids
        assert part["categories"] == content["categories"] and part["info"] == content["info"]


def test_both_parts_of_a_split_have_all_categories(tmp_path):
    """About 3 in 10 purely random splits would have no foxes in validation."""
    content = data_set([f"{k}.png" for k in range(200)], ("cat", "dog"))
    content["categories"].append({"id": 99, "name": "fox"})
    for annotation in content["annotations"][::50]:
        annotation["category_id"] = 99
    for seed in range(10):
        for part in split(content, str(tmp_path), 0.25, seed):
            assert len({x["category_id"] for x in part["annotations"]}) == 3


def test_the_split_depends_on_the_seed(tmp_path):
    content = data_set([f"{k}.png" for k in range(50)])
    first, same, other = (split(content, str(tmp_path), 0.2, seed) for seed in (1, 1, 2))
    assert first == same and first[1]["images"] != other[1]["images"]


@pytest.mark.parametrize("share", [0, 1, -0.1, 20, float("nan")])
def test_an_invalid_fraction_is_refused(tmp_path, share):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split(data_set(["a.png", "b.png"]), str(tmp_path), share)


def test_a_single_photograph_cannot_be_split(tmp_path):
    names = [f"a_x{x}_y{y}.png" for x in range(3) for y in range(3)]
    with pytest.raises(ConfigError, match="all 9 images belong to one photograph"):
        split(data_set(names), str(tmp_path), 0.2)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_neither_part_is_empty(tmp_path, share):
    assert all(x["images"] for x in split(data_set(["a.png", "b.png"]), str(tmp_path), share))


def test_a_filter_keeps_categories_their_annotations_and_all_images():
    content = data_set([f"{k}.png" for k in range(9)], ("cat", "dog", "fox"))
    kept = keep_categories(content, ["fox", "cat"])
    assert [x["name"] for x in kept["categories"]] == ["cat", "fox"]
    assert [x["id"] for x in kept["annotations"]] == [1, 3, 4, 6, 7, 9]
    assert kept["images"] == content["images"] and kept["info"] == content["info"]
    with pytest.raises(ConfigError, match="no category 'foxx'; did you mean 'fox'"):
        keep_categories(content, ["foxx"])


@pytest.mark.parametrize("name", ["file/parts.json", f"{'n' * 300}.json"])
def test_the_error_names_a_path_that_cannot_be_written_and_nothing_is_left(tmp_path, name):
    (tmp_path / "file").touch()
    paths = [tmp_path / "first.json", tmp_path / name]
    with pytest.raises(ConfigError, match=f"--write: {paths[1]} cannot be written"):
        write_new_files(dict.fromkeys(paths, "{}"), "--write")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_a_file_created_meanwhile_by_another_process_is_kept(tmp_path, monkeypatch):
    path, fsync = tmp_path / "parts.json", os.fsync

    def make_meanwhile(descriptor):
        path.write_text("theirs")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", make_meanwhile)
    with pytest.raises(ConfigError, match=f"--write: {path} cannot be written: File exists"):
        write_new_files({path: "ours"}, "--write")
    assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]
