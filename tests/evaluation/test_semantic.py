"""Compares semantic maps with examples and loops over pixels, and metrics with detectron2's."""

from __future__ import annotations

import contextlib
import io
import math
import warnings

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from mask_head_plugin.evaluation import semantic
from mask_head_plugin.evaluation.semantic import (
    IGNORED,
    confusion_matrix,
    evaluate_semantic,
    ground_truth_map,
    semantic_map,
    semantic_metrics,
)

HW = (4, 5)
CONTIGUOUS_ID = {11: 0, 7: 1, 30: 2}
NAMES = ["cat", "dog", "tree"]


def encode(mask, as_text=False):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {**rle, "counts": rle["counts"].decode()} if as_text else rle


def encode_uncompressed(mask):
    counts, value = [0], False
    for bit in np.asarray(mask, bool).T.reshape(-1).tolist():
        if bit != value:
            counts.append(0)
            value = bit
        counts[-1] += 1
    return {"size": list(np.shape(mask)), "counts": counts}


def rectangle(x, y, width, height, hw=HW):
    mask = np.zeros(hw, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def polygon(x, y, width, height):
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def annotate(segmentation, category_id=11, **more):
    return {"segmentation": segmentation, "category_id": category_id, **more}


def map_of(annotations, hw=HW):
    return ground_truth_map(annotations, hw, CONTIGUOUS_ID).tolist()


def slow_semantic_map(masks, classes, scores, hw, threshold):
    painted = [[0] * hw[1] for _ in range(hw[0])]
    for y in range(hw[0]):
        for x in range(hw[1]):
            best = -math.inf
            for mask, k, score in zip(masks, classes, scores, strict=True):
                if mask[y][x] and score >= threshold and score > best:
                    best, painted[y][x] = score, k + 1
    return painted


def slow_ground_truth_map(masks, classes, crowds, hw):
    painted = [[0] * hw[1] for _ in range(hw[0])]
    for y in range(hw[0]):
        for x in range(hw[1]):
            smallest = math.inf
            for mask, k, is_crowd in zip(masks, classes, crowds, strict=True):
                area = sum(map(sum, mask))
                if mask[y][x] and is_crowd and smallest == math.inf:
                    painted[y][x] = IGNORED
                if mask[y][x] and not is_crowd and area <= smallest:
                    smallest, painted[y][x] = area, k + 1
    return painted


@st.composite
def labelled_masks(draw):
    """Draws an image size, masks of that size as nested lists of bool, and for each mask a class
    and an integer from 0 to 3."""
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    mask = st.lists(row, min_size=height, max_size=height)
    items = draw(st.lists(st.tuples(mask, st.integers(0, 2), st.integers(0, 3)), max_size=6))
    return (height, width), *([item[i] for item in items] for i in range(3))


@settings(deadline=None)
@given(labelled_masks(), st.integers(0, 3))
def test_semantic_map_equals_a_loop_over_pixels(labelled, threshold):
    hw, masks, classes, scores = labelled
    rles = [encode(mask, as_text=i % 2 == 0) for i, mask in enumerate(masks)]
    actual = semantic_map(rles, classes, scores, hw, threshold)
    assert actual.shape == hw and actual.dtype == np.int32
    assert actual.tolist() == slow_semantic_map(masks, classes, scores, hw, threshold)


@settings(deadline=None)
@given(labelled_masks())
def test_ground_truth_map_equals_a_loop_over_pixels(labelled):
    hw, masks, classes, kinds = labelled
    crowds = [kind == 0 for kind in kinds]
    ids = list(CONTIGUOUS_ID)
    annotations = [
        annotate(encode_uncompressed(mask) if kind < 2 else encode(mask, kind == 2), ids[k])
        for mask, k, kind in zip(masks, classes, kinds, strict=True)
    ]
    for annotation, is_crowd in zip(annotations, crowds, strict=True):
        if is_crowd:
            annotation["iscrowd"] = 1
    actual = ground_truth_map(annotations, hw, CONTIGUOUS_ID)
    assert actual.shape == hw and actual.dtype == np.int32
    assert actual.tolist() == slow_ground_truth_map(masks, classes, crowds, hw)


def test_the_best_score_is_on_top_regardless_of_order():
    rles = [
        encode(rectangle(0, 0, 2, 4)),
        encode(rectangle(1, 0, 2, 4)),
        encode(rectangle(2, 0, 2, 4)),
    ]
    assert semantic_map(rles, [0, 1, 2], [0.6, 0.9, 0.7], HW, 0.5).tolist() == [[1, 2, 2, 3, 0]] * 4


def test_the_first_of_equal_scores_is_on_top():
    rles = [encode(rectangle(0, 0, 3, 4)), encode(rectangle(2, 0, 2, 4))]
    assert semantic_map(rles, [1, 0], [0.5, 0.5], HW, 0.5).tolist() == [[2, 2, 2, 1, 0]] * 4


def test_the_threshold_is_inclusive():
    rles = [encode(rectangle(0, 0, 1, 4)), encode(rectangle(1, 0, 1, 4))]
    scores = [0.7, math.nextafter(0.7, 0)]
    assert semantic_map(rles, [0, 1], scores, HW, 0.7).tolist() == [[1, 0, 0, 0, 0]] * 4


def test_no_detections_or_annotations_give_background():
    assert semantic_map([], [], [], HW, 0.5).tolist() == [[0] * 5] * 4
    assert map_of([]) == [[0] * 5] * 4


def test_every_form_of_segmentation_is_decoded():
    mask = rectangle(1, 0, 3, 2) | rectangle(0, 3, 2, 1)
    forms = [
        [polygon(1, 0, 3, 2), polygon(0, 3, 2, 1)],
        encode(mask),
        encode(mask, as_text=True),
        encode_uncompressed(mask),
    ]
    expected = (mask * 2).tolist()
    assert [map_of([annotate(form, 7)]) for form in forms] == [expected] * 4


def test_the_smaller_mask_is_on_top_or_the_later_one_if_both_have_the_same_size():
    large, small = annotate([polygon(0, 0, 3, 4)], 11), annotate([polygon(2, 0, 2, 4)], 7)
    assert map_of([large, small]) == map_of([small, large]) == [[1, 1, 2, 2, 0]] * 4
    equal = annotate([polygon(1, 0, 3, 4)], 30)
    assert map_of([large, equal]) == [[1, 3, 3, 3, 0]] * 4
    assert map_of([equal, large]) == [[1, 1, 1, 3, 0]] * 4


def test_size_is_counted_in_pixels_and_not_read_from_the_file():
    large = annotate([polygon(0, 0, 3, 4)], 11, area=1)
    small = annotate([polygon(2, 0, 2, 4)], 7, area=99)
    assert map_of([small, large]) == [[1, 1, 2, 2, 0]] * 4


def test_crowd_pixels_are_ignored_except_where_an_ordinary_object_is():
    crowd = annotate(encode_uncompressed(rectangle(2, 0, 2, 4)), 11, iscrowd=1)
    ordinary = annotate([polygon(0, 0, 3, 4)], 7, iscrowd=0)
    for items in ([crowd, ordinary], [ordinary, crowd]):
        assert map_of(items) == [[2, 2, 2, IGNORED, 0]] * 4


@pytest.mark.parametrize("segmentation", [[], [[1, 1, 3, 3]], [[0, 0, 3, 0, 3, 4, 0]], None])
def test_a_segmentation_without_area_covers_nothing(segmentation):
    assert map_of([annotate(segmentation)]) == [[0] * 5] * 4
    if segmentation:
        assert map_of([annotate([*segmentation, polygon(0, 0, 1, 4)])]) == [[1, 0, 0, 0, 0]] * 4


def test_rles_of_the_wrong_size_are_refused():
    wrong = encode(rectangle(0, 0, 1, 1, (5, 4)))
    with pytest.raises(ValueError, match=r"RLE has the size \(5, 4\), but the image has \(4, 5\)"):
        semantic_map([wrong], [0], [0.1], HW, 0.5)
    with pytest.raises(ValueError, match=r"RLE has the size \(5, 4\)"):
        map_of([annotate(wrong)])
    with pytest.raises(ValueError, match="do not add up"):
        map_of([annotate({"size": [4, 5], "counts": [3, 4]})])


def test_detections_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        semantic_map([encode(rectangle(0, 0, 1, 1))], [0], [], HW, 0.5)


def test_an_unknown_category_is_refused():
    with pytest.raises(KeyError, match="category_id 8 "):
        map_of([annotate([polygon(0, 0, 2, 2)], 8)])


def test_confusion_has_the_truth_in_rows_and_skips_ignored_pixels():
    truth = np.array([[0, 1, 1], [2, IGNORED, 2]], np.int32)
    predicted = np.array([[0, 1, 2], [2, 1, 0]], np.int32)
    actual = confusion_matrix(truth, predicted, 2)
    assert actual.tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 1]] and actual.dtype == np.int64


def test_confusion_of_only_ignored_or_no_pixels_is_zero():
    for truth in (np.full((2, 3), IGNORED, np.int32), np.zeros((0, 3), np.int32)):
        assert confusion_matrix(truth, np.zeros_like(truth), 2).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize("values", [(3, 0), (-2, 0), (0, 3), (0, -1)])
def test_confusion_refuses_values_that_are_not_classes(values):
    truth, predicted = (np.full((1, 1), value, np.int32) for value in values)
    with pytest.raises(ValueError, match=("truth" if values[0] else "predicted") + " has values"):
        confusion_matrix(truth, predicted, 2)


def test_confusion_refuses_maps_of_different_shape():
    with pytest.raises(ValueError, match=r"truth is \(2, 3\) and predicted \(3, 2\)"):
        confusion_matrix(np.zeros((2, 3), np.int32), np.zeros((3, 2), np.int32), 1)


def test_metrics_of_a_hand_worked_matrix():
    """Background: 6 of 8 pixels found, 1 false positive. Cat: 1 of 2 pixels found, 1 false
    positive. Dog: no true pixels, 1 false positive."""
    confusion = np.array([[6, 1, 1], [1, 1, 0], [0, 0, 0]])
    actual = semantic_metrics(confusion, ["cat", "dog"])
    expected = {
        "mIoU": 100 * (6 / 9 + 1 / 3) / 2,
        "fwIoU": 100 * (6 / 9 * 0.8 + 1 / 3 * 0.2),
        "IoU-background": 100 * 6 / 9,
        "IoU-cat": 100 / 3,
        "IoU-dog": math.nan,
        "mACC": 100 * (6 / 8 + 1 / 2) / 2,
        "pACC": 70,
        "ACC-background": 75,
        "ACC-cat": 50,
        "ACC-dog": math.nan,
    }
    assert actual == pytest.approx(expected, nan_ok=True)
    assert list(actual) == list(expected) and {type(x) for x in actual.values()} == {float}


@pytest.fixture(scope="module")
def stock_metrics():
    """Yields a function that runs detectron2's SemSegEvaluator on maps in memory."""
    name, maps = "semantic_maps_in_memory", {}
    names = ["background", *NAMES]
    DatasetCatalog.register(name, lambda: [{"file_name": "image", "sem_seg_file_name": "truth"}])
    MetadataCatalog.get(name).set(stuff_classes=names, ignore_label=IGNORED)
    evaluator = SemSegEvaluator(
        name, distributed=False, sem_seg_loading_fn=lambda path, dtype: maps[path].astype(dtype)
    )

    def evaluate(pairs):
        evaluator.reset()
        for truth, predicted in pairs:
            maps["truth"] = truth
            one_hot = torch.from_numpy(predicted[None] == np.arange(len(names))[:, None, None])
            evaluator.process([{"file_name": "image"}], [{"sem_seg": one_hot.float()}])
        metrics = evaluator.evaluate()["sem_seg"]
        return {
            key: value
            for key, value in metrics.items()
            if "Boundary" not in key and "min(" not in key
        }

    yield evaluate
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), num_true=st.integers(1, 4), num_found=st.integers(1, 4))
def test_metrics_equal_those_of_sem_seg_evaluator(stock_metrics, seed, num_true, num_found):
    rng = np.random.default_rng(seed)
    pairs = [
        (rng.integers(IGNORED, num_true, HW, np.int32), rng.integers(0, num_found, HW, np.int32))
        for _ in range(2)
    ]
    confusion = sum(confusion_matrix(truth, predicted, 3) for truth, predicted in pairs)
    actual, expected = semantic_metrics(confusion, NAMES), stock_metrics(pairs)
    assert list(actual) == list(expected)
    assert actual == pytest.approx(expected, nan_ok=True)


def test_metrics_without_pixels_are_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(math.isnan, semantic_metrics(np.zeros((2, 2), np.int64), ["cat"]).values()))


def test_names_that_collide_or_do_not_fit_are_refused():
    confusion = np.ones((3, 3), np.int64)
    for names in (["cat", "background"], ["cat", "cat"]):
        with pytest.raises(ValueError, match=names[1]):
            semantic_metrics(confusion, names)
        with pytest.raises(ValueError, match=names[1]):
            evaluate_semantic(None, None, None, {}, names, 0.5)
    with pytest.raises(ValueError, match="1 class_names"):
        semantic_metrics(confusion, ["cat"])


def build_coco(annotations_of, load=COCO):
    """Builds a COCO object whose images have size HW.

    Args:
        annotations_of: annotations by image id.
        load: function that returns an empty COCO object.
    """
    annotations = [
        {"id": 100 * image_id + i, "image_id": image_id, "area": 1, "bbox": [0, 0, 1, 1], **item}
        for image_id, items in annotations_of.items()
        for i, item in enumerate(items, start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = load()
        coco.dataset = {
            "images": [{"id": i, "height": HW[0], "width": HW[1]} for i in annotations_of],
            "annotations": annotations,
            "categories": [{"id": i, "name": NAMES[k]} for i, k in CONTIGUOUS_ID.items()],
        }
        coco.createIndex()
    return coco


def detect(mask, category_id, score, image_id=1, **more):
    base = {"image_id": image_id, "category_id": category_id, "score": score}
    return {**base, "segmentation": encode(mask, as_text=True), **more}


def evaluate(coco, results, image_ids, threshold=0.5):
    return evaluate_semantic(coco, results, image_ids, CONTIGUOUS_ID, NAMES, threshold)


def load_faster_coco():
    return pytest.importorskip("faster_coco_eval").COCO()


@pytest.mark.parametrize("load", [COCO, load_faster_coco])
def test_a_hand_worked_evaluation(load):
    """In image 1, a cat of 8 pixels is found and 4 pixels are wrongly predicted as a dog. In image
    2, a dog is missed."""
    truth = {1: [annotate([polygon(0, 0, 2, 4)], 11)], 2: [annotate([polygon(0, 0, 1, 4)], 7)]}
    results = [
        detect(rectangle(2, 0, 1, 4), 7, 0.6),
        detect(rectangle(0, 0, 2, 4), 11, 0.9),
        detect(rectangle(0, 0, 5, 4), 30, 0.4),
        detect(rectangle(0, 0, 5, 4), 30, 0.9, image_id=3),
    ]
    actual = evaluate(build_coco({**truth, 3: []}, load), results, [1, 2])
    assert actual["IoU-cat"] == actual["ACC-cat"] == 100
    assert actual["IoU-dog"] == actual["ACC-dog"] == 0
    assert actual["IoU-background"] == pytest.approx(100 * 24 / 32)
    assert actual["ACC-background"] == pytest.approx(100 * 24 / 28)
    assert actual["pACC"] == pytest.approx(100 * 32 / 40)
    assert math.isnan(actual["IoU-tree"])


def test_ground_truth_given_as_results_scores_100_and_crowds_do_not_count():
    coco = build_coco(
        {
            1: [
                annotate([polygon(0, 0, 4, 4)], 11),
                annotate([polygon(1, 1, 2, 2)], 7),
                annotate(encode(rectangle(3, 0, 2, 4)), 30, iscrowd=1),
            ],
            2: [],
        }
    )
    results = [
        detect(rectangle(0, 0, 4, 4), 11, 0.7),
        detect(rectangle(1, 1, 2, 2), 7, 0.8),
        detect(rectangle(4, 1, 1, 2), 7, 0.9),  # in the crowd
    ]
    actual = evaluate(coco, results, [1, 2])
    assert {key: value for key, value in actual.items() if not key.endswith("tree")} == {
        key: 100 for key in actual if not key.endswith("tree")
    }


def test_a_mask_score_replaces_the_score():
    coco = build_coco({1: [annotate([polygon(0, 0, 5, 4)], 11)]})
    whole = rectangle(0, 0, 5, 4)
    dog = detect(whole, 7, 0.9)
    assert evaluate(coco, [detect(whole, 11, 0.8), dog], [1])["pACC"] == 0
    assert evaluate(coco, [detect(whole, 11, 0.8, mask_score=0.95), dog], [1])["pACC"] == 100
    assert evaluate(coco, [detect(whole, 11, 0.1, mask_score=0.5)], [1])["pACC"] == 100
    assert evaluate(coco, [detect(whole, 11, 0.9, mask_score=0.4)], [1])["pACC"] == 0


def test_without_detections_everything_is_background():
    actual = evaluate(build_coco({1: [annotate([polygon(0, 0, 5, 2)], 11)], 2: []}), [], [1, 2])
    assert (actual["pACC"], actual["IoU-background"], actual["IoU-cat"]) == (75, 75, 0)


def test_without_images_metrics_are_nan():
    assert all(map(math.isnan, evaluate(build_coco({1: []}), [], []).values()))


def test_an_error_about_an_rle_of_the_wrong_size_names_the_image():
    coco, wrong = build_coco({5: [], 6: []}), rectangle(0, 0, 1, 1, (5, 4))
    for score in (0.9, 0.1):
        with pytest.raises(ValueError, match=r"image 6: an RLE has the size \(5, 4\)"):
            evaluate(coco, [detect(wrong, 11, score, image_id=6)], [5, 6])
    with pytest.raises(ValueError, match="image 6: an RLE"):
        evaluate(build_coco({6: [annotate(encode(wrong))]}), [], [6])


def test_unknown_ids_are_refused():
    coco = build_coco({1: []})
    with pytest.raises(KeyError, match="image_ids has 2"):
        evaluate(coco, [], [1, 2])
    with pytest.raises(KeyError, match="category_id 8 "):
        evaluate(coco, [detect(rectangle(0, 0, 1, 1), 8, 0.9)], [1])


def test_a_class_without_a_name_is_refused():
    coco = build_coco({1: [annotate([polygon(0, 0, 2, 2)], 30)]})
    with pytest.raises(ValueError, match="image 1: truth has values outside"):
        evaluate_semantic(coco, [], [1], CONTIGUOUS_ID, ["cat", "dog"], 0.5)


def test_masks_are_decoded_one_at_a_time(monkeypatch):
    kinds = []

    def decode(rle):
        kinds.append(type(rle))
        return mask_util.decode(rle)

    monkeypatch.setattr(semantic, "mask_util", type("Spy", (), {"decode": staticmethod(decode)}))
    semantic_map([encode(rectangle(0, 0, 1, 1))] * 3, [0] * 3, [0.9] * 3, HW, 0.5)
    assert kinds == [dict] * 3
