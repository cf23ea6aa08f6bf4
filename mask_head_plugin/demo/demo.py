"""Runs a trained detectron2 model on images and videos; see ``model_run``.

Shape alphabet: K classes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode

from ..config import ConfigError
from ..config_check import check_config
from ..data import dataset_categories
from ..engine.predictor import load_predictor
from ..evaluation.drawing import ByteArray
from ..messages import listed
from ..structures import run_lengths
from ..user_code import load_config_and_code
from .media import find_sources
from .model_run import ModelRun, check_output, check_threshold
from .predictions import Categories, Detections
from .thresholds import class_thresholds, parsed_thresholds

logger = logging.getLogger(__name__)


class EagerModel:
    """A model that runs in detectron2, with its class names."""

    def __init__(
        self, cfg: CfgNode, confidence_threshold: float, thresholds: Sequence[str] = ()
    ) -> None:
        """Loads the model.

        Args:
            cfg: a config from ``demo_config``.
            confidence_threshold: score that detections must exceed if ``thresholds`` does not list
                their class.
            thresholds: "NAME=SCORE" for classes with a different threshold.

        Raises:
            ConfigError: if the weights cannot be read or do not fill the model, or if
                ``thresholds`` are malformed or name a class that the model does not have.
        """
        self.predictor = load_predictor(cfg)
        names = self.predictor.metadata.get("thing_classes")
        self.categories = model_categories(cfg, names)
        least = class_thresholds(self.categories.names, confidence_threshold, thresholds)
        self._least = torch.from_numpy(least) if thresholds else None

    def find(self, images: Sequence[ByteArray]) -> list[Detections]:
        """See ``model_run.Model``."""
        return [self._find(image) for image in images]

    def _find(self, image: ByteArray) -> Detections:
        output = self.predictor(image)
        if "instances" not in output:
            raise ConfigError(f"the model returns no instances, but only {sorted(output)}")
        instances = output["instances"].to("cpu")
        if self._least is not None:  # the model has already applied the lowest threshold
            instances = instances[instances.scores > self._least[instances.pred_classes]]
        return Detections(
            instances.pred_classes.tolist(),
            instances.scores.tolist(),
            instances.mask_scores.tolist() if instances.has("mask_scores") else None,
            instances.pred_boxes.tensor.numpy().astype(np.float64).reshape(-1, 4),
            run_lengths(instances.pred_masks) if instances.has("pred_masks") else None,
        )

    def longest_side(self, image_hw: tuple[int, int]) -> int | None:
        """See ``model_run.Model``."""
        longest: int = self.predictor.cfg.INPUT.MAX_SIZE_TEST
        return longest if self.predictor.scales_down(*image_hw) else None


def run_demo(
    config_file: str,
    opts: Sequence[str],
    inputs: Sequence[str],
    output: Path,
    confidence_threshold: float = 0.5,
    *,
    thresholds: Sequence[str] = (),
    semantic: bool = False,
) -> list[str]:
    """Runs a model on images and videos.

    Args:
        config_file: a YAML file.
        opts: "KEY VALUE" pairs in one flat list.
        inputs: images, videos, folders of these, and patterns such as ``photos/*.jpg``.
        output: folder for the results, created if it does not exist. No file is overwritten.
        confidence_threshold: score that detections must exceed, from 0 to 1.
        thresholds: "NAME=SCORE" for classes with a different threshold.
        semantic: whether to write semantic maps as well.

    Returns:
        One line for each input without a complete result, with the reason.

    Raises:
        ConfigError: if a setting, a file or the output folder cannot be used.
        OSError: if a result cannot be written.
    """
    check_threshold(confidence_threshold)
    sources = find_sources(inputs)
    check_output(output, sources, semantic=semantic)
    lowest = min([confidence_threshold, *parsed_thresholds(thresholds).values()])
    cfg = demo_config(config_file, opts, output, lowest)
    if semantic and not cfg.MODEL.MASK_ON:
        raise ConfigError("--semantic needs masks, but MODEL.MASK_ON is False")
    model = EagerModel(cfg, confidence_threshold, thresholds)
    return ModelRun(model, output, semantic=semantic).run(sources)


def demo_config(
    config_file: str, opts: Sequence[str], output: Path, confidence_threshold: float
) -> CfgNode:
    """Returns a checked config whose model drops detections below the threshold.

    Raises:
        ConfigError: if the config cannot be used or does not name weights.
    """
    cfg = load_config_and_code(config_file, opts)
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("no weights: add --opts MODEL.WEIGHTS FILE (.pth, .pkl or .safetensors)")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = confidence_threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = confidence_threshold
    cfg.OUTPUT_DIR = str(output)
    check_config(cfg, train=False, evaluate=False)
    return cfg


def model_categories(cfg: CfgNode, names: Sequence[str] | None) -> Categories:
    """Returns names and category ids of a model's classes. Numbers replace unknown names.

    Classes get the ids that classes of the same name have in the first data set in DATASETS.TEST
    or, failing that, in TRAIN. Classes that this data set does not have get new, higher ids. The
    annotation files of DATASETS.COCO_FILES do not have to be on this machine.

    Args:
        cfg: the model's config.
        names: names of the model's K classes, in the order of its output rows; None if unknown.
    """
    id_of, unknown = _category_ids(cfg)
    if names is None:
        count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        logger.warning(
            "classes are shown as numbers, because the weights have no class names, and no data "
            "set has %d classes: %s",
            count,
            unknown or f"the data set has {len(id_of)}, {listed(list(id_of))}",
        )
        numbers = range(1, count + 1)
        return Categories([str(k) for k in numbers], list(numbers))
    missing = [name for name in names if name not in id_of]
    free = itertools.count(max(id_of.values(), default=0) + 1)
    if missing:
        logger.warning(
            "new category ids for %s: %s",
            listed(missing),
            unknown or f"the data set has {listed(list(id_of))}",
        )
    return Categories(list(names), [id_of[x] if x in id_of else next(free) for x in names])


def _category_ids(cfg: CfgNode) -> tuple[dict[str, int], str]:
    """Returns the category ids of a data set by class name, or the reason why it has none."""
    unknown = []
    for name in (*cfg.DATASETS.TEST[:1], *cfg.DATASETS.TRAIN[:1]):
        try:
            categories = dataset_categories(cfg.DATASETS, name)
        except ConfigError as error:
            unknown.append(str(error))
            continue
        if categories is not None:
            return {category: i for i, category in categories.items()}, ""
        unknown.append(f"data set {name!r} is unknown")
    return {}, "; ".join(dict.fromkeys(unknown)) or "DATASETS is empty"
