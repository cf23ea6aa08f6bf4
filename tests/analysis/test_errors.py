"""Kinds of errors: each synthetic mistake is classified, and its repair restores the lost AP."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from made_scene import detection, objects_of, rectangle, scene_of

from mask_head_plugin.analysis.errors import KINDS
from mask_head_plugin.analysis.measures import measure
from mask_head_plugin.evaluation.bootstrap import average_precision
from mask_head_plugin.evaluation.coco_ap import Evaluation, GroundTruth

sys.path.insert(0, str(ROOT / "tests" / "evaluation"))
from made_data import make_coco

A, B = rectangle(10, 10, 40, 40), rectangle(80, 60, 40, 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a difficult data set, detections, and the metrics that the evaluation computes."""
    content, results = make_coco(4, num_images=12)
    path = tmp_path_factory.mktemp("made") / "truth.json"
    path.write_text(json.dumps(content))
    truth = GroundTruth(str(path))
    metrics = {
        task: Evaluation(truth, truth.detections(results, task), task).metrics()
        for task in ("bbox", "segm")
    }
    return content, results, metrics


def findings_of(folder, content, results):
    return measure(scene_of(folder, content, results), 100, 28)


def won(findings, task="bbox", threshold=0.5):
    return {name: findings.value(task, "error", name, threshold) for name in KINDS}


def counts(findings, task="bbox", threshold=0.5):
    errors = findings.errors[task][threshold]
    return {name: errors.count(k) for k, name in enumerate(KINDS) if errors.count(k)}


# Two objects of one class: the first is found, and the second has the named error.
CASES = {
    "class": [detection(1, 1, A), detection(1, 2, B, 0.8)],
    "location": [detection(1, 1, A), detection(1, 1, np.roll(B, 20, 1), 0.8)],
    "missed": [detection(1, 1, A)],
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_a_lost_object_is_regained_only_by_the_repair_of_its_error(tmp_path, kind, task):
    content = objects_of([(1, 1, A), (1, 1, B)])
    findings = findings_of(tmp_path, content, CASES[kind])
    assert counts(findings, task) == {kind: 1}
    # One of two objects is found, so precision is 1 up to recall 0.5, at 51 of the 101 recalls.
    assert findings.value(task, "AP", "AP50") == pytest.approx(5100 / 101)
    expected = {name: 0.0 for name in KINDS} | {kind: 100 - 5100 / 101}
    assert won(findings, task) == pytest.approx(expected)


def test_false_detections_cost_exactly_what_their_removal_regains(tmp_path):
    wrong = {
        "background": detection(1, 1, rectangle(120, 5, 30, 30), 0.95),
        "both": detection(1, 1, np.roll(B, 20, 1), 0.95),
    }
    content = objects_of([(1, 1, A), (1, 2, B)])
    for kind, extra in wrong.items():
        findings = findings_of(tmp_path, content, [detection(1, 1, A), detection(1, 2, B), extra])
        assert counts(findings) == {kind: 1}
        # The class of A has precision 1/2 at all recalls; the other class is perfect.
        assert won(findings)[kind] == pytest.approx(25)
        assert findings.value("bbox", "AP", "AP50") == pytest.approx(75)


def test_a_duplicate_lowers_the_precision_of_all_lower_scores(tmp_path):
    content = objects_of([(1, 1, A), (1, 1, B)])
    results = [detection(1, 1, A, 0.9), detection(1, 1, A, 0.8), detection(1, 1, B, 0.7)]
    findings = findings_of(tmp_path, content, results)
    assert counts(findings) == {"duplicate": 1}
    # Precision is 1 at 51 recalls and 2/3 at the other 50.
    assert findings.value("bbox", "AP", "AP50") == pytest.approx((5100 + 5000 * 2 / 3) / 101)
    assert won(findings)["duplicate"] == pytest.approx(5000 / 3 / 101)


def test_only_one_of_two_errors_about_an_object_is_repaired(tmp_path):
    content = objects_of([(1, 1, A), (1, 1, B)])
    shifted = [detection(1, 1, np.roll(B, k, 1), score) for k, score in ((20, 0.8), (22, 0.7))]
    findings = findings_of(tmp_path, content, [detection(1, 1, A), *shifted])
    assert counts(findings) == {"location": 2}
    assert findings.errors["bbox"][0.5].repaired.sum() == 1
    assert won(findings)["location"] == pytest.approx(100 - findings.value("bbox", "AP", "AP50"))


def test_a_detection_within_a_crowd_is_not_an_error(tmp_path):
    content = objects_of([(1, 1, A), (1, 1, rectangle(60, 50, 80, 60))], crowds=[1])
    results = [detection(1, 1, A, 0.5), detection(1, 1, B, 0.9)]
    findings = findings_of(tmp_path, content, results)
    assert counts(findings) == {} and findings.value("bbox", "AP", "AP50") == 100


def test_a_rough_mask_in_a_correct_box_is_an_error_of_masks_only(tmp_path):
    content = objects_of([(1, 1, A)])
    rough = A.copy()
    rough[11:49, 11:40] = 0  # leaves a frame with the same box as A
    findings = findings_of(tmp_path, content, [detection(1, 1, rough)])
    assert counts(findings) == {} and counts(findings, "segm") == {"location": 1}


def test_without_detections_all_objects_are_missed(tmp_path):
    findings = findings_of(tmp_path, objects_of([(1, 1, A), (2, 2, B)]), [])
    assert counts(findings) == {"missed": 2}
    assert findings.value("bbox", "AP", "AP") == 0
    # With the missed objects removed, no object is left and AP is undefined.
    assert np.isnan(won(findings)["missed"])


def test_ap_equals_that_of_the_evaluation_with_ties_and_crowds(tmp_path, made):
    content, results, evaluations = made
    findings = findings_of(tmp_path, content, results)
    for task, metrics in evaluations.items():
        for name in ("AP", "AP50", "AP75", "APs", "APm"):
            expected = pytest.approx(metrics[name], abs=1e-9, nan_ok=True)
            assert findings.value(task, "AP", name) == expected
        assert average_precision(findings.found[task].matches) == pytest.approx(metrics["AP"])


def test_lvis_files_are_evaluated_by_lvis_rules(tmp_path):
    """Some classes are negative or not exhaustively annotated in some images."""
    content, results = make_coco(5, num_images=12)
    ids = [x["id"] for x in content["categories"]]
    for k, image in enumerate(content["images"]):
        image["neg_category_ids"] = ids[: k % 3]
        image["not_exhaustive_category_ids"] = ids[: k % 2]
    for x in content["annotations"]:
        x["iscrowd"] = 0
    findings = findings_of(tmp_path, content, results)
    truth = GroundTruth(str(tmp_path / "annotations.json"), is_lvis=True)
    for task in ("bbox", "segm"):
        metrics = Evaluation(truth, truth.detections(results, task), task).metrics()
        for name in ("AP", "AP50", "APs"):
            assert findings.value(task, "AP", name) == pytest.approx(metrics[name], abs=1e-9)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_errors_equal_a_slow_reference(tmp_path, made, task):
    """The reference classifies each false positive from the definition, with plain loops."""
    content, results, _ = made
    findings = findings_of(tmp_path, content, results)
    scene, assignment = findings.scene, findings.found[task]
    for threshold in (0.5, 0.75):
        errors = findings.errors[task][threshold]
        at = assignment.at(threshold)
        for n, row in enumerate(assignment.rows):
            if at.dt_matched[0, 0, n] or at.dt_ignored[0, 0, n]:
                assert errors.kind[n] < 0
                continue
            image = scene.dt_image[row]
            gt = scene.gt_slices[image]
            own = other = 0.0
            for g in range(gt.start, gt.stop):
                iou = assignment.ious[image][row - scene.dt_slices[image].start, g - gt.start]
                if scene.gt_crowd[g]:
                    continue
                if scene.gt_class[g] == scene.dt_class[row]:
                    own = max(own, iou)
                else:
                    other = max(other, iou)
            if 0.1 <= own <= threshold:
                expected = "location"
            elif other >= threshold:
                expected = "class"
            elif own >= threshold:
                expected = "duplicate"
            elif max(own, other) <= 0.1:
                expected = "background"
            else:
                expected = "both"
            assert KINDS[errors.kind[n]] == expected
