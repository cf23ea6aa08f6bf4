"""Measures the accuracy of a quantised model: its AP and its agreement with the trained model.

Quantisation changes every number, so it makes no sense to compare single numbers as in ``parity``.

Shape alphabet: R detections, M mask side.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances

from ..class_names import class_names_of
from ..comparison.measurement import choose_images
from ..evaluation import MaskEvaluator, bootstrap, counted_detections
from ..evaluation.difference import PairedDifference
from ..evaluation.matching import Matches
from ..messages import ConfigError
from ..modeling.rcnn import rle_postprocess
from ..progress import progress
from .parity import Outputs, Run, eager_outputs, matched
from .samples import Sample, read_sample, usable_dataset

logger = logging.getLogger(__name__)

MOST_AP_LOSS = 1.0
"""Largest tolerated difference in box AP and in mask AP, in points. With few images, a larger
difference can be chance, so it is tolerated if its 95% interval includes 0.
"""

LEAST_AGREEMENT = 0.9
"""Lowest tolerated share of confident detections that both models have. This is also the lowest
tolerated mean IoU of the masks of these detections.
"""

SURE = 0.5
"""Lowest score of a confident detection, which the other model should therefore also have."""

SIDES = ("trained", "exported")

MOST_IMAGES = 200
"""Largest number of images of a data set to run both models on, spread evenly over the data set."""


@dataclass
class Accuracy:
    """Result of comparing a quantised model with the trained one.

    Attributes:
        counts: number of detections of the trained model in each image.
        mask_side: M, for models with masks.
        num_sure: number of confident detections (see SURE) of both models together.
        num_agreeing: number of these detections that the other model also has.
        ious: IoU of the two masks of each confident detection that both models have.
        dataset: number of images and name of the data set on which AP was computed; None if AP was
            not computed.
        ap: AP of the trained model (baseline) and of the exported model (value), by task.
    """

    counts: list[int] = field(default_factory=list)
    mask_side: int = 0
    num_sure: int = 0
    num_agreeing: int = 0
    ious: list[float] = field(default_factory=list)
    dataset: str | None = None
    ap: dict[str, PairedDifference] = field(default_factory=dict)

    def add(self, expected: Outputs, found: Outputs) -> None:
        """Compares the outputs of the trained and the exported model for an image."""
        self.counts.append(len(expected["scores"]))
        pairs = matched(expected, found)
        for outputs, rows in ((expected, pairs[:, 0]), (found, pairs[:, 1])):
            is_sure = outputs["scores"] >= SURE
            self.num_sure += int(is_sure.sum())
            self.num_agreeing += int(is_sure[rows].sum())
        if "mask_probs" not in expected:
            return
        self.mask_side = expected["mask_probs"].shape[-1]
        pairs = pairs[expected["scores"][pairs[:, 0]] >= SURE]
        a, b = expected["mask_probs"][pairs[:, 0]] >= 0.5, found["mask_probs"][pairs[:, 1]] >= 0.5
        both, either = (a & b).sum(axis=(1, 2)), (a | b).sum(axis=(1, 2))
        self.ious += np.where(either > 0, both / np.maximum(either, 1), 1.0).tolist()

    @property
    def agreement(self) -> dict[str, float]:
        """The share of confident detections that both models have, and the mean IoU of their masks.

        The share is 1 if there are no detections. The mean IoU is left out if there are no masks.
        """
        shares = {"detections": self.num_agreeing / self.num_sure if self.num_sure else 1.0}
        return {**shares, **({"masks": float(np.mean(self.ious))} if self.ious else {})}

    @property
    def unlike(self) -> list[str]:
        """The differences beyond the tolerance, one line each."""
        lines = [
            f"{task} AP on {self.dataset} is {ap.value:.2f}, but the trained model's is "
            f"{ap.baseline:.2f}; a difference of {MOST_AP_LOSS:g} point is tolerated"
            for task, ap in self.ap.items()
            if abs(ap.difference) > MOST_AP_LOSS and not ap.low <= 0 <= ap.high
        ]
        return lines + [
            f"the agreement of {name} is {share:.1%}, but must be at least {LEAST_AGREEMENT:.0%}"
            for name, share in self.agreement.items()
            if not share >= LEAST_AGREEMENT
        ]

    def __str__(self) -> str:
        words = {"detections": "{:.1%} of the detections", "masks": "mean mask IoU {:.1%}"}
        told = ", ".join(words[name].format(share) for name, share in self.agreement.items())
        text = (
            f"compared with the trained model on {len(self.counts)} images with "
            f"{min(self.counts)} to {max(self.counts)} detections; agreement: {told}"
        )
        tasks = (
            f"{task} {ap.value:.2f} (trained {ap.baseline:.2f})" for task, ap in self.ap.items()
        )
        return f"{text}; AP on {self.dataset}: {', '.join(tasks)}" if self.ap else text


def compare_accuracy(
    cfg: CfgNode,
    model: GeneralizedRCNN,
    run: Run,
    samples: Sequence[Sample],
    size: tuple[int, int] | None,
) -> Accuracy:
    """Runs both models on images, and on a data set in DATASETS.TEST if one is on this machine.

    Args:
        cfg: the model's config.
        model: the trained model, in evaluation mode on the CPU.
        run: runs the exported model.
        samples: images; may be empty if there is a data set.
        size: height and width to which the exported model pads images; None if it does not pad.
    """
    accuracy = Accuracy()
    for sample in progress(samples, "comparing with the trained model", "image"):
        accuracy.add(eager_outputs(model, sample.image, size), run(sample.image))
    try:
        dataset = usable_dataset(cfg, "TEST")
    except ConfigError as error:
        logger.warning("AP was not compared: %s", error)
        return accuracy
    with tempfile.TemporaryDirectory() as folder:
        _compare_ap(accuracy, cfg, model, run, dataset, Path(folder), size)
    return accuracy


def _compare_ap(
    accuracy: Accuracy,
    cfg: CfgNode,
    model: GeneralizedRCNN,
    run: Run,
    dataset: str,
    folder: Path,
    size: tuple[int, int] | None,
) -> None:
    name = choose_images(dataset, MOST_IMAGES, folder)
    limit = counted_detections(cfg.TEST.DETECTIONS_PER_IMAGE)
    evaluators = [
        MaskEvaluator(
            name, distributed=False, output_dir=str(folder / side), max_dets_per_image=limit
        )
        for side in SIDES
    ]
    for evaluator in evaluators:
        evaluator.predicted_classes = class_names_of(model)
        evaluator.reset()
    records = DatasetCatalog.get(name)
    for record in progress(records, "comparing AP", "image"):
        image = read_sample(cfg, record["file_name"], size)
        both = eager_outputs(model, image, size), run(image)
        accuracy.add(*both)
        for evaluator, outputs in zip(evaluators, both, strict=True):
            found = _in_image(outputs, image.shape[1:], (record["height"], record["width"]))
            evaluator.process([record], [{"instances": found}])
    results = [evaluator.evaluate() for evaluator in evaluators]
    accuracy.dataset = f"{len(records)} images of {dataset}"
    for task in [x for x in ("bbox", "segm") if x in results[0]]:
        trained, exported = (Matches.load(folder / x / f"matches_{task}.npz") for x in SIDES)
        accuracy.ap[task] = bootstrap.compare([exported], [trained], ("AP",))["AP"]


def _in_image(outputs: Outputs, seen_hw: Any, image_hw: tuple[int, int]) -> Instances:
    """Converts the outputs of a model to detectron2's detections in the image.

    Args:
        outputs: outputs by name.
        seen_hw: size of the model's input image.
        image_hw: H, W.
    """
    tensors = {name: torch.from_numpy(values) for name, values in outputs.items()}
    found = Instances(tuple(seen_hw))
    found.pred_boxes = Boxes(tensors["boxes"])
    found.scores, found.pred_classes = tensors["scores"], tensors["classes"]
    if "mask_probs" in tensors:
        found.pred_masks = tensors["mask_probs"][:, None]
    if "mask_scores" in tensors:
        found.mask_scores = tensors["mask_scores"]
    return rle_postprocess(found, *image_hw)
