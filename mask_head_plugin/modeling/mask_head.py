"""The mask branch: region features in, the one mask per RoI that is used out.

A per-class head has K output channels and uses one: the ground-truth class's in training, the
predicted class's in inference. The last layer is a 1x1 convolution, so its rows are selected before
it is applied, ``logits[r] = weight[class[r]] . features[r] + bias[class[r]]``: the same numbers and
gradients as selecting from the (R, K, M, M) tensor, without that tensor.

Shape alphabet: R RoIs, K classes, C channels, P pooled side, M mask side (2P).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from .mask_loss import check_losses, weighted_mask_losses

STATISTICS_PERIOD = 20
"""Iterations between two logs of mask accuracy: DefaultTrainer's write period."""


def select_class_logits(features: Tensor, predictor: nn.Conv2d, classes: Tensor) -> Tensor:
    """Applies, to each RoI, only its class's row of a 1x1 convolution.

    Args:
        features: (R, C, M, M).
        predictor: 1x1 convolution with K outputs.
        classes: (R,) int64 in [0, K).

    Returns:
        (R, M, M) logits, equal to ``predictor(features)[arange(R), classes]``.
    """
    rows = predictor.weight[classes].flatten(1)
    logits = torch.bmm(rows[:, None], features.flatten(2))[:, 0].unflatten(1, features.shape[2:])
    if predictor.bias is not None:
        logits = logits + predictor.bias[classes][:, None, None]
    return logits


@ROI_MASK_HEAD_REGISTRY.register()
class FCNMaskHead(MaskRCNNConvUpsampleHead):
    """Mask R-CNN figure 4: 3x3 convolutions, a 2x2 deconvolution, and one mask per class.

    Layers, initialisation and parameter names are those of detectron2's MaskRCNNConvUpsampleHead,
    so checkpoints fit both ways; it works in every ROIHeads that takes that head. Other than there,
    only the logits in use are computed, the losses come from MASK_LOSS_REGISTRY, and accuracy
    statistics are summed on the device and read once per STATISTICS_PERIOD.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: str = "",
        losses: Sequence[tuple[str, float]] = (("binary_cross_entropy", 1.0),),
        loss_weight: float = 1.0,
        vis_period: int = 0,
    ) -> None:
        """
        Args:
            input_shape: channels of the region features.
            num_classes: K, foreground classes; 1 for class-agnostic masks.
            conv_dims: output channels of the 3x3 convolutions and, last, of the deconvolution.
            conv_norm: normalisation of the convolutions, see detectron2.layers.get_norm.
            losses: (name in MASK_LOSS_REGISTRY, weight) of each term.
            loss_weight: factor of all terms.
            vis_period: iterations between images of masks and targets in TensorBoard; 0 for none.

        Raises:
            ValueError: if ``losses`` names an unknown loss.
        """
        super().__init__(
            input_shape,
            num_classes=num_classes,
            conv_dims=conv_dims,
            conv_norm=conv_norm,
            loss_weight=loss_weight,
            vis_period=vis_period,
        )
        self.losses = [(name, weight * loss_weight) for name, weight in check_losses(losses)]
        # Pixels that are wrong, of ground truth 1, and wrong among these, since the last log; how
        # many there were; and where they are logged. Not part of checkpoints.
        counts = torch.zeros(3, dtype=torch.int64)
        self.register_buffer("_pixel_counts", counts, persistent=False)
        self._num_pixels = 0
        self._storage_id = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        if "LOSSES" not in cfg.MODEL.ROI_MASK_HEAD:
            raise KeyError(
                "MODEL.ROI_MASK_HEAD.LOSSES: call add_mask_head_config(cfg) on your config"
            )
        arguments["losses"] = cfg.MODEL.ROI_MASK_HEAD.LOSSES
        return arguments

    def predictor_features(self, features: Tensor) -> Tensor:
        """Returns the (R, C, M, M) input of the predictor for (R, C, P, P) region features."""
        for layer in list(self)[:-1]:
            features = layer(features)
        return features

    def forward(
        self, features: Tensor, instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """
        Args:
            features: (R, C, P, P) region features.
            instances: per image; R in all. Training: the positives, with ``proposal_boxes``,
                ``gt_classes``, ``gt_masks``. Inference: detections with ``pred_classes``.

        Returns:
            In training the weighted loss terms; in inference the same instances with
            ``pred_masks`` (Ri, 1, M, M), probabilities of the predicted class's mask.
        """
        features = self.predictor_features(features)
        field = "gt_classes" if self.training else "pred_classes"
        classes = cat([x.get(field) for x in instances])
        if self.predictor.out_channels == 1:  # class-agnostic, or a single class
            classes = torch.zeros_like(classes)
        mask_logits = select_class_logits(features, self.predictor, classes)
        if not self.training:
            counts = [len(x) for x in instances]
            mask_probs = mask_logits.sigmoid()[:, None].split(counts)
            for instances_per_image, probs in zip(instances, mask_probs, strict=True):
                instances_per_image.pred_masks = probs
            return instances
        gt_masks = crop_gt_masks(instances, mask_logits)
        # detectron2's masks crop to bool; a user's may crop to shares in [0, 1].
        self._log(
            mask_logits.detach(), gt_masks if gt_masks.dtype == torch.bool else gt_masks > 0.5
        )
        return weighted_mask_losses(self.losses, mask_logits, gt_masks.to(mask_logits.dtype))

    @torch.no_grad()
    def _log(self, mask_logits: Tensor, gt_masks: Tensor) -> None:
        """Logs detectron2's mask statistics and, at vis_period, masks beside their targets."""
        storage = get_event_storage()
        if id(storage) != self._storage_id:  # e.g. PreciseBN runs the model in a storage of its own
            self._storage_id, self._num_pixels = id(storage), 0
            self._pixel_counts.zero_()
        wrong = (mask_logits > 0) != gt_masks
        self._pixel_counts += torch.stack([wrong.sum(), gt_masks.sum(), (wrong & gt_masks).sum()])
        self._num_pixels += wrong.numel()
        if (storage.iter + 1) % STATISTICS_PERIOD == 0:
            log_statistics(storage, self._num_pixels, *self._pixel_counts.tolist())
            self._num_pixels = 0
            self._pixel_counts.zero_()
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            pairs = torch.cat([mask_logits.sigmoid(), gt_masks.to(mask_logits.dtype)], dim=2)
            for index, pair in enumerate(pairs):
                name = f"Left: mask prediction;   Right: mask GT ({index})"
                storage.put_image(name, pair.float().expand(3, -1, -1))


def log_statistics(
    storage: EventStorage, num_pixels: int, num_wrong: int, num_positive: int, num_missed: int
) -> None:
    """Puts accuracy, false positive and false negative rate of mask pixels, detectron2's names."""
    num_negative = num_pixels - num_positive
    storage.put_scalar("mask_rcnn/accuracy", 1 - num_wrong / max(num_pixels, 1))
    storage.put_scalar("mask_rcnn/false_positive", (num_wrong - num_missed) / max(num_negative, 1))
    storage.put_scalar("mask_rcnn/false_negative", num_missed / max(num_positive, 1))


def crop_gt_masks(instances: list[Instances], mask_logits: Tensor) -> Tensor:
    """Returns the (R, M, M) targets: each RoI's part of its own ground-truth mask.

    Args:
        instances: per image, R in all, with ``proposal_boxes`` and ``gt_masks``.
        mask_logits: (R, M, M); gives M and the device.
    """
    size, device = mask_logits.shape[-1], mask_logits.device
    targets = [
        x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, size).to(device)
        for x in instances
        if len(x) > 0  # an image without objects has no gt_masks
    ]
    return cat(targets) if targets else torch.zeros_like(mask_logits, dtype=torch.bool)
