"""detectron2's box predictor, computing in training the one box per RoI that is used.

Class-wise box regression has 4 K outputs, but its loss uses only the 4 of the ground-truth class.
The mask branch is in the same situation (see mask_head), with the same solution. With LVIS's 1203
classes, the unused outputs are the largest product of the box head.

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
    """What ``forward`` returns in training, when it cannot know yet which deltas are needed."""

    scores: Tensor
    features: Tensor


class ClassSelectiveOutputLayers(FastRCNNOutputLayers):
    """FastRCNNOutputLayers that only computes the box deltas of the ground-truth class.

    Same parameters, losses and gradients. In training ``forward`` returns the features instead
    of the deltas, since classes are not known before ``losses``; inference is detectron2's.
    """

    def forward(self, x: Tensor) -> Predictions:
        """Returns (R, K + 1) scores, and (R, 4 K) deltas or, in training, the (R, D) features."""
        if not self.training:
            return super().forward(x)
        x = x.flatten(1)
        return ScoresAndFeatures(self.cls_score(x), x)

    def __prepare_scriptable__(self) -> FastRCNNOutputLayers:
        """Returns what torch.jit.script compiles instead of this."""
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

        They have the shape of class-agnostic deltas, which detectron2's methods accept. Background
        RoIs get the deltas of some class, which no loss reads. Deltas of all classes, computed in
        evaluation mode, stay as they are.
        """
        if not isinstance(predictions, ScoresAndFeatures):
            return predictions
        scores, features = predictions
        if not proposals:
            return scores, self.bbox_pred(features)
        classes = torch.cat([x.gt_classes for x in proposals]).clamp(0, self.num_classes - 1)
        weight = self.bbox_pred.weight.unflatten(0, (self.num_classes, -1))
        bias = self.bbox_pred.bias.unflatten(0, (self.num_classes, -1))
        # embedding adds up whole rows in backward; indexing would scatter gradients one by one
        rows = F.embedding(classes, weight.flatten(1)).unflatten(1, weight.shape[1:])
        return scores, torch.bmm(rows, features[:, :, None])[:, :, 0] + bias[classes]


def make_class_selective(box_predictor: Any) -> Any:
    """Makes detectron2's own box predictor class-selective, in place, if it predicts per class.

    In place, so that the parameters stay as they were initialised from the generator's state.
    Other predictors, a user's or a cascade's, are returned as they are.
    """
    if type(box_predictor) is not FastRCNNOutputLayers:
        return box_predictor
    if box_predictor.bbox_pred.out_features > len(box_predictor.box2box_transform.weights):
        box_predictor.__class__ = ClassSelectiveOutputLayers
    return box_predictor
