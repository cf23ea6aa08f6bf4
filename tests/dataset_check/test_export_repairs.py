"""Faults of a whole export are repaired if exactly one repair is correct, and refused otherwise."""

from __future__ import annotations

import copy

import pycocotools.mask as mask_util
import pytest
from broken_data import HW, encode, make_good, many_objects, rectangle
from PIL import Image
from test_corrected_copy import fix
from test_dataset_check import check

from mask_head_plugin import ConfigError
from mask_head_plugin.dataset_check.findings import errors_of

BOXES = [[5.0 + k, 5.0 + k, 20.0, 20.0] for k in range(12)]


@pytest.fixture
def good(tmp_path):
    return make_good(tmp_path)


@pytest.fixture
def many(good):
    """Returns a data set with twelve objects of the same size on a diagonal."""
    many_objects(good)
    return good


def add_images(data, count):
    """Adds images to the data set, each with one object."""
    for i in range(100, 100 + count):
        Image.new("RGB", HW[::-1], (i, 0, 0)).save(data.images / f"{i}.png")
        data.content["images"].append(
            {"id": i, "file_name": f"{i}.png", "height": HW[0], "width": HW[1]}
        )
        annotation = {**copy.deepcopy(data.annotation(11)), "id": i, "image_id": i}
        data.content["annotations"].append(annotation)
    return data


def masks(content):
    return [x["segmentation"] for x in content["annotations"]]


@pytest.mark.parametrize("key", ["image_id", "category_id"])
@pytest.mark.parametrize("as_text", [str, float])
def test_references_of_another_type_become_matching_numbers(many, key, as_text):
    many.image(1)["id"] = 0  # VIA counts from 0
    for annotation in many.content["annotations"]:
        annotation["image_id"] = 0
    expected = copy.deepcopy(many.content)
    for annotation in many.content["annotations"]:
        annotation[key] = as_text(annotation[key])
    fixed, _ = fix(many.write())
    assert fixed.content == expected


def test_image_ids_as_text_become_the_numbers_used_by_annotations(many):
    many.image(1)["id"] = "0"
    for annotation in many.content["annotations"]:
        annotation["image_id"] = 0
    fixed, _ = fix(many.write())
    assert fixed.content["images"][0]["id"] == 0 and len(fixed.content["annotations"]) == 12


def as_corners(box, mask_box):
    x, y, width, height = mask_box
    return [x, y, x + width, y + height]


def as_loose_corners(box, mask_box):
    x, y, width, height = mask_box
    return [x - 2, y - 1, x + width + 2, y + height + 1]


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (as_corners, BOXES),
        # The repair keeps the boxes as loose as they were drawn.
        (as_loose_corners, [[x - 2, y - 1, 24, 22] for x, y, _, _ in BOXES]),
        (lambda box, _: [box[0] + 10, box[1] + 10, 20, 20], BOXES),  # given by their centre
        (lambda box, _: [0, 0, 80, 60], BOXES),
        (lambda box, _: [box[0], box[1], -20, -20], BOXES),
        (lambda box, _: [2 * x for x in box], BOXES),  # drawn on an image of twice the size
        (lambda box, _: [x / 80 for x in box], BOXES),
    ],
    ids=["corners", "loose-corners", "centre", "image", "negative", "doubled", "shares"],
)
@pytest.mark.parametrize("run_lengths", [False, True])
def test_boxes_that_are_all_wrong_are_repaired(many, write, expected, run_lengths):
    for annotation, box in zip(many.content["annotations"], BOXES, strict=True):
        x0, y0, x1, y1 = (int(x) for x in as_corners(None, box))
        annotation["bbox"] = write(box, box)
        if run_lengths:
            annotation["segmentation"] = encode(x0, y0, x1, y1)
    before = copy.deepcopy(many.content)
    fixed, changes = fix(many.write())
    assert [x["bbox"] for x in fixed.content["annotations"]] == expected
    assert masks(fixed.content) == masks(before)
    assert len({x.annotation_id for x in changes if x.section == "annotations"}) == 12
    assert errors_of(check(fixed)) == []


def test_corners_are_recognised_from_a_few_clear_boxes(many):
    """For a box near the image's origin, corners and [x, y, width, height] are almost equal."""
    for annotation, box in zip(many.content["annotations"], BOXES, strict=True):
        annotation["bbox"] = as_corners(None, box)
    for annotation in many.content["annotations"][:5]:
        annotation.update(bbox=[1, 1, 31, 31], segmentation=[rectangle(1, 1, 31, 31)])
    fixed, _ = fix(many.write())
    assert [x["bbox"] for x in fixed.content["annotations"][:5]] == [[1, 1, 30, 30]] * 5


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        (lambda polygon: [x for k in range(0, 8, 2) for x in polygon[k : k + 2][::-1]], "x and y"),
        (lambda polygon: [x / 2 for x in polygon], "another scale"),
    ],
    ids=["exchanged", "halved"],
)
def test_boxes_are_not_refitted_if_the_masks_may_be_wrong(many, change, doubt):
    for k, annotation in enumerate(many.content["annotations"]):
        polygon = rectangle(10 + k, 20 + 2 * k, 30 + k, 30 + 2 * k)
        annotation["bbox"] = [10 + k, 20 + 2 * k, 20, 10]
        annotation["area"] = 200
        annotation["segmentation"] = [change(polygon)]
    with pytest.raises(ConfigError, match=f"{doubt}.*add --accept box-mismatch if"):
        fix(many.write())
    assert not (many.folder / "fixed.json").exists()
    fixed, _ = fix(many, accepted=["box-mismatch"])
    assert masks(fixed.content) == masks(many.content)


@pytest.mark.parametrize("other_change", ["none", "id", "not-object", "size", "merge"])
def test_other_repairs_do_not_permit_the_loss_of_most_images(good, other_change):
    add_images(good, 36)
    for image in good.content["images"][:-1]:
        (good.images / image["file_name"]).write_bytes(b"<html>")
    if other_change == "id":
        good.annotation(11)["id"] = "eleven"
    elif other_change == "not-object":
        good.content["images"].append(None)
    elif other_change == "size":
        good.content["images"][-1]["height"] = "60"
    elif other_change == "merge":
        good.content["images"].append({**good.content["images"][-1], "id": 999})
    with pytest.raises(ConfigError) as info:
        fix(good.write())
    message = str(info.value)
    assert "39 of 4" in message and "39 for image-unreadable" in message and "\n" not in message
    assert (
        "not an image that Pillow can read" in message and not (good.folder / "fixed.json").exists()
    )


def test_losing_most_records_is_possible_if_the_user_accepts_it(good):
    add_images(good, 36)
    for image in good.content["images"][:-1]:
        (good.images / image["file_name"]).write_bytes(b"")
    fixed, changes = fix(good.write(), accepted=["image-file-empty"])
    assert [x["id"] for x in fixed.content["images"]] == [135]
    assert sum(x.action == "left out" for x in changes) == 39 + 41


def test_faults_that_appear_only_after_a_repair_are_also_refused(many):
    """Masks of an image without a size are checked only after the size is repaired."""
    del many.image(1)["height"]
    for annotation in many.content["annotations"]:
        annotation["segmentation"][0][0] -= 300
    with pytest.raises(ConfigError, match="12 masks have other faults"):
        fix(many.write())


def test_a_refusal_names_the_records_that_would_be_left_out(good):
    for image in good.content["images"]:
        (good.images / image["file_name"]).unlink()
    with pytest.raises(ConfigError) as info:
        fix(good)
    assert "4 of 4 images would be left out" in str(info.value)
    assert "image-file-missing" in str(info.value)


def test_crowds_become_objects_only_on_request(many):
    for annotation, box in zip(many.content["annotations"], BOXES, strict=True):
        x0, y0, x1, y1 = (int(x) for x in as_corners(None, box))
        annotation.update(iscrowd=1, segmentation=encode(x0, y0, x1, y1))
    many.content["annotations"][0]["iscrowd"] = 0
    before = copy.deepcopy(many.write().content)
    fixed, changes = fix(many, crowds_are_objects=True)
    assert [x["iscrowd"] for x in fixed.content["annotations"]] == [0] * 12
    assert masks(fixed.content) == masks(before)
    assert [x.index for x in changes] == list(range(1, 12))


def test_areas_of_boxes_are_replaced_with_areas_of_masks(many):
    triangles = [[x, y, x + 20, y, x, y + 20] for x, y, _, _ in BOXES]
    for annotation, triangle in zip(many.content["annotations"], triangles, strict=True):
        annotation["segmentation"] = [triangle]
    before = copy.deepcopy(many.write().content)
    fixed, changes = fix(many)
    pixels = [mask_util.area(mask_util.frPyObjects([x], *HW)[0]) for x in triangles]
    assert [x["area"] for x in fixed.content["annotations"]] == pixels
    assert masks(fixed.content) == masks(before)
    assert {x.kind for x in changes} == {"area-of-box"} and len(changes) == 12
    assert "area-of-box" not in {x.kind for x in check(fixed)}


def test_names_of_files_in_other_places_are_corrected(good):
    for image in good.content["images"]:
        image["file_name"] = "D:\\photos\\" + image["file_name"].upper()
    fixed, _ = fix(good.write())
    assert [x["file_name"] for x in fixed.content["images"]] == ["1.jpg", "2.png", "3.jpg", "4.png"]
    assert len(fixed.content["annotations"]) == 6


def test_identical_wrong_sizes_are_replaced_with_the_files_sizes(good):
    for image in good.content["images"]:
        image.update(height=8, width=8)
    before = copy.deepcopy(good.write().content)
    fixed, _ = fix(good)
    assert {(x["height"], x["width"]) for x in fixed.content["images"]} == {HW}
    assert fixed.content["annotations"] == before["annotations"]
