"""The analysis of one run: everything that its pages and JSON show."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..evaluation.bootstrap import class_ap
from ..evaluation.image_counts import ImageCounts, image_counts
from ..evaluation.matching import FloatArray
from .curves import (
    ClassGap,
    Density,
    Reliability,
    Threshold,
    ap_by_density,
    best_thresholds,
    class_gaps,
    confusion,
    reliability,
)
from .diagnosis import diagnose
from .errors import KINDS
from .mask_quality import (
    BoxOffsets,
    MaskQuality,
    QualityRow,
    box_offsets,
    mask_quality,
    quality_rows,
)
from .measures import Findings, measure
from .reading import read_scene
from .run_files import RunFiles, read_results

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Analysis:
    """The analysis of a run.

    Attributes:
        files: the run's files.
        findings: matches, errors and numbers.
        offsets: box offsets of found objects.
        quality: mask quality of found objects; None without masks.
    """

    files: RunFiles
    findings: Findings
    offsets: BoxOffsets
    quality: MaskQuality | None

    @property
    def class_names(self) -> list[str]:
        return list(self.findings.scene.class_names)

    @cached_property
    def thresholds(self) -> list[Threshold]:
        task = self.findings.main_task
        return best_thresholds(self.findings.scene, self.findings.found[task])

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        task = self.findings.main_task
        return confusion(self.findings.scene, self.findings.found[task], self.is_kept)

    @cached_property
    def reliability(self) -> Reliability:
        assignment = self.findings.found[self.findings.main_task]
        return reliability(assignment.at(0.5), self.findings.scene.dt_score[assignment.rows])

    @cached_property
    def gaps(self) -> list[ClassGap]:
        # Uses boxes, because a rough mask does not make the score wrong.
        return class_gaps(self.findings.scene, self.findings.found["bbox"])

    @cached_property
    def densities(self) -> list[Density]:
        return ap_by_density(self.findings.found[self.findings.main_task].matches)

    @cached_property
    def is_kept(self) -> npt.NDArray[np.bool_]:
        """Whether each detection scores above the best threshold of its class, (D,).

        Classes without a best threshold use 0.5.
        """
        scene = self.findings.scene
        best = {x.class_name: x.score for x in self.thresholds if math.isfinite(x.score)}
        least = np.array([best.get(name, 0.5) for name in scene.class_names])
        return scene.dt_score > least[scene.dt_class]

    @cached_property
    def image_counts(self) -> ImageCounts:
        """Counts for each image at IoU 0.5.

        Only detections that score above the best threshold of their class are counted.
        """
        assignment = self.findings.found[self.findings.main_task]
        at, kept = assignment.at(0.5), self.is_kept[assignment.rows]
        return image_counts(replace(at, dt_ignored=at.dt_ignored | ~kept), min_score=-math.inf)

    @cached_property
    def quality_rows(self) -> list[QualityRow]:
        return [] if self.quality is None else quality_rows(self.findings.scene, self.quality)

    def class_ap(self, task: str, metric: str = "AP") -> FloatArray:
        """Returns the AP of each class in percent, (K,); nan for classes without objects."""
        return class_ap(self.findings.found[task].matches, metric)

    @cached_property
    def diagnosis(self) -> list[str]:
        """Sentences that describe what the model gets wrong."""
        return diagnose(
            self.findings,
            self.files.mask_side,
            self.offsets,
            self.quality,
            self.confusion,
            self.gaps,
        )


def analyze(files: RunFiles) -> Analysis:
    """Analyses a run.

    Args:
        files: the run's files.

    Raises:
        ConfigError: if results and annotations do not belong together.
    """
    logger.info("reading %s and %s", files.results, files.annotations)
    scene = read_scene(files.annotations, read_results(files.results), files.results)
    findings = measure(scene, files.max_detections, files.mask_side)
    offsets = box_offsets(scene, findings.found["bbox"])
    quality = mask_quality(scene, offsets) if "segm" in scene.tasks else None
    return Analysis(files, findings, offsets, quality)


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Returns all numbers of an analysis for JSON; unknown numbers are nan."""
    findings, files = analysis.findings, analysis.files
    scene = findings.scene
    return {
        "results": str(files.results),
        "annotations": str(files.annotations),
        "dataset": files.dataset,
        "max_detections": files.max_detections,
        "mask_side": files.mask_side,
        "num_images": len(scene.image_ids),
        "num_objects": int((~scene.gt_crowd).sum()),
        "num_detections": len(scene.dt_image),
        "diagnosis": analysis.diagnosis,
        "tasks": {task: _task_json(analysis, task) for task in scene.tasks},
        "mask_quality": [vars(row) for row in analysis.quality_rows],
        "box_edges_off": _named(
            ("left", "top", "right", "bottom"), np.median(analysis.offsets.edges, axis=0)
        )
        if len(analysis.offsets.edges)
        else {},
        "thresholds": [vars(x) for x in analysis.thresholds],
        "confusion": {
            "classes": [*scene.class_names, "background"],
            "counts": analysis.confusion.tolist(),
        },
        "reliability": {
            "score": analysis.reliability.score.tolist(),
            "precision": analysis.reliability.precision.tolist(),
            "count": analysis.reliability.count.tolist(),
            "error": analysis.reliability.error,
        },
        "density": [
            {"name": x.name, "images": x.images, "objects": x.objects, "ap": x.ap}
            for x in analysis.densities
        ],
    }


def _task_json(analysis: Analysis, task: str) -> dict[str, Any]:
    findings = analysis.findings
    own = [x for x in findings.measures.values() if x.task == task]
    errors = {
        f"{threshold:g}": {
            x.name: {
                "ap_won": x.value,
                **({"count": of_threshold.count(KINDS.index(x.name))} if x.name in KINDS else {}),
            }
            for x in own
            if x.group == "error" and x.threshold == threshold
        }
        for threshold, of_threshold in findings.errors[task].items()
    }
    return {
        **{x.name: x.value for x in own if x.group == "AP"},
        "by_class": _named(analysis.class_names, analysis.class_ap(task)),
        "errors": errors,
        "oracles": {x.name: {"ap_won": x.value} for x in own if x.group == "oracle"},
    }


def _named(names: Any, values: Any) -> dict[str, float]:
    return {name: float(x) for name, x in zip(names, values, strict=True)}
