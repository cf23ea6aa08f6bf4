"""Two runs on the same images: what got better and worse, and how sure that is.

All figures of both runs are computed of the same draws of images (paired bootstrap), so that what
makes an image hard for both cancels. See evaluation/bootstrap.py.

Shape alphabet: I images, K classes, S draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..config import ConfigError
from ..evaluation.bootstrap import image_weights, resampled_class_ap
from ..evaluation.difference import PairedDifference, difference_of
from ..evaluation.matching import FloatArray
from ..pages.differences import BETTER, WORSE, verdict_of_images, with_interval
from ..pages.tables import number
from .analysis import Analysis
from .diagnosis import TASK_NAMES
from .measures import Measure

Key = tuple[str, str, str, float]
"""Task, group, name and threshold of a figure."""
Weights = npt.NDArray[np.int32]
SHARED = ("image_ids", "class_names", "gt_image", "gt_class", "gt_crowd", "gt_box")
"""What two scenes must have in common."""
MOST_NAMED = 5


@dataclass(frozen=True)
class Difference:
    """How a figure of a run differs from that of the other one.

    Attributes:
        task: "bbox" or "segm".
        group: "AP", "error", "oracle" or "class".
        name: of the figure.
        threshold: IoU of an error, else 0.
        paired: values, difference and interval.
    """

    task: str
    group: str
    name: str
    threshold: float
    paired: PairedDifference

    @property
    def finding(self) -> str:
        """Whether the run is better; of what is still to be won, less is better."""
        found = verdict_of_images(self.paired)
        is_loss = self.group in ("error", "oracle")
        return {BETTER: WORSE, WORSE: BETTER}.get(found, found) if is_loss else found


@dataclass(frozen=True, eq=False)
class Comparison:
    """A run compared with another one.

    Attributes:
        other: the analysis of the other run, the baseline.
        differences: of all figures of both.
        f1: (I,) of the run at IoU 0.5 and its best thresholds.
        other_f1: (I,) of the other.
    """

    other: Analysis
    differences: list[Difference]
    f1: FloatArray
    other_f1: FloatArray

    def sentences(self) -> list[str]:
        """Returns what got better and worse, in words."""
        aps = [
            f"AP of {TASK_NAMES[x.task]} from {number(x.paired.baseline, '.1f')} to "
            f"{number(x.paired.value, '.1f')}, {with_interval(x.paired)}, {x.finding}"
            for x in self.differences
            if x.group == "AP" and x.name == "AP"
        ]
        told = [f"Compared with {self.other.files.results}: {'; '.join(aps)}."]
        parts = [x for x in self.differences if x.task == self.other.findings.main_task]
        for kind in (BETTER, WORSE):
            names = [
                f"{x.name} {number(x.paired.difference, '+.1f')}"
                for x in sorted(parts, key=lambda x: -abs(x.paired.difference))
                if x.finding == kind and x.group in ("class", "AP") and x.name != "AP"
            ]
            if names:
                more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
                told.append(f"{kind.capitalize()}: {', '.join(names[:MOST_NAMED])}{more}.")
        return told


def compare(analysis: Analysis, other: Analysis, num_draws: int, seed: int = 0) -> Comparison:
    """Compares two runs.

    Args:
        analysis: of the run.
        other: of the one that it is compared with.
        num_draws: S, at least 2.
        seed: of the draws.

    Raises:
        ConfigError: if they are not of the same images, classes and objects.
    """
    scene, scene_of_other = analysis.findings.scene, other.findings.scene
    for name in SHARED:
        if not np.array_equal(getattr(scene, name), getattr(scene_of_other, name)):
            raise ConfigError(
                f"{analysis.files.annotations} and {other.files.annotations} differ in {name}: "
                "two runs are compared on the same images and objects"
            )
    count = len(scene.image_ids)
    if count < 2:
        raise ConfigError(
            f"{analysis.files.annotations} has one image: two runs are compared on several"
        )
    as_they_are = np.ones((1, count), np.int32)
    weights = np.concatenate([as_they_are, image_weights(count, num_draws, seed)])

    def difference(key: Key, ours: FloatArray, others: FloatArray) -> Difference:
        return Difference(*key, difference_of(key[2], ours[None], others[None], count))

    differences = []
    samples = [_Samples(weights), _Samples(weights)]
    theirs = other.findings.measures
    shared = [(key, x) for key, x in analysis.findings.measures.items() if key in theirs]
    for key, measure in tqdm(shared, "comparing the runs", unit="figure", leave=False):
        differences.append(difference(key, samples[0](measure), samples[1](theirs[key])))
    for task in set(scene.tasks) & set(scene_of_other.tasks):
        aps = [
            resampled_class_ap(x.findings.found[task].matches, weights) for x in (analysis, other)
        ]
        for name, ours, others in zip(scene.class_names, *aps, strict=True):
            differences.append(difference((task, "class", name, 0.0), ours, others))
    return Comparison(other, differences, analysis.image_counts.f1, other.image_counts.f1)


class _Samples:
    """Figures of all draws; what several figures are compared with is computed once."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._of_bases: dict[int, FloatArray] = {}

    def __call__(self, measure: Measure) -> FloatArray:
        values = measure.aps(self._weights)
        if measure.base is None:
            return values
        key = id(measure.base)
        if key not in self._of_bases:
            self._of_bases[key] = measure.base.aps(self._weights)
        return values - self._of_bases[key]


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Returns all differences; nan is left to who writes it."""
    return {
        "results": str(comparison.other.files.results),
        "differences": [
            {
                "task": x.task,
                "group": x.group,
                "name": x.name,
                "threshold": x.threshold,
                "value": x.paired.value,
                "other": x.paired.baseline,
                "difference": x.paired.difference,
                "low": x.paired.low,
                "high": x.paired.high,
                "finding": x.finding,
            }
            for x in comparison.differences
        ],
    }
