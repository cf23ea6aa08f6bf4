"""Measures how much the detections of two models differ in one image.

Shape alphabet: N detections of one model, M side of its masks, H and W height and width of the
image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.layers.mask_ops import _do_paste_mask
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from ..evaluation.matching import SAME_OBJECT_IOU

MASK_THRESHOLD = 0.5
SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE = 1e-3  # pixels
THRESHOLD_TOLERANCE = 1e-4  # pixels whose mask value is this close to MASK_THRESHOLD may differ

Pair = tuple[int, int]
"""Indices of two matched detections: in the stock model's list and in the plugin's list."""


@dataclass(frozen=True)
class Found:
    """The detections in one image, by descending score. All tensors are on the CPU.

    Attributes:
        boxes: (N, 4) XYXY in pixels of the image.
        scores: (N,) scores.
        classes: (N,) classes.
        mask_probs: (N, M, M) mask probabilities before pasting.
        masks: N masks of (H, W) bool, as RLEMasks or a tensor.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    mask_probs: Tensor
    masks: Any

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Cut:
    """Limits on detections: MODEL.ROI_HEADS.SCORE_THRESH_TEST and TEST.DETECTIONS_PER_IMAGE."""

    score: float
    count: int


@dataclass(frozen=True)
class ImageDifferences:
    """The differences between both models in one image.

    Attributes:
        image_id: id in the data set.
        num_detections: number of detections; if the models differ, the smaller number.
        num_confident: number of detections with a score above ``min_score``; if the models differ,
            the smaller number.
        same_set: whether both models found the same objects in the same order. Detections whose
            scores differ only by rounding may swap places, and a detection whose score is within
            rounding of the cut may be missing.
        num_unmatched: number of detections of either model without a counterpart in the other.
        box: largest difference of a box coordinate between matched detections, in pixels.
        score: largest difference of the scores of matched detections.
        mask_prob: largest difference of the mask probabilities of matched detections.
        mask_pixels: number of pixels in which the masks of matched detections differ.
        far_mask_pixels: number of differing pixels whose value in the stock model's mask is further
            than THRESHOLD_TOLERANCE from the threshold.
    """

    image_id: Any
    num_detections: int
    num_confident: int
    same_set: bool
    num_unmatched: int
    box: float
    score: float
    mask_prob: float
    mask_pixels: int
    far_mask_pixels: int

    @property
    def differs(self) -> bool:
        """Whether there is any difference, even within the tolerances."""
        return self.num_unmatched > 0 or self.mask_pixels > 0 or not self.is_equal

    @property
    def is_equal(self) -> bool:
        # Comparisons with nan are False, so nan does not count as equal.
        small = self.box <= BOX_TOLERANCE and self.score <= SCORE_TOLERANCE
        return self.same_set and small and self.far_mask_pixels == 0


def compare_images(
    image_id: Any, stock: Found, plugin: Found, cut: Cut, min_score: float
) -> ImageDifferences:
    """Compares the detections of one image.

    Args:
        image_id: id in the data set.
        stock: detections of detectron2's model.
        plugin: detections of the plugin's model.
        cut: limits that both models apply.
        min_score: detections with a higher score count as confident.
    """
    pairs = match(stock, plugin)
    left = [x for x in range(len(stock)) if x not in {i for i, _ in pairs}]
    right = [x for x in range(len(plugin)) if x not in {j for _, j in pairs}]
    ties = _all_at_cut(stock, left, plugin, cut) and _all_at_cut(plugin, right, stock, cut)
    i, j = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    pixels, far = _differing_pixels(stock, plugin, pairs)
    return ImageDifferences(
        image_id,
        num_detections=min(len(stock), len(plugin)),
        num_confident=min(int((x.scores > min_score).sum()) for x in (stock, plugin)),
        same_set=ties and _in_order(stock, pairs),
        num_unmatched=len(left) + len(right),
        box=_largest(stock.boxes[i], plugin.boxes[j]),
        score=_largest(stock.scores[i], plugin.scores[j]),
        mask_prob=_largest(stock.mask_probs[i], plugin.mask_probs[j]),
        mask_pixels=pixels,
        far_mask_pixels=far,
    )


def match(stock: Found, plugin: Found) -> list[Pair]:
    """Pairs each stock detection, best first, with the nearest free plugin detection.

    Only detections of the same class whose boxes overlap enough are paired.
    """
    iou = pairwise_iou(Boxes(stock.boxes), Boxes(plugin.boxes))
    allowed = (iou >= SAME_OBJECT_IOU) & (stock.classes[:, None] == plugin.classes)
    distance = (stock.boxes[:, None] - plugin.boxes).abs().amax(-1)
    distance[~allowed] = torch.inf
    pairs = []
    for i in range(len(stock) if len(plugin) else 0):
        j = int(distance[i].argmin())
        if distance[i, j] < torch.inf:
            pairs.append((i, j))
            distance[:, j] = torch.inf
    return pairs


def _in_order(stock: Found, pairs: Sequence[Pair]) -> bool:
    """Returns whether the pairs are in the same order in both lists, except for ties."""
    scores = np.array([stock.scores[i].item() for i, _ in pairs])
    places = np.array([j for _, j in pairs])
    swapped = np.triu(places[:, None] > places)
    return bool((scores[:, None] - scores <= SCORE_TOLERANCE)[swapped].all())


def _all_at_cut(found: Found, unmatched: Sequence[int], other: Found, cut: Cut) -> bool:
    """Returns whether rounding at the cut explains why the other model lacks these detections."""
    end = cut.score
    if len(other) >= cut.count:
        end = max(end, other.scores.min().item())
    return all(found.scores[i].item() <= end + SCORE_TOLERANCE for i in unmatched)


def _largest(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def _differing_pixels(stock: Found, plugin: Found, pairs: Sequence[Pair]) -> tuple[int, int]:
    """Returns how many mask pixels differ, and how many of those are far from the threshold."""
    num_pixels = num_far = 0
    for i, j in pairs:
        differing = torch.as_tensor(stock.masks[i]) != torch.as_tensor(plugin.masks[j])
        if differing.any():
            height, width = differing.shape
            values = _do_paste_mask(
                stock.mask_probs[i, None, None],
                stock.boxes[i, None],
                height,
                width,
                skip_empty=False,
            )[0][0]
            distance = (values[differing] - MASK_THRESHOLD).abs()
            num_pixels += int(differing.sum())
            num_far += int((~(distance <= THRESHOLD_TOLERANCE)).sum())
    return num_pixels, num_far
