"""Mask quality, offsets, thresholds, confusions and scores, checked against hand-worked cases."""

from __future__ import annotations

import argparse
import math
import shlex

import flags
import numpy as np
import pytest
from made_scene import detection, objects_of, rectangle, ring, scene_of

from mask_head_plugin.analysis.assignment import assign
from mask_head_plugin.analysis.curves import (
    Threshold,
    ap_by_density,
    best_thresholds,
    confusion,
    reliability,
    threshold_flag,
)
from mask_head_plugin.analysis.mask_quality import (
    MAP_MARGIN,
    MAP_SIDE,
    box_offsets,
    mask_quality,
    quality_rows,
)
from mask_head_plugin.demo.thresholds import parsed_thresholds
from mask_head_plugin.evaluation.boundary import boundary_iou, mask_boundary

A, B = rectangle(10, 10, 40, 40), rectangle(80, 60, 40, 20)


def quality_of(folder, content, results):
    scene = scene_of(folder, content, results)
    return scene, mask_quality(scene, box_offsets(scene, assign(scene, "bbox", 100)))


def test_a_mask_without_its_right_quarter_is_measured_and_mapped_correctly(tmp_path):
    cut = A.copy()
    cut[:, 40:] = 0
    found = detection(1, 1, cut, bbox=[10, 10, 40, 40])
    scene, quality = quality_of(tmp_path, objects_of([(1, 1, A)]), [found])
    assert quality.iou[0] == quality.area_ratio[0] == 0.75 and quality.fill[0] == 1
    expected = boundary_iou(*(mask_boundary(x[0]) for x in (scene.dt_mask, scene.gt_mask)))
    assert quality.boundary[0] == pytest.approx(expected)
    places = -MAP_MARGIN + (np.arange(MAP_SIDE) + 0.5) / MAP_SIDE * (1 + 2 * MAP_MARGIN)
    inside = (places > 0.05) & (places < 0.95)
    missing = quality.missing[inside][:, inside]
    assert (missing[:, places[inside] > 0.8] == 1).all()
    assert (missing[:, places[inside] < 0.7] == 0).all() and not quality.extra.any()


def test_quality_is_reported_by_size_shape_fill_and_class(tmp_path):
    two = np.maximum(rectangle(100, 10, 5, 40), rectangle(135, 10, 5, 40))
    masks = [(1, 1, A), (1, 2, ring(20, 60, 50)), (1, 3, two)]
    results = [detection(image, category, mask) for image, category, mask in masks]
    found = quality_rows(*quality_of(tmp_path, objects_of(masks), results))
    rows = {(x.group, x.name): x for x in found}
    assert all(x.iou == x.boundary == x.area_ratio == 1 for x in rows.values())
    counts = {key: x.count for key, x in rows.items()}
    assert counts["all", "all"] == 3 and counts["size", "medium"] == 2
    for name in ("one part", "several parts", "holes"):
        assert counts["shape", name] == 1
    assert counts["fill", "thin, below 0.4"] == 1 and counts["fill", "full, from 0.7"] >= 1
    assert counts["class", "dog"] == counts["class", "cat"] == counts["class", "bird"] == 1


def test_offsets_are_measured_at_the_edges_of_found_objects_only(tmp_path):
    found = [
        detection(1, 1, A, bbox=[12, 9, 40, 44]),
        detection(1, 1, B, bbox=[0, 100, 10, 10]),
    ]
    scene = scene_of(tmp_path, objects_of([(1, 1, A), (1, 1, B)]), found)
    offsets = box_offsets(scene, assign(scene, "bbox", 100))
    assert offsets.edges.tolist() == [[2, -1, 2, 3]]


def test_the_best_threshold_lies_between_the_last_hit_and_the_first_miss(tmp_path):
    """F1 is 4/5 after hits at 0.9 and 0.8, 4/6 after a miss at 0.6, and 6/7 after a hit at 0.3."""
    objects = [(1, 1, A), (1, 1, B), (2, 1, A), (2, 2, B)]
    results = [
        detection(1, 1, A, 0.9),
        detection(1, 1, B, 0.8),
        detection(1, 1, rectangle(0, 100, 10, 10), 0.6),
        detection(2, 1, A, 0.3),
    ]
    scene = scene_of(tmp_path, objects_of(objects), results)
    dog, cat = best_thresholds(scene, assign(scene, "segm", 100))
    assert dog.class_name == "dog" and dog.f1 == pytest.approx(6 / 7)
    assert 0 <= dog.score < 0.3 and (dog.precision, dog.recall) == (0.75, 1)
    assert dog.f1_at_half == pytest.approx(4 / 6)
    assert cat.f1 == 0 and math.isnan(cat.score)
    assert threshold_flag([dog, cat]) == f"--class-thresholds dog={dog.score}"
    results.pop()
    scene = scene_of(tmp_path, objects_of(objects), results)
    dog = best_thresholds(scene, assign(scene, "segm", 100))[0]
    assert 0.6 <= dog.score < 0.8 and dog.f1 == pytest.approx(4 / 5)


def test_a_threshold_accepts_all_or_none_of_tied_scores(tmp_path):
    results = [detection(1, 1, A, 0.5), detection(1, 1, rectangle(0, 100, 10, 10), 0.5)]
    scene = scene_of(tmp_path, objects_of([(1, 1, A)]), results)
    (best,) = best_thresholds(scene, assign(scene, "segm", 100))
    assert best.f1 == pytest.approx(2 / 3) and best.score < 0.5


def test_the_flag_gives_thresholds_at_full_precision():
    for score in (0.9999995, 0.1 + 0.2, 1e-5):
        text = threshold_flag([Threshold("dog", score, 1, 1, 1, 1)])
        assert float(text.partition("dog=")[2]) == score


def test_names_with_spaces_are_quoted_in_the_flag():
    flag = threshold_flag([Threshold("traffic light", 0.25, 1, 1, 1, 1)])
    assert flag == "--class-thresholds 'traffic light=0.25'"


@pytest.mark.parametrize("names", [["traffic light", "a,b", "étoile=1", "it's", "-x", "-- y"], []])
def test_tools_read_the_flag_as_it_is_printed(names):
    pairs = {name: (k + 1) / 100 for k, name in enumerate(names)}
    text = threshold_flag([Threshold(name, score, 1, 1, 1, 1) for name, score in pairs.items()])
    parser = argparse.ArgumentParser()
    flags.add_inputs(parser)
    args = ["--input", "a.png", "--output", "out", *shlex.split(text)]
    assert parsed_thresholds(parser.parse_args(args).class_thresholds) == pairs


def test_confusions_count_each_object_and_each_confident_detection_once(tmp_path):
    far = rectangle(0, 100, 10, 10)
    objects = [(1, 1, A), (1, 2, B), (2, 2, A), (2, 3, B)]
    results = [
        detection(1, 1, A),
        detection(1, 3, B),
        detection(2, 2, A),
        detection(2, 2, far),
        detection(2, 1, far, 0.1),  # below the threshold
    ]
    scene = scene_of(tmp_path, objects_of(objects), results)
    counts = confusion(scene, assign(scene, "segm", 100), scene.dt_score > 0.5)
    expected = np.zeros((4, 4), int)
    expected[0, 0] = expected[1, 2] = expected[1, 1] = 1
    expected[2, 3] = expected[3, 1] = 1
    assert (counts == expected).all()


def test_reliability_is_the_fraction_of_hits_by_score(tmp_path):
    results = [detection(1, 1, A, 0.95), detection(1, 1, B, 0.92)]
    results += [detection(1, 1, rectangle(0, 100, 10, 10), s) for s in (0.94, 0.32)]
    scene = scene_of(tmp_path, objects_of([(1, 1, A), (1, 1, B)]), results)
    assignment = assign(scene, "segm", 100)
    found = reliability(assignment.at(0.5), scene.dt_score[assignment.rows])
    assert found.count[[3, 9]].tolist() == [1, 3] and found.count.sum() == 4
    assert found.precision[9] == pytest.approx(2 / 3) and found.precision[3] == 0
    gap = (0.95 + 0.92 + 0.94) / 3 - 2 / 3
    assert found.error == pytest.approx((3 * gap + 0.32) / 4)


def test_ap_by_density_is_computed_on_the_images_of_that_density(tmp_path):
    small = [rectangle(4 + 18 * (k % 8), 4 + 40 * (k // 8), 12, 12) for k in range(9)]
    objects = [(1, 1, A), *((2, 1, x) for x in small)]
    results = [detection(1, 1, A), *(detection(2, 1, x) for x in small[:4])]
    scene = scene_of(tmp_path, objects_of(objects), results)
    one, many = ap_by_density(assign(scene, "segm", 100).matches)
    assert (one.name, one.images, one.ap) == ("1", 1, 100)
    assert (many.name, many.objects) == ("8 to 15", 9)
    assert many.ap == pytest.approx(4500 / 101)  # precision is 1 at recalls 0 to 0.44
