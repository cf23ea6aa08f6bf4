"""Computes one class's outputs for each RoI, and skips the other classes where that is faster.

Shape alphabet: R RoIs, K classes, C channels, M mask side, D hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .graph_capture import is_captured


def select_class_logits(features: Tensor, predictor: nn.Conv2d, classes: Tensor) -> Tensor:
    """Applies, to each RoI, only its class's row of a 1x1 convolution.

    Args:
        features: (R, C, M, M).
        predictor: 1x1 convolution with K outputs.
        classes: (R,) int64 in [0, K).

    Returns:
        (R, M, M) logits, equal to ``predictor(features)[arange(R), classes]``.
    """
    num_rois = features.shape[0]
    # Numbers, also in a trace: an ONNX runtime would have to infer them, which fails without RoIs.
    channels, height, width = (int(size) for size in features.shape[1:])
    rows = predictor.weight.flatten(1)[classes]
    pixels = features.reshape(num_rois, channels, height * width)
    logits = torch.bmm(rows[:, None], pixels).reshape(num_rois, height, width)
    if predictor.bias is not None:
        logits = logits + predictor.bias[classes][:, None, None]
    return logits


def select_class_masks(hidden: Tensor, predictor: nn.Linear, classes: Tensor, side: int) -> Tensor:
    """Applies, to each RoI, only its class's rows of a linear layer with a whole mask per class.

    RoIs of one class share a matrix product: gathering (M M, D) weights per RoI would cost more
    than computing all classes. All classes are computed on CUDA, since grouping would wait for the
    device, and in a trace, which would hold the groups of its example. An estimate, not measured:
    128 RoIs, 80 classes of 28 x 28 and D = 1024 are 16 GFLOP, or 0.3 ms forward on an H100 in
    float32 (60 TFLOP/s), in a step of tens of ms; a product grouped on the device would save most
    of it.

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
        # Sizes as numbers, see select_class_logits.
        logits = logits.reshape(logits.shape[0], predictor.out_features // side**2, side, side)
        return of_class(logits, classes)
    order = classes.argsort(stable=True)
    present, counts = torch.unique_consecutive(classes[order], return_counts=True)
    # unbind, so that backward fills one gradient of the whole layer and not one per class.
    weights = predictor.weight.unflatten(0, (-1, side * side)).unbind()
    biases = predictor.bias.unflatten(0, (-1, side * side)).unbind()
    groups = hidden[order].split(counts.tolist())
    logits = [
        F.linear(rows, weights[k], biases[k])
        for k, rows in zip(present.tolist(), groups, strict=True)
    ]
    if not logits:  # a zero gradient for each parameter, which DistributedDataParallel needs
        return predictor(hidden)[:, : side * side].unflatten(1, (side, side))
    return torch.cat(logits)[order.argsort()].unflatten(1, (side, side))


def of_class(class_logits: Tensor, classes: Tensor) -> Tensor:
    """Returns the (R, M, M) masks of each RoI's class from (R, K, M, M).

    Uses gather: in a trace, indices of the RoIs would be those of its example, including the
    device.
    """
    index = classes[:, None, None, None].expand(-1, 1, *class_logits.shape[2:])
    return class_logits.gather(1, index)[:, 0]
