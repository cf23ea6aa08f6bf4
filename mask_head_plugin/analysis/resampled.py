"""Computes the numbers of an analysis on resampled images (see evaluation/bootstrap.py).

Shape alphabet: S draws of I images; K classes; n detections of one class; P pairs of an object and
its detection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..evaluation.bootstrap import resampled_ap, resampled_class_ap
from ..evaluation.matching import FloatArray
from ..progress import progress
from .analysis import Analysis
from .curves import bin_sums, calibration_error, f1_curves
from .mask_quality import quality_groups
from .measures import Measure

Weights = npt.NDArray[np.int32]
IOU, BOUNDARY, F1, F1_AT_HALF = "mask IoU", "boundary IoU", "F1", "F1 at 0.5"
CALIBRATION, DENSITY = "calibration error", "density"
BY_CLASS = "class "
"""Prefix of the names of groups whose numbers each belong to one class."""


class Key(NamedTuple):
    """Identifies one number of an analysis.

    Attributes:
        task: "bbox" or "segm".
        group: "AP", "error", "oracle", "density", or a group that this module defines.
        name: name within the group: a metric, an error, an oracle, a set of objects or a class.
        threshold: IoU threshold of an error; otherwise 0.
    """

    task: str
    group: str
    name: str
    threshold: float = 0.0


def resampled_figures(analysis: Analysis, weights: Weights) -> dict[Key, FloatArray]:
    """Computes each number on S resampled data sets, (S,) in percent.

    Args:
        analysis: the analysis of a run.
        weights: (S, I) how often each draw contains each image; see bootstrap.image_weights.
    """
    found = dict(_of_measures(analysis, weights))
    found.update(_of_classes(analysis, weights))
    found.update(_of_densities(analysis, weights))
    found.update(_of_masks(analysis, weights))
    found.update(_of_scores(analysis, weights))
    return found


def _of_measures(analysis: Analysis, weights: Weights) -> Iterator[tuple[Key, FloatArray]]:
    bases: dict[int, FloatArray] = {}  # computed once, shared by several measures
    measures = list(analysis.findings.measures.values())
    for measure in progress(measures, "resampling the images", "metric"):
        values = measure.aps(weights)
        if measure.base is not None:
            values = values - _base(measure.base, weights, bases)
        yield Key(*measure.key), values


def _base(base: Measure, weights: Weights, known: dict[int, FloatArray]) -> FloatArray:
    if id(base) not in known:
        known[id(base)] = base.aps(weights)
    return known[id(base)]


def _of_classes(analysis: Analysis, weights: Weights) -> Iterator[tuple[Key, FloatArray]]:
    for task, assignment in analysis.findings.found.items():
        aps = resampled_class_ap(assignment.matches, weights)
        for name, values in zip(analysis.class_names, aps, strict=True):
            yield Key(task, BY_CLASS + "AP", name), values


def _of_densities(analysis: Analysis, weights: Weights) -> Iterator[tuple[Key, FloatArray]]:
    task = analysis.findings.main_task
    for density in analysis.densities:
        matches = analysis.findings.found[task].matches
        aps = resampled_ap(matches, weights * density.chosen, ("AP",))
        yield Key(task, DENSITY, density.name), aps["AP"]


def _of_masks(analysis: Analysis, weights: Weights) -> Iterator[tuple[Key, FloatArray]]:
    """Yields mean mask IoUs; an image's sums are multiplied by how often it was drawn."""
    scene, quality = analysis.findings.scene, analysis.quality
    if quality is None:
        return
    image, count = scene.gt_image[quality.objects], len(scene.image_ids)
    for by, name, of in quality_groups(scene, quality):
        pairs = weights @ np.bincount(image[of], minlength=count)
        for group, values in ((IOU, quality.iou), (BOUNDARY, quality.boundary)):
            total = weights @ np.bincount(image[of], values[of], count)
            key = (
                Key("segm", BY_CLASS + group, name)
                if by == "class"
                else Key("segm", group, name if by == "all" else f"{by}: {name}")
            )
            yield key, 100 * _ratio(total, pairs)


def _of_scores(analysis: Analysis, weights: Weights) -> Iterator[tuple[Key, FloatArray]]:
    """Yields the F1 at each draw's best threshold and at 0.5, and the calibration error."""
    scene, task = analysis.findings.scene, analysis.findings.main_task
    assignment = analysis.findings.found[task]
    at, score = assignment.at(0.5), scene.dt_score[assignment.rows]
    drawn = np.tensordot(bin_sums(at, score), weights, axes=([1], [1]))  # (3, B, S)
    yield Key(task, CALIBRATION, "all"), 100 * calibration_error(np.moveaxis(drawn, 1, 2))
    counted, is_asked = ~at.dt_ignored[0, 0], ~at.gt_ignored[0]
    f1: dict[str, list[FloatArray]] = {F1: [], F1_AT_HALF: []}
    for k, name in enumerate(scene.class_names):
        own = np.flatnonzero(counted & (at.dt_class == k))
        own = own[np.argsort(-score[own], kind="stable")]
        images = at.gt_image[is_asked & (at.gt_class == k)]
        num_objects = weights @ np.bincount(images, minlength=weights.shape[1])
        curves = f1_curves(
            score[own], at.dt_matched[0, 0, own], weights[:, at.dt_image[own]], num_objects
        )
        # The first column is the F1 if no detection is kept.
        curves = np.concatenate([np.zeros((len(weights), 1)), curves], 1)
        of_class = {F1: curves.max(1), F1_AT_HALF: curves[:, int((score[own] > 0.5).sum())]}
        for group, values in of_class.items():
            known = np.where(num_objects > 0, 100 * values, np.nan)
            f1[group].append(known)
            yield Key(task, BY_CLASS + group, name), known
    for group, of_classes in f1.items():
        values = np.stack(of_classes)
        is_known = ~np.isnan(values)
        yield Key(task, group, "mean"), _ratio(np.nan_to_num(values).sum(0), is_known.sum(0))


def _ratio(total: npt.NDArray[np.number], count: npt.NDArray[np.integer]) -> FloatArray:
    """Returns total / count; nan where the count is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / count, float)
