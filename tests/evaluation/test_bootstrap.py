"""AP of resampled images, compared with pycocotools on data sets with repeated images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_data import make_coco
from test_coco_ap import evaluate, make_lvis, official, write_truth

from mask_head_plugin.evaluation import bootstrap
from mask_head_plugin.evaluation.bootstrap import (
    average_precision,
    class_ap,
    compare,
    compare_all,
    image_weights,
    precision_recall,
    resampled_ap,
)
from mask_head_plugin.evaluation.coco_ap import METRICS
from mask_head_plugin.evaluation.matching import Matches

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)


pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy warns about NaN


def make_distinct(seed, **kwargs):
    """Returns synthetic data with distinct scores, crowds, 5 classes, and objects of all sizes."""
    content, results = make_coco(seed, num_classes=5, num_images=9, **kwargs)
    rng = np.random.default_rng(seed)
    scores = rng.permutation(len(results)) / len(results)
    results = [{**x, "score": float(s)} for x, s in zip(results, scores, strict=True)]
    for k, annotation in enumerate(content["annotations"]):
        annotation |= {"area": [600.0, 5e3, 5e4][k % 3], "iscrowd": int(k % 8 == 0)}
    return content, results


def repeat(content, results, counts):
    """Returns the data set and results with the k-th image (by id) repeated counts[k] times."""
    images, annotations, repeated = [], [], []
    ids = sorted(x["id"] for x in content["images"])
    by_id = {x["id"]: x for x in content["images"]}
    for old in np.repeat(ids, counts).tolist():
        new = {"image_id": len(images) + 1}
        images.append({**by_id[old], "id": new["image_id"]})
        for x in content["annotations"]:
            if x["image_id"] == old:
                annotations.append({**x, **new, "id": len(annotations) + 1})
        repeated += [{**x, **new} for x in results if x["image_id"] == old]
    return {**content, "images": images, "annotations": annotations}, repeated


def make_matches(true, scores, images, *, classes=None, num_images=None, objects=None):
    """Builds matches for a single area range and a single IoU threshold.

    Args:
        true: whether each detection is a true positive.
        scores: score of each detection.
        images: image index of each detection.
        classes: class index of each detection; None for a single class.
        num_images: number of images; None for one more than the largest image index.
        objects: (image, class) of each object; None for one object per true positive.
    """
    true, images = np.array(true, bool), np.array(images, np.int32)
    classes = np.zeros_like(images) if classes is None else np.array(classes, np.int32)
    if objects is None:
        objects = np.stack([images[true], classes[true]], axis=1)
    objects = np.array(objects, np.int32).reshape(-1, 2)
    num_images = int(images.max()) + 1 if num_images is None else num_images
    return Matches(
        image_ids=np.arange(num_images).astype(str),
        class_names=np.array([f"class {k}" for k in range(max(classes, default=0) + 1)]),
        area_names=np.array(["all"]),
        iou_thresholds=np.array([0.5]),
        dt_image=images,
        dt_class=classes,
        dt_score=np.array(scores, float),
        dt_matched=true[None, None],
        dt_ignored=np.zeros((1, 1, len(true)), bool),
        gt_image=objects[:, 0],
        gt_class=objects[:, 1],
        gt_ignored=np.zeros((1, len(objects)), bool),
    )


def random_matches(seed, num_images, quality, *, num_classes=2, truth_seed=0):
    """Builds synthetic matches: each image has four objects, each found with probability `quality`,
    and on average two false positives."""
    rng, truth_rng = np.random.default_rng(seed), np.random.default_rng(truth_seed)
    objects = np.stack(
        [
            np.repeat(np.arange(num_images), 4),
            truth_rng.integers(0, num_classes, 4 * num_images),
        ],
        axis=1,
    )
    is_found = rng.random(len(objects)) < quality
    wrong = rng.integers(0, (num_images, num_classes), (2 * num_images, 2))
    where = np.concatenate([objects[is_found], wrong])
    true = np.arange(len(where)) < is_found.sum()
    scores = rng.random(len(where)) + 0.5 * true
    order = np.lexsort((-scores, where[:, 1], where[:, 0]))
    images, classes = where[order].T
    return make_matches(
        true[order], scores[order], images, classes=classes, num_images=num_images, objects=objects
    )


def pycocotools_precision(true, num_objects):
    """Computes precision as the loop in COCOeval.accumulate does.

    Args:
        true: whether each detection is a true positive, in order of decreasing score.
        num_objects: number of objects.
    """
    hits = np.cumsum(true).astype(float)
    misses = np.cumsum(~true).astype(float)
    recall, precision = hits / num_objects, hits / (misses + hits + np.spacing(1))
    for i in range(len(true) - 1, 0, -1):
        precision[i - 1] = max(precision[i], precision[i - 1])
    recalls = np.linspace(0.0, 1.00, int(np.round((1.00 - 0.0) / 0.01)) + 1, endpoint=True)
    places = np.searchsorted(recall, recalls, side="left")
    return np.array([precision[i] if i < len(precision) else 0.0 for i in places])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_draws_equal_pycocotools_on_repeated_images(task, seed, tmp_path):
    content, results = make_distinct(seed)
    matches = evaluate(write_truth(tmp_path, content), results, task).matches()
    weights = image_weights(len(content["images"]), 6, seed)
    actual = resampled_ap(matches, weights)
    for draw, counts in enumerate(weights):
        stats = official(*repeat(content, results, counts), task).stats[:6]
        expected = [100 * x if x > -1 else np.nan for x in stats]
        np.testing.assert_allclose([actual[name][draw] for name in METRICS], expected, atol=1e-9)
    values = [np.unique(actual[name][~np.isnan(actual[name])]) for name in METRICS]
    assert min(map(len, values)) > 2, "too few distinct values to compare"


@pytest.mark.parametrize("task", ["bbox", "segm", "boundary"])
@pytest.mark.parametrize("make", [make_coco, make_distinct])
def test_unit_weights_give_the_evaluators_ap(make, task, tmp_path):
    content, results = make(5, most_copies=12)
    evaluation = evaluate(write_truth(tmp_path, content), results, task)
    matches, expected = evaluation.matches(), evaluation.metrics()
    ones = resampled_ap(matches, np.ones((1, len(content["images"])), int))
    for name in METRICS:
        value = pytest.approx(expected[name], abs=1e-9, nan_ok=True)
        assert ones[name] == value and average_precision(matches, name) == value
        classes = [evaluation.metrics([k])[name] for k in range(len(matches.class_names))]
        np.testing.assert_allclose(class_ap(matches, name), classes, atol=1e-9)
    for t, iou in enumerate(IOU_THRESHOLDS):
        curves = evaluation.precision[t, :, :, 0]
        curve = curves[:, curves[0] > -1].mean(axis=1)
        np.testing.assert_allclose(precision_recall(matches, float(iou)), curve, atol=1e-12)


def test_lvis_matches_give_the_evaluators_ap(tmp_path):
    content, results = make_lvis(1)
    evaluation = evaluate(write_truth(tmp_path, content, is_lvis=True), results, "segm")
    for name in METRICS:
        value = average_precision(evaluation.matches(), name)
        assert value == pytest.approx(evaluation.metrics()[name], abs=1e-9, nan_ok=True)


def test_hand_worked_example():
    # Image 0: its object is found first. Image 1: a false positive, then its object.
    matches = make_matches([True, False, True], [0.9, 0.8, 0.5], [0, 1, 1])
    weights = np.array([[1, 1], [2, 0], [0, 2], [2, 1]])
    # Each image once: precision 1 for 51 recalls (up to 1/2), then 2/3 for the other 50.
    # Image 1 twice: after two false positives, precision is 1/3 and then 1/2, so it counts as 1/2.
    # Image 0 twice: precision 1 for 67 recalls (up to 2/3), then 3/4 for the other 34.
    expected = [(51 + 50 * 2 / 3) / 1.01, 100, 50, (67 + 34 * 3 / 4) / 1.01]
    actual = resampled_ap(matches, weights, ["AP", "AP50"])
    np.testing.assert_allclose(actual["AP"], expected, atol=1e-9)
    np.testing.assert_array_equal(actual["AP50"], actual["AP"])
    curve = precision_recall(matches)
    np.testing.assert_allclose(curve, [1] * 51 + [2 / 3] * 50, atol=1e-12)
    assert average_precision(matches) == pytest.approx(expected[0], abs=1e-9)


def test_a_class_without_drawn_objects_is_left_out_of_the_mean():
    # Class 0 in image 0 is found, class 1 in image 1 is not, and class 2 has no objects.
    matches = make_matches(
        [True, False, False],
        [0.9, 0.8, 0.7],
        [0, 1, 2],
        classes=[0, 1, 2],
        objects=[(0, 0), (1, 1)],
    )
    weights = np.array([[1, 1, 1], [2, 0, 1], [0, 2, 1], [0, 0, 3]])
    np.testing.assert_array_equal(
        resampled_ap(matches, weights, ["AP50"])["AP50"], [50, 100, 0, np.nan]
    )
    np.testing.assert_array_equal(class_ap(matches, "AP50"), [100, 0, np.nan])


def test_recalls_round_exactly_as_in_pycocotools():
    rng = np.random.default_rng(0)
    for num_objects in range(1, 230):
        true = rng.random(2 * num_objects) < 0.6
        true &= np.cumsum(true) <= num_objects
        objects = np.zeros((num_objects, 2))
        scores = -np.arange(len(true))
        matches = make_matches(true, scores, np.zeros(len(true)), objects=objects)
        expected = pycocotools_precision(true, num_objects)
        np.testing.assert_allclose(precision_recall(matches), expected, atol=1e-12)
        assert average_precision(matches) == pytest.approx(100 * expected.mean(), abs=1e-9)


def test_tied_scores_are_ordered_by_image_and_position_in_all_draws():
    first_true = make_matches([True, False], [0.5, 0.5], [0, 1])
    first_false = make_matches([False, True], [0.5, 0.5], [0, 1])
    weights = np.array([[1, 1], [1, 3], [3, 1]])
    np.testing.assert_allclose(resampled_ap(first_true, weights, ["AP50"])["AP50"], 100)
    np.testing.assert_allclose(resampled_ap(first_false, weights, ["AP50"])["AP50"], [50, 75, 25])
    one_image = make_matches([True, False], [0.5, 0.5], [0, 0])
    # Copies of a detection are adjacent: true, true, false, false.
    np.testing.assert_allclose(resampled_ap(one_image, np.array([[2]]), ["AP50"])["AP50"], 100)


@pytest.mark.parametrize("size", [1, 100, 1000])
def test_draws_do_not_depend_on_the_chunk_size(size, monkeypatch):
    matches, weights = random_matches(0, 20, 0.7), image_weights(20, 50, 0)
    expected = resampled_ap(matches, weights, ["AP"])["AP"]
    alone = [resampled_ap(matches, row[None], ["AP"])["AP"][0] for row in weights]
    monkeypatch.setattr(bootstrap, "CHUNK_ELEMENTS", size)
    np.testing.assert_array_equal(resampled_ap(matches, weights, ["AP"])["AP"], expected)
    np.testing.assert_array_equal(alone, expected)


def test_each_draw_keeps_the_number_of_images_and_depends_only_on_the_seed():
    weights = image_weights(40, 2000, seed=3)
    assert weights.shape == (2000, 40) and (weights.sum(axis=1) == 40).all()
    np.testing.assert_array_equal(weights, image_weights(40, 2000, seed=3))
    np.testing.assert_array_equal(weights[:10], image_weights(40, 10, seed=3))
    assert (weights != image_weights(40, 2000, seed=4)).any()
    # Binomial: 40 trials with probability 1/40.
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.12)
    assert weights.var() == pytest.approx(1 - 1 / 40, abs=0.02)


def test_a_model_compared_with_itself_has_no_difference():
    seeds = [random_matches(s, 30, 0.7) for s in range(3)]
    result = compare(seeds, seeds, num_draws=50, metrics=["AP", "AP50"])["AP50"]
    assert result.difference == result.image_low == result.image_high == 0
    assert result.low < 0 < result.high, "the interval must include the noise of the seeds"
    one = compare(seeds[:1], seeds[:1], num_draws=50, metrics=["AP50"])["AP50"]
    assert one.difference == one.low == one.high == one.detectable == 0
    assert result.value == result.baseline == np.mean([average_precision(x) for x in seeds])


def test_a_comparison_uses_means_over_seeds_on_the_same_draws():
    variant = [random_matches(s, 30, 0.9) for s in range(3)]
    baseline = [random_matches(s, 30, 0.5) for s in (7, 8)]
    result = compare(variant, baseline, ["AP50"], num_draws=200, seed=1)["AP50"]
    values = [average_precision(x, "AP50") for x in variant]
    assert result.metric == "AP50"
    assert result.value == pytest.approx(np.mean(values))
    assert result.seed_std == pytest.approx(np.std(values, ddof=1)) and result.seed_std > 0
    assert result.baseline == pytest.approx(np.mean([average_precision(x) for x in baseline]))
    assert result.difference == result.value - result.baseline > 20
    weights = image_weights(30, 200, 1)
    means = [
        np.mean([resampled_ap(x, weights, ["AP50"])["AP50"] for x in xs], axis=0)
        for xs in (variant, baseline)
    ]
    drawn = means[0] - means[1]
    expected = np.percentile(drawn, [2.5, 97.5])
    np.testing.assert_allclose([result.image_low, result.image_high], expected)
    assert 0 < result.low < result.image_low < result.difference < result.high
    one = compare(variant[:1], baseline[:1], ["AP50"], num_draws=200, seed=1)["AP50"]
    alone = [resampled_ap(x[0], weights, ["AP50"])["AP50"] for x in (variant, baseline)]
    drawn = alone[0] - alone[1]
    expected = [*np.percentile(drawn, [2.5, 97.5]), 2.8 * drawn.std(ddof=1)]
    np.testing.assert_allclose([one.low, one.high, one.detectable], expected, rtol=1e-4)
    assert np.isnan(one.seed_std)


def test_joint_comparisons_equal_single_ones_with_wider_intervals():
    runs = {q: [random_matches(s, 20, float(q)) for s in range(2)] for q in ("0.5", "0.6", "0.9")}
    together = compare_all(runs, "0.5", ["AP"], num_draws=40, seed=2)
    assert list(together) == list(runs)
    for name, of_seeds in runs.items():
        alone = compare(of_seeds, runs["0.5"], ["AP"], num_draws=40, seed=2)
        assert together[name]["AP"].difference == alone["AP"].difference
        for field in ("image_low", "image_high", "seed_std"):
            assert getattr(together[name]["AP"], field) == getattr(alone["AP"], field)
        widths = [x.high - x.low for x in (together[name]["AP"], alone["AP"])]
        assert widths[0] > widths[1] or name == "0.5", "the joint interval must be wider"
    assert together["0.5"]["AP"].image_low == together["0.5"]["AP"].image_high == 0


def test_an_interval_narrows_with_more_images():
    widths = []
    for num_images in (40, 640):
        runs = [random_matches(s, num_images, q) for s, q in ((0, 0.6), (1, 0.7))]
        result = compare(runs[1:], runs[:1], ["AP50"], num_draws=300)["AP50"]
        assert result.detectable > (result.high - result.low) / 2
        widths.append(result.high - result.low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.35)  # 1 / sqrt(16)


def test_a_metric_is_nan_if_nothing_counts():
    matches = make_matches([False, False], [0.5, 0.4], [0, 1], objects=[])
    result = compare([matches] * 2, [matches], ["AP"], num_draws=5)["AP"]
    numbers = [v for k, v in vars(result).items() if isinstance(v, float)]
    assert np.isnan(numbers).all()
    assert np.isnan(class_ap(matches)).all() and np.isnan(precision_recall(matches)).all()


def test_draws_in_which_nothing_counts_are_left_out_of_the_interval():
    # The only object is in one of three images; (2/3)^3 = 30% of the draws leave that image out.
    matches = make_matches([True, False], [0.9, 0.5], [0, 1], num_images=3)
    worse = replace(matches, dt_matched=np.zeros_like(matches.dt_matched))
    result = compare([matches], [worse], ["AP"], num_draws=50)["AP"]
    assert (result.low, result.difference, result.high) == (100, 100, 100)


def test_without_detections_ap_is_zero():
    matches = make_matches([], [], [], num_images=2, objects=[(0, 0), (1, 0)])
    assert average_precision(matches) == 0 and (precision_recall(matches) == 0).all()
    np.testing.assert_array_equal(
        resampled_ap(matches, image_weights(2, 4, 0), ["AP50"])["AP50"], 0
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"image_ids": np.array(["0", "1", "3"])}, "image_ids"),
        ({"image_ids": np.array(["0", "1", "2", "3"])}, "image_ids"),
        ({"class_names": np.array(["cat"])}, "class_names"),
        ({"area_names": np.array(["some"])}, "area_names"),
        ({"iou_thresholds": np.array([0.75])}, "iou_thresholds"),
        ({"gt_image": np.array([1])}, "gt_image"),
        ({"gt_class": np.array([1])}, "gt_class"),
        ({"gt_ignored": np.array([[True]])}, "gt_ignored"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_matches_from_different_data_are_refused(number, change, field):
    matches = make_matches([True, False], [0.9, 0.8], [0, 2])
    other = [matches, matches]
    other[number] = replace(matches, **change)
    message = f"'mine', number {number}, and of 'base', number 0, .*: their {field} differ"
    with pytest.raises(ValueError, match=message):
        compare_all({"base": [matches], "mine": other}, "base", ["AP"], num_draws=2)


def test_invalid_arguments_are_refused():
    matches = make_matches([True, False], [0.9, 0.8], [0, 1])
    with pytest.raises(ValueError, match=r"metric is 'AR', not one of .*'APl'"):
        average_precision(matches, "AR")
    with pytest.raises(ValueError, match=r"iou 0.75 is not one of \[0.5\]"):
        resampled_ap(matches, image_weights(2, 1, 0), ["AP75"])
    with pytest.raises(ValueError, match=r"iou 0.6 is not one of \[0.5\]"):
        precision_recall(matches, 0.6)
    with pytest.raises(ValueError, match=r"area ranges \['all'\], not 'small'"):
        class_ap(matches, "APs")
    for shape in ((3, 4), (2,)):
        with pytest.raises(ValueError, match="not \\(draws, 2 images\\)"):
            resampled_ap(matches, np.ones(shape, int))
    with pytest.raises(ValueError, match="weights of up to 2000000000 are too large"):
        resampled_ap(matches, np.array([[0, 2 * 10**9]]))
    for weights in ([[0.5, 1.5]], [[-1, 3]]):
        with pytest.raises(ValueError, match="weights must be non-negative integers"):
            resampled_ap(matches, np.array(weights))
    with pytest.raises(ValueError, match="the matches of 'variant' are missing"):
        compare([], [matches])
    with pytest.raises(ValueError, match="num_draws must be at least 2, not 1"):
        compare([matches], [matches], num_draws=1)
    with pytest.raises(ValueError, match=r"'nobody', not one of \['base'\]"):
        compare_all({"base": [matches]}, "nobody")
    with pytest.raises(ValueError, match="must be at least 1, not 0 and 5"):
        image_weights(0, 5, 0)
    with pytest.raises(ValueError, match="must be at least 1, not 5 and 0"):
        image_weights(5, 0, 0)
