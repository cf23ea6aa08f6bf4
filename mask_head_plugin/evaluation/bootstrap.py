"""Computes COCO's AP on many resamples of the images, to show how certain a difference is.

Images are drawn with replacement. All models get the same draws, so an image that is hard for all
models does not affect the difference between them (paired bootstrap). Detections are matched to
objects only once, because a draw only changes how often each detection and object counts. The
result equals an evaluation of a data set in which images are repeated. COCOeval cannot run such an
evaluation, because it removes repeated image ids. As in the evaluation engine (faster-coco-eval), a
class whose objects were not drawn has no AP and is left out of the mean.

Detections of a class are processed in the engine's order: by falling score, then by index of the
image, then by position in the file. The copies of a detection follow each other. The order is the
same in all draws.

Resampling images does not show how much the result would change if the model were trained again.
Trainings with several seeds show that; see difference.py.

In 500 synthetic experiments (200 images, 3 classes), the 95% interval over images contained the
true difference of AP, AP50 and AP75 93 to 95% of the time, for a large and a small difference. If
classes have few objects, the interval is slightly too narrow (100 images, 10 classes: 93 to 94% of
1000 experiments).

Shape alphabet: I images, K classes, D detections, S draws; n detections of one class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .coco_ap import METRICS
from .difference import PairedDifference, difference_of
from .matching import FloatArray, Matches

IntArray = npt.NDArray[np.int32]
"""Type of counts. NumPy sums it exactly, like int64, but much faster."""

CHUNK_ELEMENTS = 1 << 17
"""Number of elements of an (S, n) array, chosen so that it fits into the processor's cache."""

_AREAS = {"APs": "small", "APm": "medium", "APl": "large"}
_IOUS = {"AP50": 0.5, "AP75": 0.75}
_RECALLS: FloatArray = np.linspace(0.0, 1.0, 101)  # equal to pycocotools' to the last bit

Cell = tuple[int, int]
"""Indices of an area range and an IoU threshold. Each class has one curve for each such pair."""


@dataclass(frozen=True)
class _Curves:
    """The precision and recall of a class in C cells and S draws.

    The n points of a curve are the detections that are true positives in at least one of the cells.
    Between true positives, precision only falls; over the copies of a true positive, it only rises.
    The highest precision at or above any recall is therefore reached at the last copy of a true
    positive. In cells in which a detection is not a true positive, it does not raise the recall and
    thus has no effect.

    Attributes:
        precision: (C, S, n) interpolated precision, 0 to 1: the highest precision from this
            detection on.
        num_recalls: (C, S, n) how many of _RECALLS the recall reaches at this detection.
        has_objects: (C, S) whether any object was drawn; otherwise, the curve is meaningless.
    """

    precision: FloatArray
    num_recalls: IntArray
    has_objects: npt.NDArray[np.bool_]

    def average_precision(self) -> FloatArray:
        """Returns the average precision, (C, S) from 0 to 1, or nan if no object was drawn."""
        # Each true positive contributes its precision at the recalls that it reaches first.
        before = self.num_recalls[..., :-1]
        total = np.einsum("csn,csn->cs", self.precision, self.num_recalls)
        total -= np.einsum("csn,csn->cs", self.precision[..., 1:], before)
        return np.where(self.has_objects, total / len(_RECALLS), np.nan)

    def sampled(self) -> FloatArray:
        """Returns the precision at each recall in the first draw, (C, 101).

        The precision is 0 at recalls that are not reached, and nan if no object was drawn.
        """
        samples = np.zeros((len(self.precision), len(_RECALLS)))
        for row, precision, num_recalls in zip(
            samples, self.precision[:, 0], self.num_recalls[:, 0], strict=True
        ):
            places = np.searchsorted(num_recalls, np.arange(len(_RECALLS)), side="right")
            row[:] = np.append(precision, 0.0)[places]
        samples[~self.has_objects[:, 0]] = np.nan
        return samples


def image_weights(num_images: int, num_draws: int, seed: int) -> IntArray:
    """Draws images with replacement.

    The same seed returns the same draws. A larger ``num_draws`` only appends further draws.

    Returns:
        (num_draws, num_images) how often each image is drawn. Each row sums to num_images.

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
    """Returns a metric on the original images in percent, equal to the evaluator's.

    Raises:
        ValueError: as in ``resampled_ap``.
    """
    return float(resampled_ap(matches, _as_they_are(matches), (metric,))[metric][0])


def class_ap(matches: Matches, metric: str = "AP") -> FloatArray:
    """Returns a metric of each class, (K,) in percent; nan for classes without objects.

    Raises:
        ValueError: as in ``resampled_ap``.
    """
    return resampled_class_ap(matches, _as_they_are(matches), metric)[:, 0]


def resampled_class_ap(
    matches: Matches, weights: npt.NDArray[np.integer], metric: str = "AP"
) -> FloatArray:
    """Computes a metric like ``resampled_ap``, but for each class: (K, S) in percent."""
    cells = _cells(matches, metric)
    aps = _class_aps(matches, _checked(weights, matches), cells)
    return 100 * _mean_of_counted(np.stack([aps[cell] for cell in cells]), axis=0)


def precision_recall(matches: Matches, iou: float = 0.5) -> FloatArray:
    """Returns COCO's interpolated precision at recalls 0, 0.01, ..., 1, (101,) from 0 to 1.

    Averages over the classes that have objects; nan if no class has any. Objects of all areas are
    included.

    Args:
        matches: matches of any task.
        iou: one of ``matches.iou_thresholds``.

    Raises:
        ValueError: if iou is not one of these thresholds.
    """
    cell = _area_index(matches, "all"), _iou_index(matches, iou)
    weights = _as_they_are(matches)
    curves = [
        _curves(matches, _drawn(matches, weights, *of_class), *of_class, [cell]).sampled()[0]
        for of_class in _by_class(matches)
    ]
    return _mean_of_counted(np.reshape(curves, (-1, len(_RECALLS))), axis=0)


def resampled_ap(
    matches: Matches, weights: npt.NDArray[np.integer], metrics: Sequence[str] = METRICS
) -> dict[str, FloatArray]:
    """Computes metrics on S data sets in which each image is repeated ``weights`` times.

    Args:
        matches: matches of any task.
        weights: (S, I) how often each image is repeated, for example from ``image_weights``.
        metrics: names from METRICS.

    Returns:
        The (S,) values of each metric, in percent.

    Raises:
        ValueError: if the weights are not non-negative integers for each image, or too large to be
            summed. Also if a metric is not one of METRICS, or needs an area range or IoU threshold
            that the matches do not have.
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
    """Compares a variant with a baseline in each metric.

    Args:
        variant: the variant's matches for each training seed, on the same task and images.
        baseline: the baseline's matches, possibly for a different number of seeds.
        metrics: names from METRICS.
        num_draws: how often the images are resampled. Each draw compares the means over seeds. A
            metric ignores draws in which no object counts for it.
        seed: random seed of the draws.

    Raises:
        ValueError: if matches are missing, if there are fewer than two draws, or if two matches
            have different images, classes or objects; the message names them. Also as in
            ``resampled_ap``.
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
    """Compares each variant with the same baseline on the same draws; see ``compare``.

    Intervals that include training get wider with the number of variants, because all of them
    together must contain all true differences 95% of the time.

    Args:
        variants: for each variant, including the baseline, its matches for each training seed.
        baseline_name: name of the baseline. It is also compared with itself, with differences of 0.
        metrics: as in ``compare``.
        num_draws: as in ``compare``.
        seed: as in ``compare``.

    Raises:
        ValueError: as in ``compare``, or if baseline_name is not among the variants.
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
                possible=(0, 100),
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
    # Objects are compared as well, because another annotation file may have the same images.
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
    """Returns the AP of each class, (K, S) from 0 to 1; nan if none of its objects was drawn."""
    cells = list(cells)
    aps = np.full((len(cells), len(matches.class_names), len(weights)), np.nan)
    for k, (detections, objects) in enumerate(_by_class(matches)):
        size = max(len(detections), len(objects), 1)
        # With few draws, several cells fit into a chunk. With many draws, a chunk has one cell.
        rows = min(max(CHUNK_ELEMENTS // size, 1), len(weights))
        columns = max(CHUNK_ELEMENTS // (size * rows), 1)
        for start in range(0, len(weights), rows):
            draws = slice(start, start + rows)
            drawn = _drawn(matches, weights[draws], detections, objects)
            for first in range(0, len(cells), columns):
                chosen = slice(first, first + columns)
                curves = _curves(matches, drawn, detections, objects, cells[chosen])
                aps[chosen, k, draws] = curves.average_precision()
    return dict(zip(cells, aps, strict=True))


def _drawn(
    matches: Matches,
    weights: IntArray,
    detections: npt.NDArray[np.int64],
    objects: npt.NDArray[np.int64],
) -> tuple[IntArray, IntArray]:
    """Returns how often each detection and each object of a class was drawn, with S rows each."""
    return (
        weights.take(matches.dt_image[detections], axis=1),
        weights.take(matches.gt_image[objects], axis=1),
    )


def _curves(
    matches: Matches,
    drawn: tuple[IntArray, IntArray],
    detections: npt.NDArray[np.int64],
    objects: npt.NDArray[np.int64],
    cells: Sequence[Cell],
) -> _Curves:
    """Returns the curves of a class. Its ``detections`` must be in the engine's order."""
    areas, thresholds = np.array(cells).T
    detections_drawn, objects_drawn = drawn
    num_objects = objects_drawn @ ~matches.gt_ignored[areas][:, objects].T
    is_counted = ~matches.dt_ignored[areas, thresholds][:, detections]
    is_true = is_counted & matches.dt_matched[areas, thresholds][:, detections]
    is_point = is_true.any(axis=0)
    hits = _running_count(detections_drawn, is_true)
    ranks = _running_count(detections_drawn, is_counted)
    ranks = ranks.compress(is_point[is_counted.any(axis=0)], axis=2)
    precision = hits / np.maximum(ranks, 1)  # ranks are 0 before the first drawn detection
    precision = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
    # Divides and compares as in pycocotools, so that rounding cannot change the reached recalls.
    recall = hits / np.maximum(num_objects, 1).T[..., None]
    return _Curves(precision, _num_reached(recall), num_objects.T > 0)


def _running_count(drawn: IntArray, is_chosen: npt.NDArray[np.bool_]) -> IntArray:
    """Counts the chosen detections up to each detection that is chosen in any cell.

    Args:
        drawn: (S, D) how often each detection was drawn.
        is_chosen: (C, D) whether the detection is chosen in each cell.

    Returns:
        (C, S, n) counts.
    """
    in_any = is_chosen.any(axis=0)
    # drawn[:, in_any] would be laid out by columns, which is slow to sum along rows.
    counts = drawn.compress(in_any, axis=1)[None]
    is_chosen = is_chosen.compress(in_any, axis=1)
    if not is_chosen.all():
        counts = counts * is_chosen[:, None]
    return counts.cumsum(axis=2, dtype=np.int32)


def _num_reached(recall: FloatArray) -> IntArray:
    """Returns how many of _RECALLS are reached. Faster than searchsorted(side="right")."""
    nearest = (recall * (len(_RECALLS) - 1) + 0.5).astype(np.int32)
    return nearest + (_RECALLS.take(nearest) <= recall)


def _by_class(
    matches: Matches,
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Returns the indices of each class's detections, in the engine's order, and of its objects."""
    borders = np.arange(1, len(matches.class_names))
    # The sort is stable, so equal scores stay ordered by image and position.
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
    """Returns the cells whose mean AP is the metric."""
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
        raise ValueError("weights must be non-negative integers: how often each image is drawn")
    most = max(len(matches.dt_image), len(matches.gt_image), 1)
    if int(weights.max(initial=0)) > np.iinfo(np.int32).max // most:
        raise ValueError(f"weights of up to {weights.max()} are too large: sums overflow an int32")
    return weights.astype(np.int32, copy=False)


def _mean_of_counted(values: FloatArray, axis: int) -> FloatArray:
    """Returns the mean of all values except nan; nan if all are nan."""
    is_counted = ~np.isnan(values)
    total = np.where(is_counted, values, 0.0).sum(axis=axis)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan, as intended
        return total / is_counted.sum(axis=axis)
