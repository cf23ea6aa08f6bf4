"""Measures how far an exported model is from the trained one, detection by detection.

Shape alphabet: R detections, M mask side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor

from ..progress import progress
from .exportable import last_predictor
from .samples import Sample

Outputs = dict[str, npt.NDArray[Any]]
Run = Callable[[Tensor], Outputs]

TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "fp32": {"boxes": 1e-2, "scores": 1e-4, "mask_probs": 1e-3, "mask_scores": 1e-4},
    "fp16": {"boxes": 2.0, "scores": 2e-2, "mask_probs": 1e-1, "mask_scores": 2e-2},
}
"""Largest difference of each output that counts as rounding: boxes in pixels of the model's input.

The one of masks holds for logits of trained models, few of which exceed 10. Rounding grows with
them: a DC5 model with random weights and logits of about 25 differs by up to 2e-3 from its export,
and both by up to 4e-3 from float64.
"""

ROUNDING = 1e-3
"""Change of pixel values (up to 255): less than a float32 model can distinguish."""


@dataclass
class Parity:
    """What was compared.

    Attributes:
        tolerance: by output.
        largest: the largest difference of each output so far.
        mask_side: M, of models with masks.
        counts: detections of each image.
        unlike: what differs beyond the tolerance, one line each.
        undecided: images in which the trained model itself finds other things after a change of the
            size of rounding, e.g. where hundreds of proposals of one colour have equal scores.
    """

    tolerance: Mapping[str, float]
    largest: dict[str, float] = field(default_factory=dict)
    mask_side: int = 0
    counts: list[int] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    def add(self, name: str, expected: Outputs, found: Outputs, cut: float) -> None:
        """Compares the outputs of an image.

        Args:
            name: of the image.
            expected: the trained model's.
            found: the exported model's.
            cut: the score above which both must have a detection.
        """
        self.counts.append(len(expected["scores"]))
        if "mask_probs" in expected:
            self.mask_side = expected["mask_probs"].shape[-1]
        pairs = matched(expected, found)
        # Among detections with the score of the cut, e.g. of one colour, either model may choose
        # others.
        a, b = expected["boxes"][pairs[:, 0]], found["boxes"][pairs[:, 1]]
        is_apart = np.abs(a - b).max(axis=1, initial=0) > self.tolerance["boxes"]
        is_sure = expected["scores"][pairs[:, 0]] > cut + self.tolerance["scores"]
        pairs = pairs[is_sure | ~is_apart]
        for kind, outputs, rows in (
            ("the exported model lacks", expected, pairs[:, 0]),
            ("only the exported model has", found, pairs[:, 1]),
        ):
            alone = np.delete(outputs["scores"], rows)
            sure = alone[alone > cut + self.tolerance["scores"]]
            if len(sure):
                self.unlike.append(
                    f"{name}: {kind} {len(sure)} detections, with scores up to {sure.max():.4f}"
                )
        for output in expected:
            if output == "classes":
                continue
            a, b = expected[output][pairs[:, 0]], found[output][pairs[:, 1]]
            distance = float(np.abs(a.astype(np.float64) - b).max(initial=0))
            self.largest[output] = max(self.largest.get(output, 0.0), distance)
            if not distance <= self.tolerance[output]:
                self.unlike.append(
                    f"{name}: {output} differ by {distance:.3g}, and {self.tolerance[output]:g} "
                    "is rounding"
                )

    def include(self, other: Parity) -> None:
        """Adds another comparison with the same tolerance."""
        self.mask_side = other.mask_side or self.mask_side
        self.counts += other.counts
        self.unlike += other.unlike
        for output, distance in other.largest.items():
            self.largest[output] = max(self.largest.get(output, 0.0), distance)

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value:.2g}" for name, value in self.largest.items())
        left_out = ""
        if self.undecided:
            left_out = f"; left out, since rounding decides there: {', '.join(self.undecided)}"
        return (
            f"compared with the trained model on {len(self.counts)} images with "
            f"{min(self.counts)} to {max(self.counts)} detections; largest differences: {told}"
            + left_out
        )


def matched(expected: Outputs, found: Outputs) -> npt.NDArray[np.int64]:
    """Returns (P, 2) rows of detections of one class at the same place, best first.

    Rounding may swap detections whose scores are almost equal, so order alone means nothing.
    """
    pairs, free = [], np.ones(len(found["scores"]), bool)
    for row, (box, number) in enumerate(zip(expected["boxes"], expected["classes"], strict=True)):
        distance = np.abs(found["boxes"] - box).max(axis=1)
        distance[~free | (found["classes"] != number)] = np.inf
        near = max(1.0, 0.1 * float((box[2:] - box[:2]).max()))
        if len(distance) and distance.min() <= near:
            best = int(distance.argmin())
            free[best] = False
            pairs.append((row, best))
    return np.array(pairs, np.int64).reshape(-1, 2)


def compare(
    model: GeneralizedRCNN,
    run: Run,
    samples: Sequence[Sample],
    tolerance: Mapping[str, float],
    size: tuple[int, int] | None,
) -> Parity:
    """Runs both models on images.

    Args:
        model: the trained one, in evaluation mode on the CPU.
        run: the exported one.
        samples: images.
        tolerance: by output.
        size: height and width that the exported model pads images to, or None.

    Returns:
        What was compared; also unlike if rounding decides on every image.
    """
    parity = Parity(tolerance)
    predictor = last_predictor(model)
    limit = predictor.test_topk_per_image
    for sample in progress(samples, "comparing with the trained model", "image"):
        expected = eager_outputs(model, sample.image, size)
        scores = expected["scores"]
        is_full = 0 <= limit <= len(scores) > 0
        cut = float(scores.min()) if is_full else predictor.test_score_thresh
        of_image, of_rounding = Parity(tolerance), Parity(tolerance)
        of_image.add(sample.name, expected, run(sample.image), cut)
        if of_image.unlike:
            rounded = eager_outputs(model, sample.image + _rounding(sample.image), size)
            of_rounding.add(sample.name, expected, rounded, cut)
        if of_rounding.unlike:
            parity.undecided.append(sample.name)
        else:
            parity.include(of_image)
    if parity.undecided and not parity.counts:
        parity.counts = [0]
        parity.unlike.append("rounding decides what the trained model finds in each of the images")
    return parity


def _rounding(image: Tensor) -> Tensor:
    """Returns changed copies of an image, the same in each call, that the model should not
    distinguish.
    """
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(image.shape, generator=generator) - 1) * ROUNDING


@torch.no_grad()
def eager_outputs(
    model: GeneralizedRCNN, image: Tensor, size: tuple[int, int] | None = None
) -> Outputs:
    """Returns the trained model's detections in an image, under the names of the exported outputs.

    Args:
        model: in evaluation mode.
        image: (C, H, W) float32.
        size: height and width to pad to; None pads as far as the backbone needs.
    """
    batch = [{"image": image}]
    if size is not None:  # detectron2 pads an image to the largest of its batch
        batch.append({"image": image.new_zeros(image.shape[0], *size)})
    found = model.inference(batch, do_postprocess=False)[0]
    outputs = {
        "boxes": found.pred_boxes.tensor.numpy(),
        "scores": found.scores.numpy(),
        "classes": found.pred_classes.numpy(),
    }
    if found.has("pred_masks"):
        outputs["mask_probs"] = found.pred_masks[:, 0].numpy()
    if found.has("mask_scores"):
        outputs["mask_scores"] = found.mask_scores.numpy()
    return outputs
