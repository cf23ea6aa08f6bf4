"""Measures the differences between an exported model and the trained one, for each detection.

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

from ..messages import counted
from ..progress import progress
from .exportable import last_predictor
from .samples import Sample

Outputs = dict[str, npt.NDArray[Any]]
Run = Callable[[Tensor], Outputs]

TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "fp32": {"boxes": 1e-2, "scores": 1e-4, "mask_probs": 1e-3, "mask_scores": 1e-4},
    "fp16": {"boxes": 2.0, "scores": 2e-2, "mask_probs": 1e-1, "mask_scores": 2e-2},
}
"""Largest difference of each output that counts as rounding. Boxes are in pixels of the input.

The tolerance for masks is valid for the logits of trained models, few of which exceed 10. Rounding
errors grow with the logits: a DC5 model with random weights and logits of about 25 differs by up to
2e-3 from its export, and both differ by up to 4e-3 from float64.
"""

ROUNDING = 1e-3
"""Change of pixel values (0 to 255) whose effect on a float32 model is as small as rounding."""


@dataclass
class Parity:
    """Result of comparing an exported model with the trained one.

    Attributes:
        tolerance: tolerance by output.
        largest: the largest difference of each output so far.
        mask_side: M, for models with masks.
        counts: number of detections in each image.
        unlike: the differences beyond the tolerance, one line each.
        undecided: images in which the trained model finds different objects after a change of the
            pixels that is as small as rounding. This happens, for example, if hundreds of proposals
            on a uniform area have equal scores.
    """

    tolerance: Mapping[str, float]
    largest: dict[str, float] = field(default_factory=dict)
    mask_side: int = 0
    counts: list[int] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    def add(self, name: str, expected: Outputs, found: Outputs, cut: float) -> None:
        """Compares the outputs for an image.

        Args:
            name: name of the image.
            expected: outputs of the trained model.
            found: outputs of the exported model.
            cut: the score above which both models must have a detection.
        """
        self.counts.append(len(expected["scores"]))
        if "mask_probs" in expected:
            self.mask_side = expected["mask_probs"].shape[-1]
        pairs = matched(expected, found)
        # If several detections have the same score as the cut, for example on a uniform area, the
        # models may choose different ones.
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
                count = counted(len(sure), "detection")
                self.unlike.append(f"{name}: {kind} {count}, with scores up to {sure.max():.4f}")
        for output in expected:
            if output == "classes":
                continue
            a, b = expected[output][pairs[:, 0]], found[output][pairs[:, 1]]
            distance = float(np.abs(a.astype(np.float64) - b).max(initial=0))
            self.largest[output] = max(self.largest.get(output, 0.0), distance)
            if not distance <= self.tolerance[output]:
                self.unlike.append(
                    f"{name}: {output} differ by {distance:.3g}, more than the "
                    f"{self.tolerance[output]:g} that rounding explains"
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
            left_out = f"; not compared, because rounding decides: {', '.join(self.undecided)}"
        return (
            f"compared with the trained model on {len(self.counts)} images with "
            f"{min(self.counts)} to {max(self.counts)} detections; largest differences: {told}"
            + left_out
        )


def matched(expected: Outputs, found: Outputs) -> npt.NDArray[np.int64]:
    """Returns the (P, 2) row numbers of detections of the same class at the same place, best first.

    Rows cannot be matched by their order, because rounding can swap detections with almost equal
    scores.
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
    """Compares the two models on images.

    Args:
        model: the trained model, in evaluation mode on the CPU.
        run: runs the exported model.
        samples: images.
        tolerance: tolerance by output.
        size: height and width to which the exported model pads images; None if it does not pad.

    Returns:
        The differences. If no image can be compared, because rounding decides in all of them,
        ``unlike`` says so.
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
        parity.unlike.append("in every image, rounding decides what the trained model finds")
    return parity


def _rounding(image: Tensor) -> Tensor:
    """Returns a random change of up to ROUNDING for each pixel, which is the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(image.shape, generator=generator) - 1) * ROUNDING


@torch.no_grad()
def eager_outputs(
    model: GeneralizedRCNN, image: Tensor, size: tuple[int, int] | None = None
) -> Outputs:
    """Returns the trained model's detections in an image, under the names of the exported outputs.

    Args:
        model: the model, in evaluation mode.
        image: (C, H, W) float32.
        size: height and width to pad to; None pads only as the backbone requires.
    """
    batch = [{"image": image}]
    if size is not None:  # detectron2 pads an image to the largest one in its batch
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
