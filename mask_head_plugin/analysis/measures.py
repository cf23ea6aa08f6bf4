"""Computes the numbers of an analysis: AP, and the gains from repaired errors or perfect branches.

Each number is computed from matches, so it can also be computed on resampled images.

Shape alphabet: S draws of I images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..evaluation.bootstrap import average_precision, resampled_ap
from ..evaluation.coco_ap import METRICS
from ..evaluation.matching import FloatArray, Matches
from .assignment import Assignment, assign
from .errors import (
    BOTH,
    CLASS,
    KINDS,
    Errors,
    find_errors,
    repaired_matches,
    without_false_positives,
    without_misses,
)
from .oracles import oracle_matches
from .scene import Scene

ERROR_THRESHOLDS = (0.5, 0.75)
"""IoUs at which errors are classified: TIDE's, and a stricter one that reveals rough masks."""
SPECIAL_KINDS = ("false positives", "false negatives")
"""TIDE's two summary errors: all false detections, and all objects that were not found."""


@dataclass(frozen=True, eq=False)
class Measure:
    """One number of an analysis, in percent.

    Attributes:
        task: "bbox" or "segm".
        group: "AP", "error" or "oracle".
        name: a metric, a kind of error or an oracle.
        matches: matches from which the AP is computed.
        metric: one of METRICS. If the matches have only one IoU threshold, "AP" is the AP at that
            threshold.
        base: measure whose value is subtracted to obtain the gain; None to subtract nothing.
        threshold: IoU threshold of an error; otherwise 0.
    """

    task: str
    group: str
    name: str
    matches: Matches
    metric: str = "AP"
    base: Measure | None = None
    threshold: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, float]:
        return self.task, self.group, self.name, self.threshold

    @cached_property
    def value(self) -> float:
        """The number for the original images, without resampling."""
        if self.base is not None:
            return average_precision(self.matches, self.metric) - self.base.value
        return average_precision(self.matches, self.metric)

    def aps(self, weights: npt.NDArray[np.int32]) -> FloatArray:
        """Returns the AP of each resampled data set, (S,); the base is not subtracted.

        Args:
            weights: (S, I) how often each draw contains each image; see bootstrap.image_weights.
        """
        return resampled_ap(self.matches, weights, (self.metric,))[self.metric]


@dataclass(frozen=True, eq=False)
class Findings:
    """The matches and errors of a scene, and the numbers computed from them.

    Attributes:
        scene: all detections and objects.
        found: the assignment of each task.
        errors: the errors of each task at each of ERROR_THRESHOLDS.
        measures: all numbers by key.
    """

    scene: Scene
    found: dict[str, Assignment]
    errors: dict[str, dict[float, Errors]]
    measures: dict[tuple[str, str, str, float], Measure] = field(default_factory=dict)

    def value(self, task: str, group: str, name: str, threshold: float = 0.0) -> float:
        """Returns one number, in percent."""
        return self.measures[task, group, name, threshold].value

    @property
    def kinds(self) -> list[str]:
        """The kinds of errors that are possible: a single class cannot be confused with others."""
        of_classes = () if len(self.scene.class_names) > 1 else (CLASS, BOTH)
        return [name for kind, name in enumerate(KINDS) if kind not in of_classes]

    def oracles(self, task: str) -> list[str]:
        """Returns a task's oracles, without "perfect classes" if there is only one class."""
        names = [x.name for x in self.measures.values() if (x.task, x.group) == (task, "oracle")]
        is_right = len(self.scene.class_names) == 1
        return [x for x in names if not (is_right and x == "perfect classes")]

    @property
    def main_task(self) -> str:
        return self.scene.tasks[-1]


def measure(scene: Scene, max_detections: int, mask_side: int) -> Findings:
    """Matches a scene and computes all numbers of the analysis.

    Args:
        scene: all detections and objects.
        max_detections: how many detections count per image and class; negative for no limit.
        mask_side: M, the side of the mask branch's output.
    """
    found = {task: assign(scene, task, max_detections) for task in scene.tasks}
    errors = {
        task: {t: find_errors(scene, assignment, t) for t in ERROR_THRESHOLDS}
        for task, assignment in found.items()
    }
    made = [*_aps(found), *_error_measures(scene, found, errors)]
    bases = {x.task: x for x in made if (x.group, x.name) == ("AP", "AP")}
    for task, name, matches in oracle_matches(
        scene, found, errors["bbox"][0.5], max_detections, mask_side
    ):
        made.append(Measure(task, "oracle", name, matches, base=bases[task]))
    return Findings(scene, found, errors, {x.key: x for x in made})


def _aps(found: dict[str, Assignment]) -> list[Measure]:
    return [
        Measure(task, "AP", metric, assignment.matches, metric)
        for task, assignment in found.items()
        for metric in METRICS
    ]


def _error_measures(
    scene: Scene, found: dict[str, Assignment], errors: dict[str, dict[float, Errors]]
) -> list[Measure]:
    made = []
    for task, assignment in found.items():
        for threshold, of_threshold in errors[task].items():
            repairs = {
                name: repaired_matches(scene, assignment, of_threshold, kind)
                for kind, name in enumerate(KINDS)
            }
            repairs["false positives"] = without_false_positives(assignment, threshold)
            repairs["false negatives"] = without_misses(scene, assignment, of_threshold)
            base = Measure(task, "AP", f"AP{100 * threshold:.0f}", assignment.at(threshold))
            made += [
                Measure(task, "error", name, matches, "AP", base, threshold)
                for name, matches in repairs.items()
            ]
    return made
