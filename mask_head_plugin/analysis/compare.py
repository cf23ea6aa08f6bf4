"""Two runs on the same images: what got better and worse, and how sure that is.

All figures of both runs are computed of the same draws of images (paired bootstrap), so that what
makes an image hard for both cancels. See evaluation/bootstrap.py.

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
"""What two scenes must have in common."""
LESS_IS_BETTER = ("error", "oracle", CALIBRATION)
"""Groups of figures: what is lost, or is still to be won."""
MOST_NAMED = 5
ONE_TRAINING = (
    "Intervals are over images only: each run is one training, and another seed may "
    "reverse a difference. “Better” is said of these two models, not of their settings."
)


@dataclass(frozen=True)
class Difference:
    """How a figure of a run differs from that of the other one.

    Attributes:
        key: which figure.
        paired: values, difference and interval.
    """

    key: Key
    paired: PairedDifference

    @property
    def finding(self) -> str:
        """Whether the run is better."""
        found = verdict_of_images(self.paired)
        if self.key.group in LESS_IS_BETTER:
            return {BETTER: WORSE, WORSE: BETTER}.get(found, found)
        return found


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
            f"AP of {TASK_NAMES[x.key.task]} from {number(x.paired.baseline, '.1f')} to "
            f"{number(x.paired.value, '.1f')}, {with_interval(x.paired)}, {x.finding}"
            for x in self.differences
            if x.key.group == x.key.name == "AP"
        ]
        told = [f"Compared with {self.other.files.results}: {'; '.join(aps)}. {ONE_TRAINING}"]
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
                told.append(f"{kind.capitalize()} for {TASK_NAMES[task]}: {listed}.")
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
    ours, theirs = (resampled_figures(x, weights) for x in (analysis, other))
    differences = [
        Difference(key, difference_of(key.name, ours[key][None], theirs[key][None], count))
        for key in ours
        if key in theirs
    ]
    return Comparison(other, differences, analysis.image_counts.f1, other.image_counts.f1)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Returns all differences; nan is left to who writes it."""
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
