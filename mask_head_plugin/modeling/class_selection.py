"""Computes the outputs of one class per RoI, and skips the other classes where that is faster.

Shape alphabet: R RoIs, K classes, C channels, M mask side, D hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .graph_capture import is_captured


def select_class_logits(features: Tensor, predictor: nn.Conv2d, classes: Tensor) -> Tensor:
    """Applies a 1x1 convolution, but computes only the output of each RoI's class.

    Args:
        features: (R, C, M, M).
        predictor: 1x1 convolution with K outputs.
        classes: (R,) int64 in [0, K).

    Returns:
        (R, M, M) logits, equal to ``predictor(features)[arange(R), classes]``.
    """
    num_rois = features.shape[0]
    # int() makes these sizes constants in a trace. Otherwise, an ONNX runtime would have to infer
    # them, which fails if there are no RoIs.
    channels, height, width = (int(size) for size in features.shape[1:])
    rows = predictor.weight.flatten(1)[classes]
    pixels = features.reshape(num_rois, channels, height * width)
    logits = torch.bmm(rows[:, None], pixels).reshape(num_rois, height, width)
    if predictor.bias is not None:
        logits = logits + predictor.bias[classes][:, None, None]
    return logits


def select_class_masks(hidden: Tensor, predictor: nn.Linear, classes: Tensor, side: int) -> Tensor:
    """Applies a linear layer, but computes only the mask of each RoI's class where this is faster.

    RoIs of the same class share a matrix product, because gathering (M M, D) weights for each RoI
    would cost more than computing all classes. All classes are computed on CUDA, where grouping the
    RoIs would have to wait for the device, and in a trace, which would always use the groups of the
    example input. The cost on CUDA was estimated, not measured: 128 RoIs with 80 classes of 28 x 28
    and D = 1024 take 16 GFLOP. That is 0.3 ms forward on an H100 in float32 (60 TFLOP/s), in a
    training step that takes tens of ms. Grouping the product on the device would save most of this
    time.

    Args:
        hidden: (R, D).
        predictor: linear layer with K M M outputs.
        classes: (R,) int64 in [0, K).
        side: M.

    Returns:
        (R, M, M) logits, equal to ``predictor(hidden).view(R, K, M, M)[arange(R), classes]``.
    """
    if hidden.is_cuda or is_captured():
        logits = predictor(hidden)
        # These sizes are constants in a trace; see select_class_logits.
        logits = logits.reshape(logits.shape[0], predictor.out_features // side**2, side, side)
        return of_class(logits, classes)
    order = classes.argsort(stable=True)
    present, counts = torch.unique_consecutive(classes[order], return_counts=True)
    # unbind, because backward then allocates one gradient for the layer instead of one per class.
    weights = predictor.weight.unflatten(0, (-1, side * side)).unbind()
    biases = predictor.bias.unflatten(0, (-1, side * side)).unbind()
    groups = hidden[order].split(counts.tolist())
    logits = [
        F.linear(rows, weights[k], biases[k])
        for k, rows in zip(present.tolist(), groups, strict=True)
    ]
    # Without RoIs, DistributedDataParallel still needs a gradient (of 0) for every parameter.
    if not logits:
        return predictor(hidden)[:, : side * side].unflatten(1, (side, side))
    return torch.cat(logits)[order.argsort()].unflatten(1, (side, side))


def of_class(class_logits: Tensor, classes: Tensor) -> Tensor:
    """Selects the mask of each RoI's class: (R, M, M) from (R, K, M, M).

    Uses gather, because a trace would record indices of RoIs as constants, with the number and the
    device of the example input.
    """
    index = classes[:, None, None, None].expand(-1, 1, *class_logits.shape[2:])
    return class_logits.gather(1, index)[:, 0]
