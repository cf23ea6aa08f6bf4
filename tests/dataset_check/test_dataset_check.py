"""The data set check identifies every kind of fault; data sets that pass can be trained on."""

from __future__ import annotations

import copy
import functools
import json
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from broken_data import CASES, EXIF_ORIENTATION, HW, NAN, encode, make_good, mutate, rectangle
from conftest import SHARED_DATA, small_config
from detectron2.data.datasets import load_coco_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mask_head_plugin.data import shapes
from mask_head_plugin.dataset_check import CheckOptions, check_coco_file
from mask_head_plugin.dataset_check.check import check_content
from mask_head_plugin.dataset_check.findings import (
    KINDS,
    SEVERITIES,
    Findings,
    errors_of,
    summary_table,
)
from mask_head_plugin.dataset_check.images import inspect_image
from mask_head_plugin.dataset_check.masks import decode_counts, runs_box
from mask_head_plugin.image_file_mapper import ImageFileMapper
from mask_head_plugin.image_files import read_image

# Kinds without a case in CASES, because other tests cover them.
ELSEWHERE = {
    *("json-missing", "num-classes", "category-id-range", "categories-disagree"),
    "rle-needs-bitmask",
    # tested in test_object_shares.py, test_records_and_files.py, test_train_test_overlap.py
    *("no-masks", "crowd-by-export", "area-suspicious", "area-of-box", "ring-as-hole"),
    *("mask-on-several-images", "mask-of-another-image", "image-without-objects"),
    *("image-size-alike", "image-in-both-splits", "image-over-detections"),
}


def check(data, **options):
    return check_coco_file(str(data.json_file), str(data.images), CheckOptions(**options))


@functools.cache
def training_mapper(mask_format: str) -> ImageFileMapper:
    cfg = small_config("Base-MaskRCNN-FPN.yaml", "INPUT.MASK_FORMAT", mask_format)
    return ImageFileMapper(cfg, is_train=True)


def read_as_in_training(data) -> list[list]:
    """Loads all images and masks as in training, first as polygons and then as bit masks."""
    records = load_coco_json(str(data.json_file), str(data.images))
    categories = {x["id"]: k for k, x in enumerate(data.content["categories"])}
    found = []
    for mask_format in ("polygon", "bitmask"):
        mapper = training_mapper(mask_format)
        for record in copy.deepcopy(records):
            has_runs = any(
                isinstance(x["segmentation"], dict) and not x.get("iscrowd")
                for x in record["annotations"]
            )
            if mask_format == "polygon" and has_runs:
                continue  # run lengths need bit masks, see rle-needs-bitmask
            for annotation in record["annotations"]:
                annotation["category_id"] = categories[annotation["category_id"]]
            found.append(mapper(record)["instances"])
    return found


@pytest.fixture
def good(tmp_path):
    return make_good(tmp_path)


def test_the_valid_data_set_has_no_findings_and_can_be_loaded(good):
    assert check(good) == [] == check(good, decode=True, num_classes=2)
    assert sum(len(instances) for instances in read_as_in_training(good)) == 10


@pytest.mark.parametrize("broken", CASES, ids=lambda x: x.name.replace(" ", "-"))
def test_each_broken_data_set_gives_its_finding(good, broken):
    good.write(broken.break_it(good))
    found = check(good)
    fitting = [
        x
        for x in found
        if x.kind == broken.kind
        and (broken.image_id, broken.annotation_id) == (x.image_id, x.annotation_id)
    ]
    assert fitting, "\n".join(map(str, found))
    line = str(fitting[0])
    assert line.startswith(f"{good.json_file}: ") and "\n" not in line and len(line) < 1000
    for name, i in (("image", broken.image_id), ("annotation", broken.annotation_id)):
        assert i is None or f"{name} {i}" in line
    assert fitting[0].fix in line and len(fitting[0].fix) > 10
    # The only other errors are those that the same value causes.
    kinds = {x.kind for x in errors_of(found)}
    assert kinds <= {broken.kind, *COMPANIONS.get(broken.kind, ())}


COMPANIONS = {
    "normalised-coordinates": {"box-mismatch"},
    "category-ids-shifted": {"unknown-category"},
    "no-images": {"no-annotations"},
    "image-too-large": {"image-size-mismatch"},
    "image-size-mismatch": {"rle-size"},
    "image-transposed": {"rle-size", "box-outside"},
    "no-categories": {"unknown-category"},
    "category-missing-key": {"unknown-category"},
    "category-name": {"unknown-category"},
    "image-missing-key": {"unknown-image"},
    "duplicate-image-id": {"unknown-image", "duplicate-file-name"},
    "id-not-integer": {"unknown-image"},
}


def test_the_cases_cover_all_kinds():
    tested = {broken.kind for broken in CASES}
    assert tested == set(KINDS) - ELSEWHERE
    assert len(tested) > 40 and len({broken.name for broken in CASES}) == len(CASES)


def test_every_kind_has_a_severity_and_advice():
    assert all(kind.severity in SEVERITIES and kind.fix for kind in KINDS.values())


def test_a_broken_data_set_without_an_error_still_trains(tmp_path):
    for number, broken in enumerate(CASES):
        data = make_good(tmp_path / str(number))
        data.write(broken.break_it(data))
        if not errors_of(check(data)):
            assert KINDS[broken.kind].severity != "error", broken.name
            read_as_in_training(data)


@pytest.mark.parametrize("kind", ["coco_photos", "nuclei"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_data_sets_have_no_findings(kind, split):
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real images are not at {SHARED_DATA}")
    folder = SHARED_DATA / f"{kind}_{split}"
    found = check_coco_file(str(folder / "annotations.json"), str(folder / "images"))
    # A few dozen photographs do not contain all of COCO's categories.
    assert {x.kind for x in found} <= ({"unused-category"} if kind == "coco_photos" else set())


def test_the_shapes_have_no_findings(tmp_path):
    shapes.write_split(tmp_path, "val", 20)
    assert check_coco_file(str(tmp_path / "annotations/val.json"), str(tmp_path / "val")) == []


def test_a_missing_file_and_a_folder_are_reported(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        (found,) = check_coco_file(str(path), str(tmp_path))
        assert found.kind == "json-missing" and str(found).startswith(str(path))


def test_syntax_errors_are_reported_with_line_and_column(good):
    good.write('{"images": [],\n "annotations": [1, 2,, 3]}')
    (found,) = check(good)
    assert found.kind == "json-syntax" and "line 2, column 23" in found.message


def test_the_number_of_classes_is_checked(good):
    (found,) = check(good, num_classes=80)
    assert found.kind == "num-classes" and "2 categories, but the model has 80" in found.message


def test_several_faults_of_one_file_are_all_reported(good):
    for key, value in (("bbox", [0, 0, NAN, 1]), ("area", -1), ("iscrowd", 7)):
        good.annotation(13)[key] = value
    good.annotation(14)["category_id"] = 99
    good.image(4)["file_name"] = "nowhere.png"
    kinds = {x.kind for x in check(good.write())}
    assert kinds == {
        *("box-not-finite", "area-invalid", "iscrowd-invalid"),
        *("unknown-category", "image-file-missing"),
    }


def test_boxes_may_be_off_by_a_pixel_as_in_cocos_crowds(good):
    good.annotation(16)["bbox"] = [30, 20, 39, 29]
    good.annotation(11)["bbox"] = [10, 11, 31, 19]
    assert check(good.write()) == []


def test_a_box_given_as_corners_is_recognised(good):
    good.annotation(14)["bbox"] = [10.5, 10, 50, 50.75]
    (found,) = check(good.write())
    assert "[x0, y0, x1, y1]" in found.message


def test_images_turned_by_90_degrees_settle_those_turned_by_180(good):
    exif = Image.Exif()
    for i, orientation, hw in ((1, 3, HW), (3, 6, HW[::-1])):
        exif[274] = orientation
        Image.new("RGB", hw[::-1]).save(good.path(i), exif=exif)
    # The image turned by 90 degrees shows that the records contain the upright sizes.
    assert check(good) == []


def test_damage_in_the_middle_of_a_png_is_found_by_its_checksums(good):
    path = good.path(2)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    (found,) = check(good)
    assert (found.kind, found.image_id) == ("image-truncated", 2)


def test_a_png_with_only_a_wrong_checksum_is_read_as_in_training(good):
    path = good.path(2)
    data = path.read_bytes()
    path.write_bytes(data[:-16] + bytes(4) + data[-12:])  # checksum of the last chunk with pixels
    assert check(good) == []
    assert read_image(str(path), "RGB").shape == (*HW, 3)


def test_complete_images_are_not_decoded(good, monkeypatch):
    def fail(self):
        raise AssertionError("the image must not be decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert check(good) == []


def test_the_check_does_not_wait_for_a_pipe(good):
    good.path(1).unlink()
    os.mkfifo(good.path(1))
    (found,) = check(good)
    assert found.kind == "image-unreadable"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_image_modes_that_detectron2_can_read_are_accepted(tmp_path, mode):
    suffix = "png" if mode in ("1", "L", "LA", "P", "RGBA") else "jpg"
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (20, 10), (9, 90, 200)).convert(mode).save(path)
    facts = inspect_image(str(path))
    assert facts.problem is None and facts.image_hw == (10, 20)


def lvis(good):
    for image in good.content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/images/{image.pop('file_name')}"
    for i, category in enumerate(good.content["categories"], start=1):
        for annotation in good.content["annotations"]:
            if annotation["category_id"] == category["id"]:
                annotation["category_id"] = i
        category["id"] = i
    good.content["annotations"] = good.content["annotations"][:-1]
    for annotation in good.content["annotations"]:
        del annotation["iscrowd"]


def check_lvis(good):
    options = CheckOptions(lvis=True)
    return check_coco_file(str(good.write().json_file), f"{good.folder}/", options)


def test_lvis_records_may_have_urls_and_no_crowd_flag(good):
    lvis(good)
    assert check_lvis(good) == []


def test_lvis_requires_polygons_and_ids_without_gaps(good):
    lvis(good)
    good.annotation(13)["segmentation"] = encode(0, 0, 20, 30)
    good.content["categories"][1]["id"] = 9
    for annotation in good.content["annotations"]:
        annotation["category_id"] = {1: 1, 2: 9}[annotation["category_id"]]
    assert {x.kind for x in check_lvis(good)} == {
        "segmentation-type",
        "category-id-range",
        "mixed-formats",
    }


def test_the_summary_table_lists_errors_first(good):
    good.annotation(13)["bbox"] = [0, 0, 22, 32]
    for i in (11, 12):
        good.annotation(i)["area"] = -1
    rows = summary_table(check(good.write())).splitlines()[2:]
    assert rows[0].split()[:3] == ["error", "area-invalid", "2"]
    assert rows[1].split()[:3] == ["warning", "box-loose", "1"] and "annotation 13" in rows[1]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 300), max_size=30), st.integers(1, 40))
def test_run_lengths_are_decoded_as_by_pycocotools(lengths, height):
    total = sum(lengths)
    width = -(-total // height) or 1
    runs = [*lengths, height * width - total]
    rle = mask_util.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    assert decode_counts(rle["counts"].decode()).tolist() == runs
    box = runs_box(np.array(runs), height)
    mask = mask_util.decode(rle)
    if box is None:
        assert not mask.any()
        return
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert box[0] == columns[0] and box[2] == columns[-1] + 1
    assert box[1] <= rows[0] and box[3] >= rows[-1] + 1


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40))
def test_any_text_is_decoded_or_refused(text):
    runs = decode_counts(text)
    assert runs is None or (runs.dtype == np.int64 and len(runs) <= len(text))


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_mutation_crashes_the_check_and_mutations_that_pass_can_be_loaded(good, data):
    content = mutate(good.content, data.draw)
    found = Findings("mutated.json")
    check_content(json.loads(json.dumps(content)), str(good.images), found, CheckOptions())
    assert all("\n" not in str(x) for x in found)
    if not errors_of(found):
        mutated = type(good)(good.folder, content)
        mutated.write()
        read_as_in_training(mutated)
        make_good_again(good)


def make_good_again(good):
    good.write()


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60), st.integers(0, 2000))
def test_any_bytes_are_valid_json_or_give_a_finding(tmp_path_factory, junk, position):
    folder = tmp_path_factory.mktemp("junk")
    data = make_good(folder)
    text = data.json_file.read_bytes()
    data.write(text[:position] + junk + text[position:])
    check(data)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [("height", "60", "image-size-invalid"), ("width", None, "image-missing-key")],
)
def test_masks_of_an_image_without_a_size_are_checked_against_the_files_size(
    good, key, value, kind
):
    good.image(2)[key] = value
    good.annotation(13)["segmentation"] = [rectangle(0, 0, 500, 500)]
    assert {x.kind for x in check(good.write())} == {kind, "polygon-outside"}


def test_masks_of_an_unknown_image_are_still_checked(good):
    good.annotation(13).update(image_id=99, segmentation=[[0, 0, 20, 0, 20]])
    good.annotation(14).update(image_id=99, segmentation={"size": [60, 80], "counts": [7]})
    kinds = {(x.kind, x.annotation_id) for x in errors_of(check(good.write()))}
    assert kinds == {
        *(("unknown-image", 13), ("polygon-odd", 13)),
        *(("unknown-image", 14), ("rle-sum", 14)),
    }


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_has_the_size_used_in_training(tmp_path, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = str(tmp_path / "a.tif")
    Image.new("RGB", (80, 60)).save(path, exif=exif)
    facts = inspect_image(path)
    assert facts.image_hw == read_image(path, "RGB").shape[:2]
    assert facts.orientation == orientation
