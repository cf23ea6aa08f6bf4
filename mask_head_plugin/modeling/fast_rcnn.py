"""A box predictor that computes, in training, only the box deltas of each RoI's class.

Class-wise box regression has 4 K outputs, but its loss uses only the 4 outputs of the ground-truth
class. The mask head has the same problem and the same solution; see mask_head. With LVIS's 1203
classes, computing the unused outputs would be the largest matrix product of the box head.

Shape alphabet: R RoIs, K classes, D features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from .graph_capture import stand_in

Predictions = tuple[Tensor, Tensor]


class ScoresAndFeatures(NamedTuple):
    """The output of ``forward`` in training, when the classes to compute deltas for are unknown."""

    scores: Tensor
    features: Tensor


class ClassSelectiveOutputLayers(FastRCNNOutputLayers):
    """A FastRCNNOutputLayers that computes only the box deltas of the ground-truth class.

    Parameters, losses, gradients and inference are the same as in detectron2. In training,
    ``forward`` returns the features instead of the deltas, because the classes are not known until
    ``losses`` is called.
    """

    def forward(self, x: Tensor) -> Predictions:
        """Returns (R, K + 1) scores, and (R, 4 K) deltas or, in training, the (R, D) features."""
        if not self.training:
            return super().forward(x)
        x = x.flatten(1)
        return ScoresAndFeatures(self.cls_score(x), x)

    def __prepare_scriptable__(self) -> FastRCNNOutputLayers:
        """Returns the module that torch.jit.script compiles instead."""
        return stand_in(self, FastRCNNOutputLayers)

    def losses(self, predictions: Predictions, proposals: list[Instances]) -> dict[str, Tensor]:
        return super().losses(self._select(predictions, proposals), proposals)

    def predict_boxes_for_gt_classes(
        self, predictions: Predictions, proposals: list[Instances]
    ) -> list[Tensor]:
        return super().predict_boxes_for_gt_classes(self._select(predictions, proposals), proposals)

    def predict_boxes(self, predictions: Predictions, proposals: list[Instances]) -> list[Tensor]:
        if isinstance(predictions, ScoresAndFeatures):
            predictions = predictions.scores, self.bbox_pred(predictions.features)
        return super().predict_boxes(predictions, proposals)

    def _select(self, predictions: Predictions, proposals: list[Instances]) -> Predictions:
        """Returns the scores and the (R, 4) deltas of each RoI's ground-truth class.

        The deltas have the shape of class-agnostic deltas, which detectron2's methods accept.
        Background RoIs get the deltas of an arbitrary class, which no loss reads. Predictions made
        in evaluation mode, which have the deltas of all classes, are returned unchanged.
        """
        if not isinstance(predictions, ScoresAndFeatures):
            return predictions
        scores, features = predictions
        if not proposals:
            return scores, self.bbox_pred(features)
        classes = torch.cat([x.gt_classes for x in proposals]).clamp(0, self.num_classes - 1)
        weight = self.bbox_pred.weight.unflatten(0, (self.num_classes, -1))
        bias = self.bbox_pred.bias.unflatten(0, (self.num_classes, -1))
        # embedding, because its backward adds up entire rows. The backward of indexing would
        # scatter single values.
        rows = F.embedding(classes, weight.flatten(1)).unflatten(1, weight.shape[1:])
        return scores, torch.bmm(rows, features[:, :, None])[:, :, 0] + bias[classes]


def make_class_selective(box_predictor: Any) -> Any:
    """Makes detectron2's box predictor class-selective if it predicts a box per class.

    Changes the predictor in place, so that its initial parameters and the state of the random
    number generator do not change. Returns other predictors, such as a user's or those of a
    cascade, unchanged.
    """
    if type(box_predictor) is not FastRCNNOutputLayers:
        return box_predictor
    if box_predictor.bbox_pred.out_features > len(box_predictor.box2box_transform.weights):
        box_predictor.__class__ = ClassSelectiveOutputLayers
    return box_predictor
