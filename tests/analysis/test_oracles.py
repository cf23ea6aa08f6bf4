"""Oracles: each one repairs all errors of its branch and no other errors."""

from __future__ import annotations

import numpy as np
import pytest
from made_scene import (
    crowded_content,
    decode,
    detection,
    encode,
    objects_of,
    perfect,
    rectangle,
    ring,
    scene_of,
)
from pycocotools import mask as coco_mask

from mask_head_plugin.analysis.assignment import assign
from mask_head_plugin.analysis.errors import find_errors
from mask_head_plugin.analysis.measures import measure
from mask_head_plugin.analysis.oracles import cut_to_boxes, grid_ious, grid_name, perfect_classes
from mask_head_plugin.evaluation.bootstrap import average_precision
from mask_head_plugin.evaluation.mask_window import mask_window

A, B = rectangle(10, 10, 40, 40), rectangle(80, 60, 40, 40)


def aps(folder, content, results, task="segm"):
    findings = measure(scene_of(folder, content, results), 100, 28)
    base = findings.value(task, "AP", "AP")
    own = [x for x in findings.measures.values() if (x.task, x.group) == (task, "oracle")]
    return {"as it is": base, **{x.name: base + x.value for x in own}}


def test_if_only_masks_are_wrong_only_perfect_masks_help_and_give_100(tmp_path):
    content = crowded_content()

    def spoil(result):
        mask = decode(result)
        x, y, w, h = (int(v) for v in result["bbox"])
        mask[y + 2 : y + h - 2, x + 2 : x + w - 2] = 0
        result["segmentation"] = encode(mask)

    found = aps(tmp_path, content, perfect(content, spoil))
    assert found["perfect masks"] == pytest.approx(100) and found["as it is"] < 60
    assert found["perfect boxes"] == found["perfect classes"] == found["as it is"]


def test_if_only_classes_are_wrong_only_perfect_classes_help_and_give_100(tmp_path):
    content = crowded_content()

    def spoil(result):
        if result["image_id"] % 2:
            result["category_id"] = result["category_id"] % 3 + 1

    for task in ("bbox", "segm"):
        found = aps(tmp_path, content, perfect(content, spoil), task)
        assert found["perfect classes"] == pytest.approx(100) and found["as it is"] < 75
        assert found["perfect boxes"] == pytest.approx(found["as it is"])


def test_if_only_boxes_are_wrong_perfect_boxes_give_100_for_boxes_and_masks(tmp_path):
    content = crowded_content()

    def spoil(result):
        """Cuts off the left fifth of the box and of the mask."""
        x, y, w, h = result["bbox"]
        cut = w // 5
        result["bbox"] = [x + cut, y, w - cut, h]
        mask = decode(result)
        mask[:, : int(x + cut)] = 0
        result["segmentation"] = encode(mask)

    results = perfect(content, spoil)
    for task in ("bbox", "segm"):
        found = aps(tmp_path, content, results, task)
        assert found["perfect boxes"] == pytest.approx(100) and found["as it is"] < 75
        assert found["perfect classes"] == pytest.approx(found["as it is"])
    # The mask branch cannot paint outside the box, so perfect masks would still be cut off.
    assert found["perfect masks"] == pytest.approx(found["as it is"])


def test_no_oracle_repairs_duplicates(tmp_path):
    content = objects_of([(1, 1, A), (1, 1, B)])
    results = [detection(1, 1, A, 0.9), detection(1, 1, A, 0.8), detection(1, 1, B, 0.7)]
    found = aps(tmp_path, content, results)
    grids = {grid_name(28), grid_name(56)}
    assert len({value for name, value in found.items() if name not in grids}) == 1


def with_class_errors(seed=0):
    """Returns objects and detections: correct, of a wrong class, and several per object."""
    rng = np.random.default_rng(seed)
    content = crowded_content()
    results = []
    for x in perfect(content):
        # Each object gets up to four shifted boxes of random classes and scores.
        for _ in range(int(rng.integers(5))):
            shift = int(rng.integers(8))
            moved = detection(x["image_id"], int(rng.integers(1, 4)), np.roll(decode(x), shift, 1))
            results.append({**moved, "score": float(rng.uniform(0.1, 1))})
    return content, results


@pytest.mark.parametrize("seed", range(4))
def test_perfect_classes_gain_at_least_what_the_class_errors_cost(tmp_path, seed):
    """The wrong classes of an object must not become duplicates, which NMS would remove."""
    findings = measure(scene_of(tmp_path, *with_class_errors(seed)), 100, 28)
    oracle = findings.measures["bbox", "oracle", "perfect classes", 0.0].matches
    base = findings.value("bbox", "AP", "AP50")
    cost = findings.value("bbox", "error", "class", 0.5)
    assert cost > 5
    assert average_precision(oracle, "AP50") - base >= cost - 1e-9


def test_perfect_classes_leave_one_detection_on_an_object_with_the_highest_score(tmp_path):
    """The object of class 1 keeps the box that found it; that of class 2 gets the best other."""
    content = objects_of([(1, 1, A), (1, 2, B)])
    near = np.roll(B, 2, 1)
    results = [
        detection(1, 1, A, 0.3),
        detection(1, 2, A, 0.9),
        detection(1, 3, A, 0.8),
        detection(1, 1, B, 0.7),
        detection(1, 3, near, 0.6),
        detection(1, 2, rectangle(5, 100, 10, 10), 0.5),
    ]
    scene = scene_of(tmp_path, content, results)
    boxes = assign(scene, "bbox", 100)
    repaired, order = perfect_classes(scene, boxes, find_errors(scene, boxes, 0.5))
    assert repaired.dt_class.tolist() == [0, 1, 1]
    assert sorted(repaired.dt_score.tolist()) == [0.5, 0.7, 0.9]
    assert (repaired.dt_box == scene.dt_box[order]).all()


def test_perfect_classes_change_nothing_if_no_class_is_wrong(tmp_path):
    content = crowded_content()
    results = [y for x in perfect(content) for y in (x, {**x, "score": x["score"] / 2})]
    scene = scene_of(tmp_path, content, results)
    boxes = assign(scene, "bbox", 100)
    _, order = perfect_classes(scene, boxes, find_errors(scene, boxes, 0.5))
    assert order.tolist() == list(range(len(results)))


def test_without_detections_oracles_gain_nothing_but_grid_limits_are_known(tmp_path):
    found = aps(tmp_path, objects_of([(1, 1, A), (1, 1, B)]), [])
    grids = {grid_name(28): 100.0, grid_name(56): 100.0}
    assert found == {"as it is": 0, **dict.fromkeys(found, 0.0), **grids}


def test_oracles_ignore_crowds(tmp_path):
    content = objects_of([(1, 1, A), (1, 1, rectangle(60, 50, 80, 60))], crowds=[1])
    found = aps(tmp_path, content, [detection(1, 1, A, 0.5), detection(1, 1, B, 0.9)])
    assert set(found.values()) == {100.0}


def test_tied_scores_keep_the_order_of_the_file_as_in_the_evaluation(tmp_path):
    content = objects_of([(1, 1, A)])
    wrong, right = detection(1, 1, B, 0.5), detection(1, 1, A, 0.5)
    assert aps(tmp_path, content, [right, wrong])["perfect masks"] == 100
    assert aps(tmp_path, content, [wrong, right])["perfect masks"] == pytest.approx(50)


def test_detections_of_overlapping_objects_keep_the_object_they_matched(tmp_path):
    """The second box is nearer to the first object, which the other detection has matched."""
    first, second = rectangle(20, 20, 40, 40), rectangle(26, 20, 40, 40)
    content = objects_of([(1, 1, first), (1, 1, second)])
    results = [detection(1, 1, first, 0.9), detection(1, 1, rectangle(22, 20, 40, 40), 0.8)]
    assert aps(tmp_path, content, results, "bbox")["perfect boxes"] == 100


def test_a_mask_is_cut_to_the_pixels_with_centres_in_the_box():
    boxes = np.array([[20.4, 5.6, 500.0, 10.0], [200.0, 5, 5, 5]])
    first, second = map(coco_mask.decode, cut_to_boxes([_bytes(A), _bytes(A)], boxes))
    expected = A.copy()
    expected[:, :20], expected[16:] = 0, 0
    assert (first == expected).all()
    assert not second.any()


def test_a_coarse_grid_loses_thin_parts_and_a_finer_one_less():
    thin = np.maximum(ring(20, 10, 100) * (np.arange(160) % 4 == 0)[None].astype(np.uint8), 0)
    masks = [_bytes(x) for x in (A, thin)]
    boxes = np.array([coco_mask.toBbox(x) for x in masks])
    coarse, fine = grid_ious(masks, boxes, [14, 112])
    assert coarse[0] > 0.99 < fine[0]
    assert coarse[1] < 0.3 < 0.9 < fine[1]


def test_mask_windows_equal_the_decoded_masks():
    full = np.ones((7, 5), np.uint8)
    for mask in (A, ring(0, 0, 60), full, np.zeros((4, 6), np.uint8), np.eye(6, dtype=np.uint8)):
        rle = coco_mask.encode(np.asfortranarray(mask))
        window = mask_window(rle)
        assert (window.within(0, 0, mask.shape) == mask).all()
        assert list(window.bits.shape) == coco_mask.toBbox(rle)[:1:-1].tolist()


def _bytes(mask):
    return coco_mask.encode(np.asfortranarray(mask))
