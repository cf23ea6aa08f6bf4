"""Compares two runs on the same images: what got better or worse, with intervals.

All numbers of both runs are computed on the same draws of images (paired bootstrap), so the
difficulty of an image, which affects both runs, cancels out. See evaluation/bootstrap.py.

Shape alphabet: I images, K classes, S draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import ConfigError
from ..evaluation.bootstrap import image_weights
from ..evaluation.difference import PairedDifference, difference_of
from ..evaluation.matching import FloatArray
from ..pages.differences import BETTER, WORSE, verdict_of_images, with_interval
from ..pages.tables import number
from .analysis import Analysis
from .diagnosis import TASK_NAMES
from .resampled import BY_CLASS, CALIBRATION, Key, resampled_figures

SHARED = ("image_ids", "class_names", "gt_image", "gt_class", "gt_crowd", "gt_box")
"""Fields that must be equal in both scenes."""
LESS_IS_BETTER = ("error", "oracle", CALIBRATION)
"""Groups of numbers for which lower is better: lost AP, possible gains and calibration error."""
MOST_NAMED = 5
ON_THESE = "on these images (one training each)"
ONE_TRAINING = (
    "The intervals cover the choice of images only. Each model was trained only once, and another "
    "seed might reverse a difference: “better” applies to these two models, not to their settings."
)


@dataclass(frozen=True)
class Difference:
    """The difference between two runs in one number.

    Attributes:
        key: the number that is compared.
        paired: both values, their difference and its interval.
    """

    key: Key
    paired: PairedDifference

    @property
    def finding(self) -> str:
        """The verdict: better, worse or within noise; empty if there is no interval."""
        found = verdict_of_images(self.paired)
        if self.key.group in LESS_IS_BETTER:
            return {BETTER: WORSE, WORSE: BETTER}.get(found, found)
        return found


@dataclass(frozen=True, eq=False)
class Comparison:
    """Comparison of a run with another run.

    Attributes:
        other: the analysis of the other run, the baseline.
        limit: how many detections count in this run; negative for no limit.
        differences: the difference in each number that both runs have.
        f1: (I,) F1 of the run in each image, at IoU 0.5 and with the run's best thresholds.
        other_f1: (I,) F1 of the other run in each image, with the other run's best thresholds.
    """

    other: Analysis
    limit: int
    differences: list[Difference]
    f1: FloatArray
    other_f1: FloatArray

    def sentences(self) -> list[str]:
        """Describes in words what got better and what got worse."""
        aps = [
            f"AP of {TASK_NAMES[x.key.task]} from {number(x.paired.baseline, '.1f')} to "
            f"{number(x.paired.value, '.1f')}, {with_interval(x.paired, 1)}, {finding_text(x)}"
            for x in self.differences
            if x.key.group == x.key.name == "AP"
        ]
        told = [f"Compared with {self.other.files.results}: {'; '.join(aps)}. {ONE_TRAINING}"]
        if self.limit != self.other.files.max_detections:
            told.append(
                "The runs count different numbers of detections per image and class (here "
                f"{_limit(self.limit)}, there {_limit(self.other.files.max_detections)}): part of "
                "the differences may come from this."
            )
        task, groups = self.other.findings.main_task, ("AP", BY_CLASS + "AP")
        parts = [x for x in self.differences if x.key.task == task and x.key.group in groups]
        for kind in (BETTER, WORSE):
            names = [
                f"{'' if x.key.group == 'AP' else 'AP of '}{x.key.name} "
                f"{number(x.paired.difference, '+.1f')}"
                for x in sorted(parts, key=lambda x: -abs(x.paired.difference))
                if x.finding == kind and x.key.name != "AP"
            ]
            if names:
                more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
                listed = f"{', '.join(names[:MOST_NAMED])}{more}"
                told.append(f"{kind.capitalize()} for {TASK_NAMES[task]} {ON_THESE}: {listed}.")
        return told


def finding_text(difference: Difference) -> str:
    """Returns the verdict for readers, with the caveat next to "better" and "worse"."""
    found = difference.finding
    return f"{found} {ON_THESE}" if found in (BETTER, WORSE) else found


def _limit(max_detections: int) -> str:
    return "all" if max_detections < 0 else str(max_detections)


def compare(analysis: Analysis, other: Analysis, num_draws: int, seed: int = 0) -> Comparison:
    """Compares two runs.

    Args:
        analysis: the analysis of the run.
        other: the analysis of the run to compare with.
        num_draws: S, at least 2.
        seed: random seed of the draws.

    Raises:
        ConfigError: if the runs have different images, classes or objects.
    """
    scene, scene_of_other = analysis.findings.scene, other.findings.scene
    for name in SHARED:
        if not np.array_equal(getattr(scene, name), getattr(scene_of_other, name)):
            raise ConfigError(
                f"{analysis.files.annotations} and {other.files.annotations} differ in {name}: "
                "two runs can be compared only on the same images and objects"
            )
    count = len(scene.image_ids)
    if count < 2:
        raise ConfigError(
            f"{analysis.files.annotations} has only one image; a comparison needs at least two"
        )
    as_they_are = np.ones((1, count), np.int32)
    weights = np.concatenate([as_they_are, image_weights(count, num_draws, seed)])
    ours, theirs = (resampled_figures(x, weights) for x in (analysis, other))
    differences = [
        Difference(key, difference_of(key.name, ours[key][None], theirs[key][None], count))
        for key in ours
        if key in theirs
    ]
    limit = analysis.files.max_detections
    return Comparison(other, limit, differences, analysis.image_counts.f1, other.image_counts.f1)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Returns all differences for JSON; the caller replaces nan."""
    return {
        "results": str(comparison.other.files.results),
        "differences": [
            {
                **x.key._asdict(),
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
