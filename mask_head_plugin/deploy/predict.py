"""Runs an exported model on images and videos, and writes the same results as the demo."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..demo.media import find_sources
from ..demo.model_run import ModelRun, check_output, check_threshold
from ..demo.predictions import Categories, Detections
from ..demo.thresholds import class_thresholds
from ..evaluation.drawing import ByteArray
from ..messages import ConfigError
from ..model_input import is_scaled_down
from .runtime import MOST_THREADS, Prediction, Predictor

logger = logging.getLogger(__name__)


class ExportedModel:
    """An exported model that runs in onnxruntime."""

    def __init__(
        self, predictor: Predictor, confidence_threshold: float, thresholds: Sequence[str] = ()
    ) -> None:
        """
        Args:
            predictor: runs the model.
            confidence_threshold: score that detections must exceed, from 0 to 1.
            thresholds: "NAME=SCORE" for classes with a different threshold.

        Raises:
            ConfigError: if ``thresholds`` are malformed or name a class that the model does not
                have.
        """
        self.predictor = predictor
        self.least = class_thresholds(predictor.class_names, confidence_threshold, thresholds)
        names = predictor.class_names
        ids = predictor.description.category_ids or list(range(1, len(names) + 1))
        self.categories = Categories(names, ids)

    def find(self, images: Sequence[ByteArray]) -> list[Detections]:
        """See ``model_run.Model``."""
        return [self._detections(found) for found in self.predictor(images)]

    def _detections(self, found: Prediction) -> Detections:
        kept = np.flatnonzero(found.scores > self.least[found.class_ids])
        return Detections(
            found.class_ids[kept].tolist(),
            found.scores[kept].tolist(),
            None if found.mask_scores is None else found.mask_scores[kept].tolist(),
            found.boxes[kept].astype(np.float64),
            None if found.masks is None else [found.masks[k] for k in kept],
        )

    def longest_side(self, image_hw: tuple[int, int]) -> int | None:
        """See ``model_run.Model``."""
        given = self.predictor.description.input
        is_scaled = is_scaled_down(image_hw, given.min_size, given.max_size)
        return given.max_size if is_scaled else None


def run_predict(
    folder: Path,
    inputs: Sequence[str],
    output: Path,
    confidence_threshold: float = 0.5,
    *,
    thresholds: Sequence[str] = (),
    semantic: bool = False,
    batch_size: int = 1,
    threads: int | None = None,
) -> list[str]:
    """Runs an exported model on images and videos.

    Args:
        folder: folder of the model.
        inputs: images, videos, folders of these, and patterns such as ``photos/*.jpg``.
        output: folder for the results, created if it does not exist. No file is overwritten.
        confidence_threshold: score that detections must exceed, from 0 to 1.
        thresholds: "NAME=SCORE" for classes with a different threshold.
        semantic: whether to write semantic maps as well.
        batch_size: number of images passed to the model at a time.
        threads: number of threads for onnxruntime; None uses as many as the machine has cores.

    Returns:
        One line for each input without a complete result, with the reason.

    Raises:
        ConfigError: if an argument, the model or the output folder cannot be used.
        ImportError: if onnxruntime is not installed.
        OSError: if a result cannot be written.
    """
    check_threshold(confidence_threshold)
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size} is below 1")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ConfigError(f"--threads {threads} is not between 1 and {MOST_THREADS}")
    sources = find_sources(inputs)
    check_output(output, sources, semantic=semantic)
    predictor = Predictor(folder, threads=threads)
    description = predictor.description
    if semantic and description.mask is None:
        raise ConfigError(f"--semantic needs masks, but the model in {folder} has none")
    model = ExportedModel(predictor, confidence_threshold, thresholds)
    if float(model.least.min()) < description.score_threshold:
        logger.warning(
            "a threshold of %g has no effect: the model in %s was exported with "
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST %g and returns no detections with lower scores",
            float(model.least.min()),
            folder,
            description.score_threshold,
        )
    return ModelRun(model, output, semantic=semantic, batch_size=batch_size).run(sources)
