"""COCO's AP on many resamples of the validation images, which show how certain a difference is.

Images are drawn with replacement, and all models compared get the same draws, so that whatever
makes an image hard for all of them cancels (paired bootstrap). Detections are matched to objects
once; a draw only changes how often each counts. This equals an evaluation of a data set in which
the images are physically repeated: a class without drawn objects has no AP and does not enter the
mean, as in the engine. COCOeval itself removes repeated image ids.

Detections of a class are processed in the engine's order, by falling score, ties by the index
of the image and then by the position in the file; the copies of a detection follow each other. This
order is the same in all draws.

Resampling images says nothing about training again: that is what several seeds are for (see
difference).

In 500 synthetic experiments (200 images, 3 classes) the 95% interval over images contained the true
difference of AP, AP50 and AP75 93 to 95% of the time, for a large and a small difference. If
classes have few objects, it is slightly too narrow (100 images, 10 classes: 93 to 94% of 1000
experiments).

Shape alphabet: I images, K classes, D detections, S draws; n detections of one class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .coco_ap import METRICS
from .difference import PairedDifference, difference_of
from .matching import FloatArray, Matches

IntArray = npt.NDArray[np.int32]
"""Type of counts: NumPy adds these up much faster than int64, and exactly."""

CHUNK_ELEMENTS = 1 << 17
"""Size of the (S, n) arrays, so that they stay in the processor's cache."""

_AREAS = {"APs": "small", "APm": "medium", "APl": "large"}
_IOUS = {"AP50": 0.5, "AP75": 0.75}
_RECALLS: FloatArray = np.linspace(0.0, 1.0, 101)  # as pycocotools has them, to the last bit

Cell = tuple[int, int]
"""An area range and an IoU threshold, by index, which have one precision-recall curve."""


@dataclass(frozen=True)
class _Curve:
    """A class's precision and recall at its true positives, in S draws.

    Between true positives, precision only falls; among the copies of one, it only rises. So the
    best precision from some recall on is that of a true positive's last copy.

    Attributes:
        precision: (S, n) 0 to 1, interpolated: the best from this detection on.
        num_recalls: (S, n) how many of the 101 recalls are reached.
        has_objects: (S,) whether any was drawn; if not, the curve means nothing.
    """

    precision: FloatArray
    num_recalls: IntArray
    has_objects: npt.NDArray[np.bool_]

    def average_precision(self) -> FloatArray:
        """Returns (S,) 0 to 1; nan without objects."""
        # Each true positive adds its precision for the recalls that it is the first to reach.
        before = self.num_recalls[:, :-1]
        total = np.einsum("sn,sn->s", self.precision, self.num_recalls)
        total -= np.einsum("sn,sn->s", self.precision[:, 1:], before)
        return np.where(self.has_objects, total / len(_RECALLS), np.nan)

    def sampled(self) -> FloatArray:
        """Returns (S, 101) precision at each recall, 0 if not reached; nan without objects."""
        samples = np.zeros((len(self.precision), len(_RECALLS)))
        for row, precision, num_recalls in zip(
            samples, self.precision, self.num_recalls, strict=True
        ):
            places = np.searchsorted(num_recalls, np.arange(len(_RECALLS)), side="right")
            row[:] = np.append(precision, 0.0)[places]
        samples[~self.has_objects] = np.nan
        return samples


def image_weights(num_images: int, num_draws: int, seed: int) -> IntArray:
    """Returns (num_draws, num_images): how often each image is drawn. A row sums to num_images.

    The same seed gives the same draws, and more draws begin with the same ones.

    Raises:
        ValueError: if the number of images or draws is 0.
    """
    if num_images < 1 or num_draws < 1:
        raise ValueError(
            f"num_images and num_draws must be at least 1, not {num_images} and {num_draws}"
        )
    rng = np.random.default_rng(seed)
    weights = np.empty((num_draws, num_images), np.int32)
    for row in weights:
        row[:] = np.bincount(rng.integers(0, num_images, num_images), minlength=num_images)
    return weights


def average_precision(matches: Matches, metric: str = "AP") -> float:
    """Returns the metric of the images as they are, in percent: the evaluator's.

    Raises:
        ValueError: as ``resampled_ap``.
    """
    return float(resampled_ap(matches, _as_they_are(matches), (metric,))[metric][0])


def class_ap(matches: Matches, metric: str = "AP") -> FloatArray:
    """Returns the metric of each class, (K,) in percent; nan where a class has no objects.

    Raises:
        ValueError: as ``resampled_ap``.
    """
    return resampled_class_ap(matches, _as_they_are(matches), metric)[:, 0]


def resampled_class_ap(
    matches: Matches, weights: npt.NDArray[np.integer], metric: str = "AP"
) -> FloatArray:
    """Returns the metric of each class, (K, S), as ``resampled_ap`` does for all classes."""
    cells = _cells(matches, metric)
    aps = _class_aps(matches, _checked(weights, matches), cells)
    return 100 * _mean_of_counted(np.stack([aps[cell] for cell in cells]), axis=0)


def precision_recall(matches: Matches, iou: float = 0.5) -> FloatArray:
    """Returns COCO's interpolated precision at recalls 0, 0.01, ..., 1: (101,) 0 to 1.

    The mean over the classes that have objects (nan if none has), for objects of all areas.

    Args:
        matches: of any task.
        iou: one of ``matches.iou_thresholds``.

    Raises:
        ValueError: if iou is not one of them.
    """
    cells = [(_area_index(matches, "all"), _iou_index(matches, iou))]
    weights = _as_they_are(matches)
    curves = [
        curve.sampled()[0]
        for detections, objects in _by_class(matches)
        for _, curve in _curves(matches, weights, detections, objects, cells)
    ]
    return _mean_of_counted(np.reshape(curves, (-1, len(_RECALLS))), axis=0)


def resampled_ap(
    matches: Matches, weights: npt.NDArray[np.integer], metrics: Sequence[str] = METRICS
) -> dict[str, FloatArray]:
    """Returns the metrics, (S,) each in percent, of data sets with images repeated by weight.

    Args:
        matches: of any task.
        weights: (S, I) how often each image is repeated, e.g. from ``image_weights``.
        metrics: names from METRICS.

    Raises:
        ValueError: if the weights are not integers from 0 on for each image, or too large to be
            added up; if a metric is not one of METRICS, or needs an area range or IoU threshold
            that the matches lack.
    """
    weights = _checked(weights, matches)
    cells = {metric: _cells(matches, metric) for metric in metrics}
    aps = _class_aps(matches, weights, {cell for of_metric in cells.values() for cell in of_metric})
    return {
        metric: 100 * _mean_of_counted(np.concatenate([aps[cell] for cell in of_metric]), axis=0)
        for metric, of_metric in cells.items()
    }


def compare(
    variant: Sequence[Matches],
    baseline: Sequence[Matches],
    metrics: Sequence[str] = METRICS,
    num_draws: int = 1000,
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Returns how a variant differs from a baseline in each metric.

    Args:
        variant: matches of each training seed, for the same task and images.
        baseline: the same for the baseline; the numbers of seeds may differ.
        metrics: names from METRICS.
        num_draws: how often the images are resampled. The difference in a draw is that of the means
            over seeds. A metric skips draws in which nothing counts for it.
        seed: of the draws.

    Raises:
        ValueError: if matches are missing, if there are fewer than two draws, if two matches have
            different images, classes or objects (names them), and as ``resampled_ap``.
    """
    variants = {"baseline": baseline, "variant": variant}
    return compare_all(variants, "baseline", metrics, num_draws, seed)["variant"]


def compare_all(
    variants: Mapping[str, Sequence[Matches]],
    baseline_name: str,
    metrics: Sequence[str] = METRICS,
    num_draws: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, PairedDifference]]:
    """Returns ``compare`` of each variant with the same baseline, all on the same draws.

    Intervals that include training widen with the number of variants: they hold all true
    differences at once.

    Args:
        variants: the matches of each, one for each training seed; the baseline is among them.
        baseline_name: the baseline. It is also compared with itself: its differences are 0.
        metrics: as in ``compare``.
        num_draws: as in ``compare``.
        seed: as in ``compare``.

    Raises:
        ValueError: as ``compare``; if baseline_name is not among the variants.
    """
    if baseline_name not in variants:
        raise ValueError(f"baseline_name is {baseline_name!r}, not one of {list(variants)}")
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2, not {num_draws}")
    _check_comparable(variants, baseline_name)
    first = variants[baseline_name][0]
    draws = image_weights(len(first.image_ids), num_draws, seed)
    weights = np.concatenate([_as_they_are(first), draws])
    samples = {
        name: [resampled_ap(matches, weights, metrics) for matches in of_seeds]
        for name, of_seeds in variants.items()
    }
    return {
        name: {
            metric: difference_of(
                metric,
                np.stack([x[metric] for x in of_seeds]),
                np.stack([x[metric] for x in samples[baseline_name]]),
                len(first.image_ids),
                max(len(variants) - 1, 1),
            )
            for metric in metrics
        }
        for name, of_seeds in samples.items()
    }


def _check_comparable(variants: Mapping[str, Sequence[Matches]], baseline_name: str) -> None:
    for name, of_seeds in variants.items():
        if not of_seeds:
            raise ValueError(f"the matches of {name!r} are missing")
    first = variants[baseline_name][0]
    shared = ("image_ids", "class_names", "area_names", "iou_thresholds")
    # Also the objects: otherwise, the same images could come from another annotation file.
    objects = ("gt_image", "gt_class", "gt_ignored")
    for name, of_seeds in variants.items():
        for number, matches in enumerate(of_seeds):
            for field in (*shared, *objects):
                if not np.array_equal(getattr(matches, field), getattr(first, field)):
                    raise ValueError(
                        f"the matches of {name!r}, number {number}, and of {baseline_name!r}, "
                        f"number 0, cannot be compared: their {field} differ"
                    )


def _class_aps(
    matches: Matches, weights: IntArray, cells: Iterable[Cell]
) -> dict[Cell, FloatArray]:
    """Returns the (K, S) AP of each class, 0 to 1; nan if none of its objects was drawn."""
    shape = (len(matches.class_names), len(weights))
    aps = {cell: np.full(shape, np.nan) for cell in cells}
    for k, (detections, objects) in enumerate(_by_class(matches)):
        step = max(CHUNK_ELEMENTS // max(len(detections), len(objects), 1), 1)
        for start in range(0, len(weights), step):
            rows = slice(start, start + step)
            for cell, curve in _curves(matches, weights[rows], detections, objects, aps):
                aps[cell][k, rows] = curve.average_precision()
    return aps


def _curves(
    matches: Matches,
    weights: IntArray,
    detections: npt.NDArray[np.int64],
    objects: npt.NDArray[np.int64],
    cells: Iterable[Cell],
) -> Iterator[tuple[Cell, _Curve]]:
    """Yields the curves of a class; ``detections`` are in the order of the engine."""
    drawn = weights.take(matches.dt_image[detections], axis=1)
    objects_drawn = weights.take(matches.gt_image[objects], axis=1)
    for area, threshold in cells:
        num_objects = objects_drawn @ ~matches.gt_ignored[area, objects]
        is_counted = ~matches.dt_ignored[area, threshold, detections]
        is_true = is_counted & matches.dt_matched[area, threshold, detections]
        yield (area, threshold), _curve(drawn, is_counted, is_true, num_objects)


def _curve(
    drawn: IntArray,
    is_counted: npt.NDArray[np.bool_],
    is_true: npt.NDArray[np.bool_],
    num_objects: IntArray,
) -> _Curve:
    """Returns the curve of a class from its detections by falling score.

    Args:
        drawn: (S, n) how often each is there.
        is_counted: (n,) whether it is in the curve.
        is_true: (n,) whether it is a true positive; only for counted ones.
        num_objects: (S,) how many there are.
    """
    hits = _running_count(drawn, is_true)
    ranks = _running_count(drawn, is_counted).compress(is_true[is_counted], axis=1)
    precision = hits / np.maximum(ranks, 1)  # ranks are 0 before the first that is drawn
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # The same division and comparison as in pycocotools, so recalls are reached to the last bit.
    recall = hits / np.maximum(num_objects, 1)[:, None]
    return _Curve(precision, _num_reached(recall), num_objects > 0)


def _running_count(drawn: IntArray, is_chosen: npt.NDArray[np.bool_]) -> IntArray:
    # Not drawn[:, is_chosen], which is laid out by columns and slow to add up along rows.
    return drawn.compress(is_chosen, axis=1).cumsum(axis=1, dtype=np.int32)


def _num_reached(recall: FloatArray) -> IntArray:
    """Returns how many of _RECALLS are reached; like searchsorted(side="right"), but fast."""
    nearest = (recall * (len(_RECALLS) - 1) + 0.5).astype(np.int32)
    return nearest + (_RECALLS.take(nearest) <= recall)


def _by_class(
    matches: Matches,
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Returns indices of each class's detections, in the order of the engine, and objects."""
    borders = np.arange(1, len(matches.class_names))
    # Stable: equal scores stay ordered by image and position.
    detections = np.lexsort((-matches.dt_score, matches.dt_class))
    objects = np.argsort(matches.gt_class, kind="stable")
    return list(
        zip(
            np.split(detections, np.searchsorted(matches.dt_class[detections], borders)),
            np.split(objects, np.searchsorted(matches.gt_class[objects], borders)),
            strict=True,
        )
    )


def _cells(matches: Matches, metric: str) -> list[Cell]:
    """Returns the curves whose mean AP is the metric."""
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, not one of {METRICS}")
    area = _area_index(matches, _AREAS.get(metric, "all"))
    if metric in _IOUS:
        return [(area, _iou_index(matches, _IOUS[metric]))]
    return [(area, threshold) for threshold in range(len(matches.iou_thresholds))]


def _area_index(matches: Matches, name: str) -> int:
    names = matches.area_names.tolist()
    if name not in names:
        raise ValueError(f"the matches have the area ranges {names}, not {name!r}")
    return names.index(name)


def _iou_index(matches: Matches, iou: float) -> int:
    is_near = np.isclose(matches.iou_thresholds, iou)
    if not is_near.any():
        raise ValueError(f"iou {iou} is not one of {np.round(matches.iou_thresholds, 6).tolist()}")
    return int(is_near.argmax())


def _as_they_are(matches: Matches) -> IntArray:
    return np.ones((1, len(matches.image_ids)), np.int32)


def _checked(weights: npt.NDArray[np.integer], matches: Matches) -> IntArray:
    weights, num_images = np.asarray(weights), len(matches.image_ids)
    if weights.ndim != 2 or weights.shape[1] != num_images:
        raise ValueError(f"weights are {weights.shape}, not (draws, {num_images} images)")
    if not np.issubdtype(weights.dtype, np.integer) or (weights < 0).any():
        raise ValueError("weights must be integers from 0 on: how often each image is drawn")
    most = max(len(matches.dt_image), len(matches.gt_image), 1)
    if int(weights.max(initial=0)) > np.iinfo(np.int32).max // most:
        raise ValueError(f"weights of up to {weights.max()} count more than fits an int32")
    return weights.astype(np.int32, copy=False)


def _mean_of_counted(values: FloatArray, axis: int) -> FloatArray:
    """Returns the mean without nan; nan if there is nothing else."""
    is_counted = ~np.isnan(values)
    total = np.where(is_counted, values, 0.0).sum(axis=axis)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that we want
        return total / is_counted.sum(axis=axis)
