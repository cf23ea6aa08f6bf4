"""Compares the evaluation with pycocotools and lvis-api, and boundary AP with its definition."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from conftest import SHARED_DATA
from made_data import encode, make_coco
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask_head_plugin.evaluation.boundary import boundary_iou, mask_boundary
from mask_head_plugin.evaluation.coco_ap import Evaluation, GroundTruth
from mask_head_plugin.evaluation.matching import Matches

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def write_truth(folder, content, **kwargs):
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return GroundTruth(str(path), **kwargs)


def evaluate(truth, results, task, max_detections=100):
    detections = truth.detections(results, "bbox" if task == "bbox" else "segm")
    kind = "bbox" if task == "bbox" else "segm"
    evaluation = Evaluation(truth, detections, kind, max_detections)
    return evaluation.with_boundaries() if task == "boundary" else evaluation


def official(content, results, task, max_detections=100, engine=COCOeval):
    """Evaluates the results with pycocotools the way detectron2 does."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        results = copy.deepcopy(results)
        for result in results if task == "segm" else ():
            result.pop("bbox")
        evaluation = engine(truth, truth.loadRes(results), task)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def slow_boundary(mask):
    """Returns the pixels of the mask that are at most d from a pixel outside the mask or the image.

    The distance d is 2% of the image's diagonal.
    """
    d = max(round(0.02 * (mask.shape[0] ** 2 + mask.shape[1] ** 2) ** 0.5), 1)
    boundary = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        window = mask[max(y - d, 0) : y + d + 1, max(x - d, 0) : x + d + 1]
        boundary[y, x] = window.sum() < (2 * d + 1) ** 2
    return boundary


class SlowBoundaryEval(COCOeval):
    """The evaluation of pycocotools with the IoU of boundary AP (arXiv 2103.16562, section 5)."""

    def computeIoU(self, imgId, catId):  # noqa: N802, N803  # as in pycocotools
        ious = super().computeIoU(imgId, catId)
        if len(ious) == 0:
            return ious
        objects = self._gts[imgId, catId]
        found = sorted(self._dts[imgId, catId], key=lambda x: -x["score"])[: len(ious)]
        masks = [[coco_mask.decode(x["segmentation"]) for x in xs] for xs in (found, objects)]
        edges = [[slow_boundary(mask) for mask in xs] for xs in masks]
        for d, g in np.ndindex(ious.shape):
            if not objects[g]["iscrowd"]:
                both = (edges[0][d] & edges[1][g]).sum()
                iou = both / max((edges[0][d] | edges[1][g]).sum(), 1)
                ious[d, g] = min(ious[d, g], iou)
        return ious


def assert_equal(evaluation, expected):
    precision, recall = (expected.eval[key][..., -1] for key in ("precision", "recall"))
    np.testing.assert_allclose(evaluation.precision, precision, atol=1e-9)
    np.testing.assert_allclose(evaluation.recall, recall, atol=1e-9)
    if expected.params.maxDets[-1] != 100:
        return  # the summary of pycocotools assumes a limit of 100
    metrics = evaluation.metrics()
    stats = [100 * x if x > -1 else float("nan") for x in expected.stats[:6]]
    np.testing.assert_allclose([metrics[name] for name in NAMES], stats, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_equals_pycocotools(task, seed, tmp_path):
    content, results = make_coco(seed)
    truth = write_truth(tmp_path, content)
    assert_equal(evaluate(truth, results, task), official(content, results, task))


@pytest.mark.parametrize("max_detections", [100, 150])
def test_equals_pycocotools_with_detections_beyond_the_limit(max_detections, tmp_path):
    content, results = make_coco(3, num_classes=1, most_copies=80)
    counts = np.unique([x["image_id"] for x in results], return_counts=True)[1]
    assert counts.max() > max_detections
    evaluation = evaluate(write_truth(tmp_path, content), results, "segm", max_detections)
    assert_equal(evaluation, official(content, results, "segm", max_detections))


@pytest.mark.parametrize("seed", range(4))
def test_boundary_equals_the_definition(seed, tmp_path):
    content, results = make_coco(seed)
    evaluation = evaluate(write_truth(tmp_path, content), results, "boundary")
    assert_equal(evaluation, official(content, results, "segm", engine=SlowBoundaryEval))
    masks = evaluate(write_truth(tmp_path, content), results, "segm")
    assert evaluation.metrics()["AP"] < masks.metrics()["AP"] - 1, (
        "the two metrics must differ clearly"
    )


def test_boundary_of_a_hand_worked_example():
    mask = np.zeros((40, 30), np.uint8)
    mask[10:20, :10] = 1  # at the image's left edge; d = 2% of 50 = 1
    boundary = mask_boundary(coco_mask.encode(np.asfortranarray(mask)))
    assert (boundary.top, boundary.left, boundary.bits.shape) == (10, 0, (10, 10))
    assert boundary.bits.sum() == 100 - 64 and boundary.bits[5, 0] == 1
    shifted = mask_boundary(coco_mask.encode(np.asfortranarray(np.roll(mask, 1, 0))))
    # The boundaries lie in rows 10 to 19 and 11 to 20 and have 36 pixels each. They share the two
    # pixels at the sides in each of rows 12 to 18. In rows 11 and 19, one boundary fills the row
    # and the other has only the pixels at the sides, so two pixels are shared there as well.
    expected = (7 * 2 + 2 * 2) / (36 + 36 - 18)
    assert boundary_iou(boundary, shifted) == pytest.approx(expected)
    empty = mask_boundary(coco_mask.encode(np.zeros((40, 30), np.uint8, order="F")))
    assert boundary_iou(empty, boundary) == boundary_iou(empty, empty) == 0.0


@pytest.mark.parametrize("task", ["bbox", "segm", "boundary"])
def test_the_saved_matches_give_the_same_ap(task, tmp_path):
    content, results = make_coco(5, most_copies=12)
    evaluation = evaluate(write_truth(tmp_path, content), results, task)
    evaluation.matches().save(tmp_path / "matches.npz")
    matches = Matches.load(tmp_path / "matches.npz")
    assert matches.image_ids.tolist() == [
        str(k) for k in sorted(x["id"] for x in content["images"])
    ]
    for k, area, t in np.ndindex(3, 4, 10):
        counted = (matches.dt_class == k) & ~matches.dt_ignored[area, t]
        order = np.argsort(-matches.dt_score[counted], kind="stable")
        true = np.cumsum(matches.dt_matched[area, t][counted][order])
        num_objects = ((matches.gt_class == k) & ~matches.gt_ignored[area]).sum()
        curve = evaluation.precision[t, :, k, area]
        if num_objects == 0:
            assert (curve == -1).all()
            continue
        precision = np.append(true / np.arange(1, len(true) + 1), 0)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(true / num_objects, np.linspace(0, 1, 101))
        np.testing.assert_allclose(precision[places], curve, atol=1e-12)


def test_any_ids_are_accepted_and_do_not_change_the_result(tmp_path):
    content, results = make_coco(2)
    expected = evaluate(write_truth(tmp_path, content), results, "segm").metrics()
    names = {x["id"]: f"scene/{x['id']}" for x in content["images"]}
    names[content["images"][0]["id"]] = 2**60 + 1
    for x in content["images"]:
        x["id"] = names[x["id"]]
    for x in [*content["annotations"], *results]:
        x["image_id"] = names[x["image_id"]]
    content["annotations"][0]["id"] = 0
    content["annotations"][1]["id"] = "the second"
    changed = evaluate(write_truth(tmp_path, content), results, "segm").metrics()
    assert changed["AP50"] == pytest.approx(expected["AP50"], abs=5), (
        "the ids may affect only the order of ties"
    )
    assert np.isfinite(changed["AP"])


def test_without_detections_ap_is_zero_and_without_objects_nan(tmp_path):
    content, results = make_coco(1)
    truth = write_truth(tmp_path, content)
    assert evaluate(truth, [], "segm").metrics()["AP"] == 0
    assert evaluate(truth, [], "boundary").matches().dt_matched.shape == (4, 10, 0)
    nothing = write_truth(tmp_path, {**content, "annotations": []})
    assert np.isnan(evaluate(nothing, results, "segm").metrics()["AP"])
    assert nothing.has_annotations is True
    del content["annotations"]
    assert write_truth(tmp_path, content).has_annotations is False


def test_a_missing_area_is_computed_from_the_box_or_else_the_mask(tmp_path):
    content, results = make_coco(1)
    for key, expected in (("bbox", lambda x: x["bbox"][2] * x["bbox"][3]), ("", mask_area)):
        kept = {"id", "image_id", "category_id", "iscrowd", "segmentation", key}
        lacking = [{k: v for k, v in x.items() if k in kept} for x in content["annotations"]]
        complete = [{**x, "area": expected(x)} for x in lacking]
        truths = [write_truth(tmp_path, {**content, "annotations": x}) for x in (lacking, complete)]
        actual, wanted = (evaluate(truth, results, "segm").metrics() for truth in truths)
        assert actual == pytest.approx(wanted, nan_ok=True)


def mask_area(annotation):
    return int(coco_mask.area(annotation["segmentation"]))


def test_detections_of_a_class_not_in_the_file_are_left_out(tmp_path):
    content, results = make_coco(1)
    truth = write_truth(tmp_path, content)
    expected = evaluate(truth, results, "bbox").metrics()
    foreign = {**results[0], "category_id": 999}
    actual = evaluate(truth, [foreign, *results], "bbox").metrics()
    assert actual == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 12345}, "a prediction has image id 12345, which .*truth.json lacks"),
        (
            {"segmentation": {"size": [9, 9], "counts": "a2"}},
            r"has the size \[60, 80\], but a predicted mask .*9, 9",
        ),
    ],
)
def test_predictions_that_do_not_fit_the_file_are_refused(change, message, tmp_path):
    content, results = make_coco(1)
    with pytest.raises(ValueError, match=message):
        write_truth(tmp_path, content).detections([{**results[0], **change}], "segm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 12345}, "annotation 1 names image 12345 and category"),
        (
            {"category_id": 999},
            "annotation 1 names image .* and category 999; the id 999 is not in",
        ),
        ({"segmentation": {"size": [9, 9], "counts": "a2"}}, "annotation 1: an RLE has the size"),
        (
            {"segmentation": {"size": [60, 80], "counts": [0, 9]}},
            "annotation 1: the counts of an RLE do not add up",
        ),
    ],
)
def test_annotations_that_cannot_be_evaluated_are_refused(change, message, tmp_path):
    content, results = make_coco(1)
    content["annotations"][0] |= change
    with pytest.raises(ValueError, match=f"truth.json: {message}"):
        evaluate(write_truth(tmp_path, content), results, "segm")


def test_objects_without_a_mask_count_as_missed_and_are_reported(tmp_path, caplog):
    content, results = make_coco(1)
    for x in content["annotations"]:
        x["iscrowd"] = None
    expected = evaluate(write_truth(tmp_path, content), results, "segm").metrics()["AP50"]
    content["annotations"].append({**content["annotations"][0], "id": 999, "segmentation": []})
    truth = write_truth(tmp_path, content)
    assert ": 1 annotation without a mask, for example 999, cannot match any" in caplog.text
    assert evaluate(truth, results, "segm").metrics()["AP50"] < expected
    assert np.isfinite(evaluate(truth, results, "boundary").metrics()["AP"])
    no_masks = [{**x, "segmentation": None} for x in content["annotations"]]
    boxes = write_truth(tmp_path, {**content, "annotations": no_masks})
    assert np.isfinite(evaluate(boxes, results, "bbox").metrics()["AP"])
    with pytest.raises(ValueError, match="has no masks to compare with"):
        evaluate(boxes, results, "segm")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("images", {"height": None}, "image .* has no height and width"),
        (
            "images",
            {"neg_category_ids": [77]},
            r"neg_category_ids of image .* not among the categories: \{77\}",
        ),
        ("categories", {"name": None}, ""),
    ],
)
def test_images_and_categories_that_cannot_be_used_are_refused(key, change, message, tmp_path):
    content, _ = make_coco(1)
    content[key][0] |= change
    if key == "categories":
        del content[key][0]["name"]
        message = "entry 0 of categories lacks one of"
    with pytest.raises(ValueError, match=f"truth.json: {message}"):
        write_truth(tmp_path, content)


@pytest.mark.parametrize("limit", [1, 5])
def test_the_limit_can_be_lowered(limit, tmp_path):
    content, results = make_coco(3, num_classes=1, most_copies=20)
    evaluation = evaluate(write_truth(tmp_path, content), results, "segm", limit)
    most = np.unique(evaluation.matches().dt_image, return_counts=True)[1].max()
    assert evaluation.limit == most == limit


def test_a_file_that_is_not_coco_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"truth.json is not a COCO file: it has no \['images', 'cat"
    ):
        write_truth(tmp_path, {"annotations": []})


def make_lvis(seed):
    """Returns LVIS annotations and results. Some classes of an image are neither annotated nor
    marked as absent, and one of its annotated classes is not annotated exhaustively."""
    content, results = make_coco(seed, num_classes=6, most_copies=9)
    rng = np.random.default_rng(seed)
    for k, category in enumerate(content["categories"]):
        category |= {"frequency": "rcf"[k % 3], "image_count": 3, "instance_count": 9}
    ids = [x["id"] for x in content["categories"]]
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 0
    for image in content["images"]:
        present = {x["category_id"] for x in content["annotations"] if x["image_id"] == image["id"]}
        absent = [k for k in ids if k not in present]
        image["neg_category_ids"] = rng.permutation(absent)[: len(absent) // 2].tolist()
        image["not_exhaustive_category_ids"] = sorted(present)[:1]
    extra = [{**x, "category_id": int(rng.choice(ids)), "score": x["score"] / 2} for x in results]
    return content, [*results, *extra]


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_lvis_equals_lvis_api(seed, task, tmp_path, monkeypatch):
    lvis = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis 0.5.3 still uses np.float
    content, results = make_lvis(seed)
    truth = write_truth(tmp_path, content, is_lvis=True)
    results = copy.deepcopy(results)
    evaluation = evaluate(truth, results, task)
    if task == "segm":
        for result in results:
            result.pop("bbox")
    api = lvis.LVIS(str(tmp_path / "truth.json"))
    expected = lvis.LVISEval(api, lvis.LVISResults(api, results, max_dets=300), task)
    expected.run()
    ours = {**evaluation.metrics(), **evaluation.frequency_metrics()}
    for name in (*NAMES, "APr", "APc", "APf"):
        value = expected.get_results()[name]
        assert ours[name] == pytest.approx(100 * value if value > -1 else np.nan, nan_ok=True), name


def test_matches_of_lvis_give_the_same_ap(tmp_path):
    content, results = make_lvis(1)
    evaluation = evaluate(write_truth(tmp_path, content, is_lvis=True), results, "segm")
    matches = evaluation.matches()
    for k in range(6):
        num_objects = ((matches.gt_class == k) & ~matches.gt_ignored[0]).sum()
        found = matches.dt_matched[0, 0] & ~matches.dt_ignored[0, 0] & (matches.dt_class == k)
        recall = evaluation.recall[0, k, 0]
        assert recall == (pytest.approx(found.sum() / num_objects) if num_objects else -1)


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize(("name", "limit"), [("coco_photos_val", 100), ("nuclei_val", 400)])
def test_equals_pycocotools_on_real_annotations(name, limit, task):
    """Covers photos with crowds and polygons, and microscope images with hundreds of objects."""
    path = SHARED_DATA / name / "annotations.json"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    content, rng = json.loads(path.read_text()), np.random.default_rng(0)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    some = {image["id"] for image in content["images"][::3]}  # pycocotools is slow
    results = []
    for annotation in content["annotations"]:
        for _ in range(rng.integers(0, 3) if annotation["image_id"] in some else 0):
            mask = np.roll(coco.annToMask(annotation), rng.integers(-4, 5, 2), (0, 1))
            result = {key: annotation[key] for key in ("image_id", "category_id")}
            result |= {"segmentation": encode(mask), "score": round(float(rng.random()), 2)}
            results.append({**result, "bbox": coco_mask.toBbox(encode(mask)).tolist()})
    evaluation = evaluate(GroundTruth(str(path)), results, task, limit)
    assert_equal(evaluation, official(content, results, task, limit))
