"""Mask losses, registered by name in MASK_LOSS_REGISTRY.

A loss is a pure function ``(mask_logits, gt_masks, weights=None, **parameters) -> scalar``. For
each RoI, it receives the mask logits of the RoI's class and the target mask. The mask head selects
the class and logs the result. Each loss computes one value per RoI, by the formula in its
docstring, and returns the mean of these values, weighted by ``weights``. Without RoIs, it returns a
0 that is still part of the graph, so that backward works.

Losses marked with ``couples_classes`` receive the logits of all classes instead:
``(class_logits, classes, gt_masks, weights=None, **parameters) -> scalar``.

Shape alphabet: R RoIs, K classes, M mask side. z are logits, p = sigmoid(z), g targets in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from detectron2.utils.registry import Registry
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from .class_selection import of_class

MaskLoss = Callable[..., Tensor]
LossT = TypeVar("LossT", bound=MaskLoss)

MASK_LOSS_REGISTRY = Registry("MASK_LOSS")
MASK_LOSS_REGISTRY.__doc__ = """
Mask losses, named as in MODEL.ROI_MASK_HEAD.LOSSES. Parameters are keyword-only, have numeric
defaults, and are set with MODEL.ROI_MASK_HEAD.LOSS_PARAMS.<NAME>.<PARAMETER>.
"""


def couples_classes(activation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[LossT], LossT]:
    """Marks a loss that needs the logits of all classes.

    Args:
        activation: replaces the sigmoid. It maps (R, K, M, M) class logits and (R,) classes to the
            (R, M, M) probabilities of each RoI's mask.
    """

    def mark(loss: LossT) -> LossT:
        loss.activation = activation  # type: ignore[attr-defined]  # functions accept attributes
        return loss

    return mark


def mean_over_rois(values: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the mean over the RoIs, or a 0 that is still part of the graph if there are no RoIs.

    Args:
        values: (R,), one per RoI.
        weights: (R,), non-negative; None weights all RoIs equally.
    """
    if weights is None:
        return values.sum() / max(len(values), 1)
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(values.dtype).tiny)


def _overlaps(mask_logits: Tensor, gt_masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the (R,) numbers of true positive, false positive and false negative pixels.

    The numbers are soft: a pixel counts as positive with its probability.
    """
    probs, gt = mask_logits.sigmoid().flatten(1), gt_masks.flatten(1)
    true_positive = (probs * gt).sum(1)
    return true_positive, probs.sum(1) - true_positive, gt.sum(1) - true_positive


@MASK_LOSS_REGISTRY.register()
def binary_cross_entropy(
    mask_logits: Tensor, gt_masks: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Mean over the pixels of ``-[g log p + (1 - g) log(1 - p)]``; at least 0.

    Mask R-CNN section 3: "the average binary cross-entropy loss" on the k-th mask.

    Args:
        mask_logits: (R, M, M), any real numbers.
        gt_masks: (R, M, M) of the same dtype, in [0, 1].
        weights: (R,) of the same dtype, non-negative; None weights all RoIs equally.

    Returns:
        Scalar.
    """
    pixels = F.binary_cross_entropy_with_logits(mask_logits, gt_masks, reduction="none")
    return mean_over_rois(pixels.flatten(1).mean(1), weights)


def softmax_probs(class_logits: Tensor, classes: Tensor) -> Tensor:
    """Returns the softmax probability of each RoI's class; the background has logit 0.

    Args:
        class_logits: (R, K, M, M).
        classes: (R,) int64 in [0, K).

    Returns:
        (R, M, M): ``exp(z_k) / (1 + sum_j exp(z_j))``.
    """
    own = of_class(class_logits, classes)
    return (own - F.softplus(class_logits.logsumexp(1))).exp()


@MASK_LOSS_REGISTRY.register()
@couples_classes(softmax_probs)
def softmax_cross_entropy(
    class_logits: Tensor, classes: Tensor, gt_masks: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Mean over the pixels of the cross-entropy of a softmax over K classes and the background.

    ``log(1 + sum_j exp(z_j)) - g z_k``; at least 0. This is the loss of Mask R-CNN Table 2b, where
    the classes' masks compete. The paper does not define the background. Here, it has a constant
    logit of 0. The layer therefore needs the same parameters as with a sigmoid per class, and for
    K = 1 the loss equals binary cross-entropy.

    Args:
        class_logits: (R, K, M, M).
        classes: (R,) int64 in [0, K).
        gt_masks: (R, M, M) in [0, 1].
        weights: (R,); None weights all RoIs equally.
    """
    own = of_class(class_logits, classes)
    pixels = F.softplus(class_logits.logsumexp(1)) - gt_masks * own
    return mean_over_rois(pixels.flatten(1).mean(1), weights)


@MASK_LOSS_REGISTRY.register()
def dice(
    mask_logits: Tensor, gt_masks: Tensor, weights: Tensor | None = None, *, eps: float = 1.0
) -> Tensor:
    """``1 - (2 sum(p g) + eps) / (sum(p^2) + sum(g^2) + eps)``, in [0, 1] (V-Net, 1606.04797).

    On its own, it can get stuck at constant masks when training starts from scratch, so it is
    usually combined with binary_cross_entropy.

    Args: see binary_cross_entropy.
        eps: smoothing, in pixels. If g is all 0, it keeps the loss defined, and makes the loss
            fall as p falls.
    """
    _check_parameter("eps", eps, eps > 0, "above 0")
    probs, gt = mask_logits.sigmoid().flatten(1), gt_masks.flatten(1)
    intersection = 2 * (probs * gt).sum(1)
    total = probs.square().sum(1) + gt.square().sum(1)
    return mean_over_rois(1 - (intersection + eps) / (total + eps), weights)


@MASK_LOSS_REGISTRY.register()
def focal(
    mask_logits: Tensor,
    gt_masks: Tensor,
    weights: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
) -> Tensor:
    """Mean over the pixels of ``-a (1 - q)^gamma log q``; at least 0 (1708.02002 equation 5).

    q is p where g = 1, and 1 - p where g = 0. Likewise, a is alpha where g = 1, and 1 - alpha where
    g = 0. With the default parameters, this loss is far lower than binary_cross_entropy. With
    gamma = 0 and alpha = -1, the two are equal.

    Args: see binary_cross_entropy.
        gamma: 0, or at least 1 (between 0 and 1, the gradient has a pole at q = 1).
        alpha: in [0, 1], or -1 to omit the factor.
    """
    _check_parameter("gamma", gamma, gamma == 0 or gamma >= 1, "0, or at least 1")
    _check_parameter("alpha", alpha, alpha == -1 or 0 <= alpha <= 1, "in [0, 1], or -1")
    pixels = sigmoid_focal_loss(mask_logits, gt_masks, alpha, gamma)
    return mean_over_rois(pixels.flatten(1).mean(1), weights)


@MASK_LOSS_REGISTRY.register()
def tversky(
    mask_logits: Tensor,
    gt_masks: Tensor,
    weights: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    eps: float = 1.0,
) -> Tensor:
    """``1 - (TP + eps) / (TP + alpha FP + beta FN + eps)``, in [0, 1) (1706.05721).

    TP = sum(p g), FP = sum(p (1 - g)), FN = sum((1 - p) g). With alpha = beta = 0.5, this is
    dice without the squares of p and g, and with an eps twice as large.

    Args: see binary_cross_entropy.
        alpha: weight of a false positive; 0 or above.
        beta: weight of a false negative; 0 or above.
        eps: smoothing, in pixels; see dice.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        _check_parameter(name, value, value >= 0, "0 or above")
    _check_parameter("alpha + beta", alpha + beta, alpha + beta > 0, "above 0")
    _check_parameter("eps", eps, eps > 0, "above 0")
    true_positive, false_positive, false_negative = _overlaps(mask_logits, gt_masks)
    errors = alpha * false_positive + beta * false_negative
    return mean_over_rois(errors / (true_positive + errors + eps), weights)


@MASK_LOSS_REGISTRY.register()
def soft_iou(
    mask_logits: Tensor, gt_masks: Tensor, weights: Tensor | None = None, *, eps: float = 1.0
) -> Tensor:
    """``1 - (sum(p g) + eps) / (sum(p + g - p g) + eps)``, in [0, 1).

    Args: see binary_cross_entropy.
        eps: smoothing, in pixels; see dice.
    """
    _check_parameter("eps", eps, eps > 0, "above 0")
    true_positive, false_positive, false_negative = _overlaps(mask_logits, gt_masks)
    errors = false_positive + false_negative
    return mean_over_rois(errors / (true_positive + errors + eps), weights)


@MASK_LOSS_REGISTRY.register()
def lovasz_hinge(mask_logits: Tensor, gt_masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """The Lovász extension of 1 - IoU at the hinge errors; at least 0 (1705.08790 equation 9).

    The errors ``m = max(0, 1 - z (2g - 1))`` of the pixels are sorted in descending order. The
    weight of each error is the drop in IoU that its pixel causes if this pixel and all pixels
    before it are wrong. The loss has no upper bound.

    Training is more stable if you add this loss to binary_cross_entropy, or if you train with
    binary_cross_entropy first and then fine-tune with this loss.

    Args: see binary_cross_entropy, but gt_masks must be in {0, 1}.
    """
    gt = gt_masks.flatten(1)
    errors, order = (1 - mask_logits.flatten(1) * (2 * gt - 1)).sort(dim=1, descending=True)
    gt = gt.gather(1, order)
    total = gt.sum(1, keepdim=True)
    union = total + (1 - gt).cumsum(1)
    # clamp has no effect on masks in {0, 1}, for which each union includes at least one pixel.
    lost_iou = 1 - (total - gt.cumsum(1)) / union.clamp(min=1)
    steps = torch.diff(lost_iou, dim=1, prepend=torch.zeros_like(total))
    return mean_over_rois((errors.relu() * steps).sum(1), weights)


def signed_distance(gt_masks: Tensor) -> Tensor:
    """Returns the distance from each pixel centre to the mask's boundary, negative inside.

    This is the exact Euclidean distance to the centre of the nearest pixel on the other side of the
    boundary, minus half a pixel, which is the distance from that centre to the edge of its pixel.
    It is computed on the masks' device, first along columns and then along rows.

    Args:
        gt_masks: (R, M, M); pixels with values above 0.5 are inside.

    Returns:
        (R, M, M) in pixels; 0 for masks whose pixels are all inside or all outside.
    """
    inside = gt_masks > 0.5
    steps = torch.arange(inside.shape[-1], device=inside.device, dtype=gt_masks.dtype)
    squares = (steps[:, None] - steps).square()
    far = 4.0 * inside.shape[-1] ** 2  # larger than any squared distance in the mask
    distances = []
    for other in (inside, ~inside):
        cost = torch.where(other, 0.0, far)
        # First the squared distance to the nearest pixel of the same column, then of the mask.
        cost = (cost[:, None] + squares[..., None]).amin(2)
        distances.append((cost[:, :, None] + squares).amin(3).clamp(max=far).sqrt() - 0.5)
    distance = torch.where(inside, -distances[1], distances[0])
    one_kind = inside.flatten(1).all(1) | ~inside.flatten(1).any(1)
    return torch.where(one_kind[:, None, None], 0.0, distance)


@MASK_LOSS_REGISTRY.register()
def boundary_distance(
    mask_logits: Tensor, gt_masks: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Mean over the pixels of ``p phi``, where phi is the signed distance to the mask's boundary.

    This is the boundary loss of 1812.07032 (equation 5). phi is in pixels and negative inside the
    mask, so the loss can be negative. On its own, the loss leads to empty masks. Add it to a
    region loss such as dice, with a small weight and a ramp (the third value of an entry in
    LOSSES). RoIs whose target has no boundary count as 0.

    Args: see binary_cross_entropy.
    """
    distances = mask_logits.sigmoid() * signed_distance(gt_masks)
    return mean_over_rois(distances.flatten(1).mean(1), weights)


@MASK_LOSS_REGISTRY.register()
def edge_agreement(mask_logits: Tensor, gt_masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of ``|S * p - S * g|^2`` over the pixels and both Sobel filters S; at least 0.

    This is the edge agreement loss of 1809.07069 with p = 2 (equation 3). The pixels at the border
    are replicated, so that a mask that is cut off by its RoI has no edge at the cut.

    Args: see binary_cross_entropy.
    """
    difference = F.pad((mask_logits.sigmoid() - gt_masks)[:, None], (1, 1, 1, 1), mode="replicate")
    smooth, slope = difference.new_tensor([1, 2, 1]), difference.new_tensor([-1, 0, 1])
    sobel = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None]
    edges = F.conv2d(difference, sobel)
    return mean_over_rois(edges.square().flatten(1).mean(1), weights)


def _check_parameter(name: str, value: object, valid: bool, range_: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {value}; it must be {range_}")
