"""A mask loss for studies: its sigmoids learn to tell classes apart without competing."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mask_head_plugin.modeling.class_selection import of_class
from mask_head_plugin.modeling.mask_loss import (
    MASK_LOSS_REGISTRY,
    couples_classes,
    mean_over_rois,
)


def own_class(class_logits: Tensor, classes: Tensor) -> Tensor:
    """Returns ``p_k / (p_k + p_background)``: the sigmoid of the class's logit."""
    return of_class(class_logits, classes).sigmoid()


@MASK_LOSS_REGISTRY.register()
@couples_classes(own_class)
def every_class_cross_entropy(
    class_logits: Tensor, classes: Tensor, gt_masks: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of all classes, with an empty target for all but the object's class.

    As with ``softmax_cross_entropy``, the masks of the other classes are trained to be empty. As
    with ``binary_cross_entropy``, a higher logit of one class does not lower the probability of
    another.

    Args:
        class_logits: (R, K, M, M).
        classes: (R,) int64 in [0, K).
        gt_masks: (R, M, M) in [0, 1].
        weights: (R,) weights of the RoIs; None gives all RoIs the same weight.
    """
    own = F.one_hot(classes, class_logits.shape[1])[:, :, None, None]
    pixels = F.binary_cross_entropy_with_logits(
        class_logits, own * gt_masks[:, None], reduction="none"
    )
    return mean_over_rois(pixels.sum(1).flatten(1).mean(1), weights)
