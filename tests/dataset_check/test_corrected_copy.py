"""Corrected copies pass the check and can be used for training, and every change is listed."""

from __future__ import annotations

import json
from collections import defaultdict

import pycocotools.mask as mask_util
import pytest
from broken_data import CASES, HW, DataSet, encode, make_good, many_objects, mutate, rectangle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset_check import check, read_as_in_training

from mask_head_plugin import ConfigError
from mask_head_plugin.dataset_check import findings, fix_coco_file
from mask_head_plugin.dataset_check.corrected_copy import changes_path
from mask_head_plugin.dataset_check.export_repairs import AREA_KINDS
from mask_head_plugin.dataset_check.findings import errors_of
from mask_head_plugin.dataset_check.record_repairs import REPAIRS, clip_polygon

WHOLE_FILE_REPAIRS = {"json-encoding", "normalised-coordinates", *AREA_KINDS}


def fix(data: DataSet, **choices):
    """Returns the corrected copy as a data set, and the list of changes."""
    output = data.folder / "fixed.json"
    changes = fix_coco_file(str(data.json_file), str(data.images), output, **choices)
    assert json.loads(changes_path(output).read_text()) == [
        {key: getattr(change, key) for key in change.__dataclass_fields__} for change in changes
    ]
    fixed = DataSet(data.folder, json.loads(output.read_text()))
    output.replace(data.json_file)
    return fixed, changes


@pytest.fixture
def good(tmp_path):
    return make_good(tmp_path)


@pytest.mark.parametrize("broken", CASES, ids=lambda x: x.name.replace(" ", "-"))
def test_a_corrected_copy_passes_the_check_trains_and_lists_its_changes(good, broken):
    before = good.write(broken.break_it(good)).json_file.read_bytes()
    has_error = bool(errors_of(check(good)))
    if broken.after_fix == "none":
        with pytest.raises(ConfigError, match=rf"cannot repair .*\[{broken.kind}\]") as info:
            fix(good)
        assert "\n" not in str(info.value) and not (good.folder / "fixed.json").exists()
        assert good.json_file.read_bytes() == before
        return
    counts = {section: len(good.content[section]) for section in good.content}
    fixed, changes = fix(good)
    assert errors_of(check(fixed)) == []
    assert len(read_as_in_training(fixed)) > 0
    assert bool(changes) == has_error
    # Every loss is listed, and records with a single correct repair are kept.
    left_out = [x for x in changes if x.action == "left out"]
    for section, count in counts.items():
        lost = {x.index for x in left_out if x.section == section}
        assert len(fixed.content[section]) == count - len(lost)
    assert all(x.what and x.kind for x in changes)
    real = [x for x in left_out if x.section == "annotations" and x.index < 6]
    assert bool(real) == (broken.after_fix == "left out")


def test_each_finding_states_correctly_what_fix_does():
    """Compares what each finding states with the outcomes that the previous test verifies."""
    outcomes = defaultdict(set)
    for broken in CASES:
        outcomes[broken.kind].add(broken.after_fix)
    possible = {
        findings.REPAIRS: {"kept"},
        findings.TRIES: {"kept", "none"},
        findings.REPAIRS_OR_LEAVES_OUT: {"kept", "left out"},
        findings.LEAVES_OUT: {"left out"},
        "": {"none", "left out"},  # findings need not state that a record is left out
    }
    repaired = {kind for _, kind in REPAIRS} | WHOLE_FILE_REPAIRS
    for kind, (severity, fix, by_fix) in findings.KINDS.items():
        assert (by_fix.startswith("--fix repairs")) == (kind in repaired), kind
        if severity == findings.ERROR and not kind.endswith("-not-object"):
            assert outcomes[kind] <= possible[by_fix], kind
        assert "--fix repairs" not in fix and "--fix leaves" not in fix, kind


def test_a_valid_file_is_copied_unchanged(good):
    content = json.loads(good.json_file.read_text())
    fixed, changes = fix(good)
    assert fixed.content == content and changes == []


def test_an_existing_file_is_not_overwritten(good):
    for output in (good.json_file, good.folder / "other.json"):
        output.write_text(output.read_text() if output.exists() else "mine")
        before = output.read_bytes()
        with pytest.raises(ConfigError, match="already exists; use the name of a new file"):
            fix_coco_file(str(good.json_file), str(good.images), output)
        assert output.read_bytes() == before


def test_polygons_are_cut_and_box_and_area_updated(good):
    good.annotation(13)["segmentation"] = [rectangle(-30, -40, 20, 30)]
    fixed, changes = fix(good.write())
    annotation = fixed.annotation(13)
    rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], *HW))
    assert mask_util.toBbox(rle).tolist() == [0, 0, 20, 30] and annotation["area"] == 600
    assert [(x.action, x.kind, x.annotation_id) for x in changes] == [
        ("changed", "polygon-outside", 13)
    ]


def test_a_cut_concave_polygon_covers_the_same_pixels():
    star = [40.0, -20.0, 50.0, 25.0, 100.0, 30.0, 50.0, 40.0, 40.0, 90.0, 30.0, 40.0, -20.0, 30.0]
    cut = clip_polygon(star, HW)
    assert min(cut) >= 0 and max(cut[::2]) <= HW[1] and max(cut[1::2]) <= HW[0]
    large = mask_util.decode(mask_util.frPyObjects([[x + 30 for x in star]], 120, 140)[0])
    small = mask_util.decode(mask_util.frPyObjects([cut], *HW)[0])
    assert abs(large[30:90, 30:110].astype(int) - small).sum() <= 0.02 * small.sum()


def test_a_polygon_with_points_near_the_largest_float_is_cut():
    right = clip_polygon([1.7e308, 40, 70, 30, 70, 50], HW)
    assert right == pytest.approx([80, 50, 80, 30, 70, 30, 70, 50])
    left = clip_polygon([-1e308, 40, 70, 30, 70, 50], HW)
    assert left == pytest.approx([0, 50, 0, 30, 70, 30, 70, 50])
    everything = clip_polygon([1.7e308, -5, -1.7e308, -5, 0, 1.7e308], HW)
    assert max(everything[::2]) == HW[1] and max(everything[1::2]) == HW[0]


def test_a_box_can_be_computed_from_run_lengths(good):
    good.annotation(13).update(bbox=[1, 2], segmentation=encode(40, 30, 60, 55))
    fixed, _ = fix(good.write())
    assert fixed.annotation(13)["bbox"] == [40, 30, 20, 25]


def test_references_are_updated_to_new_ids(good):
    for number, image in enumerate(good.content["images"]):
        image["id"] = f"{number + 1:02d}" if number < 2 else f"image {number}"
    names = {1: "01", 2: "02", 3: "image 2", 4: "image 3"}
    for annotation in good.content["annotations"]:
        annotation["image_id"] = names[annotation["image_id"]]
    fixed, _ = fix(good.write())
    files = {x["id"]: x["file_name"] for x in fixed.content["images"]}
    owner = {x["id"]: files[x["image_id"]] for x in fixed.content["annotations"]}
    assert owner == {11: "1.jpg", 12: "1.jpg", 13: "2.png", 14: "3.jpg", 15: "4.png", 16: "2.png"}
    assert {1, 2} <= set(files)


def test_annotations_of_an_ambiguous_text_id_are_left_out(good):
    for i in (2, 4):
        for annotation in good.content["annotations"]:
            annotation["image_id"] = {i: "x"}.get(annotation["image_id"], annotation["image_id"])
        good.image(i)["id"] = "x"
    fixed, changes = fix(good.write())
    assert {x["id"] for x in fixed.content["annotations"]} == {11, 12, 14}
    assert len([x for x in changes if x.action == "left out"]) == 5


def test_several_records_of_the_same_image_are_merged(good):
    """Some tools list an image once per object."""
    second = {**good.image(1), "id": 50}
    good.content["images"].append(second)
    good.annotation(12)["image_id"] = 50
    good.content["annotations"].append({**good.annotation(11), "id": 99, "image_id": 50})
    fixed, changes = fix(good.write())
    on_first = {x["id"] for x in fixed.content["annotations"] if x["image_id"] == 1}
    assert on_first == {11, 12}  # 99 is the same object as 11
    assert {(x.section, x.image_id, x.annotation_id) for x in changes} == {
        *(("images", 50, None), ("annotations", 50, 99)),
    }


def test_images_are_left_out_with_their_annotations_and_the_reason(good):
    good.path(2).write_bytes(b"")
    fixed, changes = fix(good)
    assert {x["image_id"] for x in fixed.content["annotations"]} == {1, 3, 4}
    of_annotations = [x for x in changes if x.section == "annotations"]
    assert {x.annotation_id for x in of_annotations} == {13, 16}
    assert all("its image was left out: its file" in x.what for x in of_annotations)


def test_a_file_with_nothing_left_is_refused(good):
    for annotation in good.content["annotations"]:
        annotation["segmentation"] = "mask.png"
    expected = r"6 of 6 annotations would be left out or cut \(6 for segmentation-type\)"
    with pytest.raises(ConfigError, match=expected + ".*After that, the file has no annotations"):
        fix(good.write())


def test_repairs_do_not_hide_a_fault_of_the_whole_export(good):
    """Masks are cut at the image's border; boxes fitted to the cut masks would wrongly pass."""
    for annotation in many_objects(good):
        polygon = annotation["segmentation"][0]
        annotation["segmentation"] = [[x + 30 for x in polygon]]
    with pytest.raises(ConfigError, match=r"--fix: most boxes .* 5 masks have other faults"):
        fix(good.write())


def assert_nothing_is_left_to_fix(fixed: DataSet) -> None:
    """Asserts that no finding of a corrected copy promises a repair, and that --fix keeps it."""
    assert [str(x) for x in check(fixed) if findings.KINDS[x.kind].by_fix] == []
    changes_path(fixed.folder / "fixed.json").unlink()
    again, changes = fix(fixed)
    assert (json.dumps(again.content), changes) == (json.dumps(fixed.content), [])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_corrected_copy_has_nothing_left_to_fix(tmp_path_factory, data):
    """Draws areas and polygons at the border of what the check accepts."""
    broken = make_good(tmp_path_factory.mktemp("areas"))
    share = st.sampled_from([0.0, 0.3, 0.55, 0.8, 1.0, 1.3, 1.9, 3.0])
    side = st.floats(2, 30)
    for annotation in many_objects(broken):
        (x, y, _, _), width, height = annotation["bbox"], data.draw(side), data.draw(side)
        corner = [x, y, x + width, y, x + width * data.draw(st.floats(0, 1)), y + height]
        thin = [x, y, x + width, y + height / 2, x, y + height, x + width * 0.9, y + height / 2]
        polygons = [[corner], [thin], [corner, thin], [rectangle(x, y, x + width, y + height)]]
        annotation["segmentation"] = data.draw(st.sampled_from(polygons))
        numbers = [x for polygon in annotation["segmentation"] for x in polygon]
        xs, ys = numbers[::2], numbers[1::2]
        annotation["bbox"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        annotation["area"] = width * height * data.draw(share)
    try:
        fixed, _ = fix(broken.write())
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert_nothing_is_left_to_fix(fixed)


def test_areas_that_differ_between_polygon_and_pixels_are_repaired_once(good):
    """The check computes the area of polygons, the repair that of pixels."""
    for annotation in many_objects(good):
        x, y, _, _ = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + 20.5, y + 0.5, x + 20.3, y + 9.6, x, y + 15.3]]
        annotation["bbox"], annotation["area"] = [x, y, 20.5, 15.3], 20.5 * 15.3
    sliver = good.content["annotations"][0]  # 205.4 square pixels in its box, 162 pixels
    x, y, _, _ = sliver["bbox"]
    sliver["segmentation"] = [[x, y, x + 20.54, y, x + 20.54, y + 10, x + 4, y + 8.2, x, y + 8.2]]
    sliver["bbox"], sliver["area"] = [x, y, 20.54, 10], 205.4
    fixed, _ = fix(good.write())
    assert_nothing_is_left_to_fix(fixed)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_mutated_file_is_repaired_or_refused(tmp_path_factory, data):
    mutated = make_good(tmp_path_factory.mktemp("mutated"))
    mutated.content = mutate(mutated.content, data.draw)
    try:
        fixed, _ = fix(mutated.write())
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    read_as_in_training(fixed)
    assert_nothing_is_left_to_fix(fixed)
