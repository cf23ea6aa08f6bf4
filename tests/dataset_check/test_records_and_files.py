"""Image files in other places or of other sizes, Git LFS pointers, and formats of other tools."""

from __future__ import annotations

import json

import pytest
from broken_data import LFS_POINTER, encode, make_good, rectangle
from test_dataset_check import check

from mask_head_plugin.dataset_check.foreign_formats import foreign_json, foreign_text

LONG = "x" * 90


@pytest.fixture
def good(tmp_path):
    return make_good(tmp_path)


def test_a_file_in_a_subfolder_is_reported_with_its_complete_name(good):
    below = good.images / "images"
    below.mkdir()
    good.path(2).rename(below / f"{LONG}.png")
    good.image(2)["file_name"] = f"{LONG}.png"
    (found,) = check(good.write())
    assert (found.kind, found.image_id) == ("image-file-elsewhere", 2)
    assert found.right_value == f"images/{LONG}.png" == found.as_dict()["right_value"]
    assert str(found).count(LONG) == 2


@pytest.mark.parametrize("name", ["missing", "unreadable"])
def test_names_are_never_truncated(good, name):
    good.path(2).rename(good.images / f"{LONG}.txt")
    good.image(2)["file_name"] = f"{LONG}.txt" if name == "unreadable" else f"{LONG}.png"
    (good.images / f"{LONG}.txt").write_text("no image")
    (found,) = check(good.write())
    assert found.kind == f"image-{'file-' * (name == 'missing')}{name}" and LONG in str(found)


def test_a_file_used_by_another_record_is_not_offered_for_a_missing_one(good):
    good.image(2)["file_name"] = "photos/4.png"
    (found,) = check(good.write())
    assert (found.kind, found.right_value) == ("image-file-missing", None)


def test_a_file_in_another_folder_is_suggested_but_not_used(good):
    (good.images / "train").mkdir()
    good.path(2).rename(good.images / "train" / "2.png")
    good.image(2)["file_name"] = "val/2.png"
    (found,) = check(good.write())
    assert (
        found.kind == "image-file-missing"
        and "in the image folder, 'train/2.png' has" in found.message
    )


def test_all_files_with_the_same_name_are_suggested(good):
    for folder in ("a", "b"):
        (good.images / folder).mkdir()
        (good.images / folder / "2.png").write_bytes(good.path(2).read_bytes())
    good.path(2).unlink()
    (found,) = check(good.write())
    assert found.kind == "image-file-missing"
    assert "in the image folder, 'a/2.png', 'b/2.png' have the same name" in found.message


def test_a_file_with_an_absolute_name_outside_the_folder_is_reported(good, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    good.path(2).rename(other / "2.png")
    good.image(2)["file_name"] = str(other / "2.png")
    (found,) = check(good.write())
    assert found.kind == "file-name-outside" and "but such a file exists" in found.message


def wrong_sizes(good):
    for image in good.content["images"]:
        image.update(height=28, width=28)


def test_identical_sizes_are_blamed_if_masks_fit_the_files(good):
    wrong_sizes(good)
    good.content["annotations"].pop()  # the crowd, because run lengths contain the size
    found = check(good.write())
    assert [x.kind for x in found] == ["image-size-alike"] * 4
    assert "is 80 x 60, but the record has 28 x 28, like all records" in str(found[0])


def test_run_lengths_reveal_the_size_of_their_image(good):
    wrong_sizes(good)
    for annotation in good.content["annotations"]:
        annotation.update(segmentation=encode(9, 9, 20, 20), bbox=[9, 9, 11, 11], area=121)
    kinds = {x.kind for x in check(good.write()) if x.severity == "error"}
    assert kinds == {"image-size-alike"}


def test_the_records_are_not_blamed_if_masks_fit_the_small_size(good):
    wrong_sizes(good)
    good.content["annotations"].pop()
    for annotation in good.content["annotations"]:
        annotation.update(segmentation=[rectangle(5, 5, 25, 20)], bbox=[5, 5, 20, 15], area=300)
    assert {x.kind for x in check(good.write()) if x.severity == "error"} == {"image-size-mismatch"}


def test_the_records_are_not_blamed_if_masks_fit_neither_size(good):
    wrong_sizes(good)
    good.content["annotations"].pop()
    for annotation in good.content["annotations"]:
        annotation["segmentation"] = [rectangle(5, 5, 300, 200)]
    assert "image-size-alike" not in {x.kind for x in check(good.write())}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("0 0.5 0.5 0.2 0.3\n1 0.1 0.2 0.3 0.4\n", "with supervision (docs/your_data.md)"),
        ("12 0.51 0.1 0.6 0.2 0.7 0.8 0.6 1e-3\n", "with supervision (docs/your_data.md)"),
        ("# set\npath: ../data\ntrain: images\nnames:\n  0: cat\n", "with supervision"),
        ("nc: 2\nnames: ['a', 'b']\n", "a YAML file"),
        ('<?xml version="1.0"?>\n<annotations><version/>', "CVAT's XML"),
        ("<annotation verified='yes'>\n<folder/>", "with datumaro (docs/your_data.md)"),
        ("<!DOCTYPE html>\n<html>", "a web page"),
        ("filename,file_size,file_attributes\n", "VIA's CSV"),
        ('{"images": [,', ""),
        ("[1, 2,, 3]", ""),
        ("[\nnames: 3", ""),
    ],
)
def test_text_formats_of_other_tools_are_recognised(good, text, what):
    assert (what in foreign_text(text)) if what else foreign_text(text) == ""
    (found,) = check(good.write(text))
    assert (found.kind == "not-a-coco-file") == bool(what)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"hello world", "the file is not JSON: it starts with 'hello world'"),
        (b"cells: [1, 2]\n", "the file is not JSON: it starts with 'cells: [1, 2]'"),
        (b"<data/>", "the file is not JSON: it starts with '<data/>'"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "the file is an image or a video, not annotations"),
        (b"\x89PNG\r\n\x1a\n", "the file is an image or a video, not annotations"),
    ],
)
def test_files_that_are_not_json_are_not_called_truncated(good, content, told):
    (found,) = check(good.write(content))
    assert found.kind == "not-a-coco-file" and found.message == told


DETECTION = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
COCO = {"images": [], "categories": []}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([DETECTION] * 3000, "detections with scores"),
        ({**COCO, "annotations": [DETECTION] * 3000}, "detections with scores"),
        ([ANNOTATION], "a list of annotations"),
        (
            {"version": "5.0", "shapes": [], "imagePath": "a.jpg", "imageData": None},
            "with supervision",
        ),
        ({"a.jpg123": {"filename": "a.jpg", "size": 123, "regions": []}}, "VIA"),
        ({"_via_img_metadata": {}, "_via_settings": {}}, "VIA"),
        ({"info": {}, "items": [], "categories": {}}, "Datumaro's"),
        ({"objects": [], "size": {"height": 1, "width": 1}}, "Supervisely's"),
        ({"imgHeight": 1, "imgWidth": 2, "objects": []}, "Cityscapes'"),
        ({**COCO, "annotations": [{"segments_info": [], "image_id": 1}]}, "panoptic"),
        ({**COCO, "annotations": [{"caption": "a", "image_id": 1, "id": 1}]}, "captions"),
        ([{"id": 1, "data": {"image": "a.jpg"}, "annotations": []}], "Label Studio"),
        ([{"image": "a.jpg", "annotations": []}], "CreateML's"),
        ({**COCO, "annotations": [ANNOTATION]}, ""),
        ({**COCO, "annotations": [{**ANNOTATION, "score": 1, "area": 1, "iscrowd": 0}]}, ""),
        ({}, ""),
        ([], ""),
        (5, ""),
    ],
)
def test_json_formats_of_other_tools_are_recognised_in_one_line(good, content, what):
    assert (what in foreign_json(content)) if what else foreign_json(content) == ""
    if what:
        (found,) = check(good.write(json.dumps(content)))
        assert found.kind == "not-a-coco-file"


def test_an_archive_is_recognised(good):
    (found,) = check(good.write(b"PK\x03\x04" + bytes(range(256))))
    assert found.kind == "not-a-coco-file" and "unpack" in found.message


def test_git_lfs_pointers_are_recognised(good):
    good.path(1).write_text(LFS_POINTER)
    (found,) = check(good)
    assert found.kind == "git-lfs-pointer" and "git lfs pull" in found.fix
    (found,) = check(good.write(LFS_POINTER))
    assert found.kind == "git-lfs-pointer"
