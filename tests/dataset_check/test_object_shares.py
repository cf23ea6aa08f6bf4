"""Findings that count affected objects: crowds, areas, rings, and masks on several images."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import pytest
from broken_data import HW, encode, make_good, rectangle
from PIL import Image
from test_dataset_check import check

from mask_head_plugin.dataset_check.findings import errors_of
from mask_head_plugin.dataset_check.polygon_geometry import areas, outline

SQUARE = rectangle(10, 10, 40, 40)
INNER = rectangle(15, 15, 35, 35)
TRIANGLE = [10.0, 10.0, 40.0, 10.0, 10.0, 40.0]


@pytest.fixture
def good(tmp_path):
    return make_good(tmp_path)


def only(data, kind):
    """Returns the only finding in a data set, which must be of the given kind."""
    (found,) = check(data.write())
    assert found.kind == kind, found
    return found


def add_objects(data, count, **fields):
    """Adds slightly shifted objects to all four images; returns the added objects."""
    added = []
    for k in range(count):
        x = k / 100
        annotation = {"id": 100 + k, "image_id": 1 + k % 4, "category_id": 3, "iscrowd": 0}
        annotation |= {"bbox": [10 + x, 10, 30, 30], "area": 900}
        annotation |= {"segmentation": [rectangle(10 + x, 10, 40 + x, 40)], **fields}
        added.append(annotation)
    data.content["annotations"] += added
    return added


def as_brush_mask(annotation, k):
    annotation |= {"iscrowd": 1, "bbox": [10, 10, 20 + k, 20], "area": 400 + 20 * k}
    annotation["segmentation"] = encode(10, 10, 30 + k, 30)


def test_brush_masks_exported_as_crowds_are_counted(good):
    for k, annotation in enumerate(add_objects(good, 20)[:10]):
        as_brush_mask(annotation, k)
    found = only(good, "crowd-by-export")
    assert found.severity == "warning" and "set iscrowd to 0" in found.fix
    assert "11 of 26 (42.3%) annotations have iscrowd 1" in found.message
    assert "0 of 4 (0.0%) annotated images have no other annotation" in found.message


def test_images_with_only_crowds_are_reported_even_if_few(good):
    as_brush_mask(good.annotation(15), 1)
    found = only(good, "crowd-by-export")
    assert "1 of 4 (25.0%) annotated images have no other annotations, so" in found.message


def test_a_proportion_of_crowds_like_cocos_is_accepted(good):
    # 10 of 606 annotations are crowds, or 1.7%; in COCO, 1.2% are.
    for k, annotation in enumerate(add_objects(good, 600)[:9]):
        as_brush_mask(annotation, k)
    assert check(good.write()) == []


def test_a_file_with_only_crowds_is_an_error_with_advice(good):
    for annotation in good.content["annotations"]:
        as_brush_mask(annotation, annotation["id"])
    found = check(good.write())
    assert {x.kind for x in errors_of(found)} == {"only-crowds"}
    assert {"crowd-by-export"} == {x.kind for x in found if x.severity == "warning"}
    assert "all 6 annotations have iscrowd 1" in str(errors_of(found)[0])


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0, "median ratio 0)"),
        (0.01, "median ratio 0.01"),
        (1.5, "median ratio 1.5"),
        (100 / 3, "33.3"),
    ],
)
def test_areas_that_differ_from_the_masks_are_counted(good, factor, words):
    for annotation in [*good.content["annotations"], *add_objects(good, 20)]:
        annotation["area"] = min(annotation["area"] * factor, 1.05 * HW[0] * HW[1])
    found = only(good, "area-suspicious")
    assert "of 25 (" in found.message and (words in found.message or factor > 10)
    assert "are counted in the wrong size class (APs, APm, APl)" in found.message


def test_a_single_wrong_area_is_found_with_its_size_class(good):
    good.annotation(11)["area"] = 1
    found = only(good, "area-suspicious")
    assert (
        "1 of 5 (20.0%)" in found.message
        and "so 0 are counted in the wrong size class" in found.message
    )
    assert "annotation 11 has area 1, but its mask has 600 pixels" in found.message
    good.annotation(11).update(
        segmentation=[rectangle(10, 10, 60, 50)], bbox=[10, 10, 50, 40], area=1
    )
    assert "so 1 is counted in the wrong size class" in only(good, "area-suspicious").message


def test_areas_may_differ_by_pixels_along_the_outline(good):
    for annotation in add_objects(good, 20):
        annotation["area"] = 900 + np.random.default_rng(annotation["id"]).uniform(-60, 60)
    assert check(good.write()) == []


def test_box_areas_are_distinguished_from_other_wrong_areas(good):
    good.annotation(14)["area"] = 39.5 * 40.75
    found = only(good, "area-of-box")
    assert "1 of 5 (20.0%) objects have the area of their box" in found.message
    assert "annotation 14 has area 1609.62, but its mask has 707.312 pixels" in found.message
    # 32 x 32 pixels, the limit between small and medium objects, lies between the two areas.
    assert "so 1 is counted in the wrong size class" in found.message


def test_a_ring_is_found_if_its_area_excludes_the_hole(good):
    good.annotation(11).update(bbox=[10, 10, 30, 30], segmentation=[SQUARE, INNER], area=900)
    assert check(good.write()) == []
    good.annotation(11)["area"] = 500
    found = only(good, "ring-as-hole")
    assert "1 of 5" in found.message and "area 500, but its mask has 900 pixels" in found.message


def test_a_ring_is_also_found_by_the_pixel_area_of_its_mask(good):
    mask = mask_util.decode(mask_util.frPyObjects([[12.3, 9, 52, 20.5, 30, 55]], *HW))[..., 0]
    hole = mask_util.decode(mask_util.frPyObjects([[25.0, 20, 40, 24, 31, 40]], *HW))[..., 0]
    good.annotation(11).update(
        bbox=[12.3, 9, 39.7, 46],
        segmentation=[[12.3, 9, 52, 20.5, 30, 55], [25.0, 20, 40, 24, 31, 40]],
        area=int(mask.sum() - hole.sum()),
    )
    only(good, "ring-as-hole")


@pytest.mark.parametrize(
    ("polygons", "filled", "hollow"),
    [
        ([SQUARE], 900, 900),
        ([SQUARE, INNER], 900, 500),
        ([INNER, SQUARE], 900, 500),
        ([SQUARE, INNER, rectangle(20, 20, 30, 30)], 900, 600),  # an island within the hole
        ([SQUARE, rectangle(50, 10, 60, 20)], 1000, 1000),
        ([SQUARE, rectangle(40, 10, 50, 20)], 1000, 1000),  # edge to edge
        ([SQUARE, rectangle(30, 30, 50, 50)], 1300, 1300),  # overlapping
        ([SQUARE, SQUARE], 1800, 1800),
        ([TRIANGLE, rectangle(30, 30, 38, 38)], 514, 514),  # in the triangle's box but outside it
        ([TRIANGLE, rectangle(12, 12, 16, 16)], 450, 434),
    ],
)
def test_areas_with_and_without_holes(polygons, filled, hollow):
    outlines = [outline(polygon) for polygon in polygons]
    assert areas(polygons, outlines) == (filled, hollow)


def test_the_area_of_huge_coordinates_causes_no_warning():
    assert outline([0, 0, 1e200, 0, 1e200, 1e200]).area == np.inf


def test_masks_on_several_images_are_counted_once_each(good):
    for k, annotation in enumerate(add_objects(good, 8)):
        annotation |= {"segmentation": [SQUARE], "bbox": [10, 10, 30, 30]} if k < 4 else {}
    found = only(good, "mask-on-several-images")
    assert (
        "4 of 14" in found.message
        and "annotation 100 of image 1 is also on image 2" in found.message
    )


def test_run_lengths_on_several_images_are_also_found(good):
    for i, image_id in ((14, 3), (15, 4)):
        good.annotation(i).update(image_id=image_id)
        good.annotation(i).update(segmentation=encode(9, 9, 30, 30), bbox=[9, 9, 21, 21], area=441)
    kinds = {x.kind for x in check(good.write())}
    assert kinds == {"mixed-formats", "mask-on-several-images"}


def test_a_mask_copied_from_another_image_is_an_error(good):
    for image_id in (1, 2, 3):
        good.image(image_id)["width"] = HW[1]
    wide = rectangle(20, 20, 79, 59)
    for annotation in add_objects(good, 2):
        annotation |= {"segmentation": [wide], "bbox": [20, 20, 59, 39], "area": 59 * 39}
    good.image(2).update(width=40, height=60)
    Image.new("RGB", (40, 60)).save(good.path(2))
    good.content["annotations"] = [
        x for x in good.content["annotations"] if x["image_id"] != 2 or x["id"] == 101
    ]
    found = check(good.write())
    assert [(x.kind, x.annotation_id) for x in errors_of(found)] == [("mask-of-another-image", 101)]
    assert "the same mask is on image 1" in str(errors_of(found)[0])


def test_masks_of_whole_images_may_be_identical(good):
    whole = {"segmentation": [rectangle(0, 0, 80, 60)], "bbox": [0, 0, 80, 60], "area": 4800}
    add_objects(good, 4, **whole)
    assert check(good.write()) == []


def test_images_without_annotations_are_counted(good):
    good.content["annotations"] = [x for x in good.content["annotations"] if x["image_id"] != 4]
    found = only(good, "image-without-objects")
    assert "1 of 4 (25.0%) images have no annotations, so training" in found.message


@pytest.mark.parametrize("empty", [None, [], {}])
def test_a_file_of_boxes_gives_one_finding_and_suits_a_model_without_masks(good, empty):
    for annotation in good.content["annotations"]:
        annotation["segmentation"] = empty
    found = only(good, "no-masks")
    assert found.severity == "error" and "MODEL.MASK_ON False" in found.fix
    assert check(good, masks=False) == []


def test_for_a_model_without_masks_some_objects_may_lack_them(good):
    good.annotation(11)["segmentation"] = []
    del good.annotation(12)["segmentation"]
    good.annotation(13)["segmentation"] = [[0, 0, 20, 0, 20]]
    found = check(good.write(), masks=False)
    assert [(x.kind, x.annotation_id) for x in found] == [("polygon-odd", 13)]
