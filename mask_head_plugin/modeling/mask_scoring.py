"""Mask scoring: predicts the quality of a mask (Mask Scoring R-CNN, arXiv 1903.00241).

A detection's score measures how certain its class is, not how good its mask is. With mask scoring,
a small network predicts the IoU of the mask and the object, and masks are ranked by class score
times IoU.

Shape alphabet: R RoIs, K classes, C channels, P side of the region features, M mask side (2P).
"""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Instances
from torch import Tensor, nn
from torch.nn import functional as F


class MaskIoUHead(nn.Module):
    """Predicts the IoU of a mask and its object for each class (section 3.2 and figure 3).

    The mask is max-pooled to the size of the region features and concatenated with them. Four 3x3
    convolutions, the last of which has stride 2, and three linear layers follow.
    """

    def __init__(
        self, input_shape: ShapeSpec, num_classes: int, conv_dim: int = 256, fc_dim: int = 1024
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of the region features.
            num_classes: K.
            conv_dim: output channels of each convolution.
            fc_dim: number of units in each of the two hidden linear layers.
        """
        super().__init__()
        channels = input_shape.channels + 1
        layers: list[nn.Module] = []
        for stride in (1, 1, 1, 2):
            layers += [nn.Conv2d(channels, conv_dim, 3, stride, padding=1), nn.ReLU()]
            channels = conv_dim
        self.convolutions = nn.Sequential(*layers)
        width = conv_dim * -(-input_shape.height // 2) * -(-input_shape.width // 2)
        self.hidden = nn.Sequential(
            nn.Linear(width, fc_dim), nn.ReLU(), nn.Linear(fc_dim, fc_dim), nn.ReLU()
        )
        self.predictor = nn.Linear(fc_dim, num_classes)
        for layer in layers[::2]:
            weight_init.c2_msra_fill(layer)
        for layer in (self.hidden[0], self.hidden[2]):
            weight_init.c2_xavier_fill(layer)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Tensor, mask_probs: Tensor, classes: Tensor) -> Tensor:
        """
        Args:
            features: (R, C, P, P) region features.
            mask_probs: (R, M, M); no gradient flows back into the masks.
            classes: (R,) int64 in [0, K).

        Returns:
            (R,) predicted IoU for each RoI's class. It can be outside [0, 1].
        """
        masks = F.max_pool2d(mask_probs.detach()[:, None], 2).to(features.dtype)
        hidden = self.hidden(self.convolutions(torch.cat([features, masks], dim=1)).flatten(1))
        return self.predictor(hidden).gather(1, classes[:, None])[:, 0]


def mask_iou_targets(
    mask_bits: Tensor, gt_masks: Tensor, box_area: Tensor, gt_area: Tensor
) -> Tensor:
    """Returns the IoU of each predicted mask and the entire object, even if the RoI cuts it off.

    The IoU is ``overlap / (predicted + object - overlap)`` with areas in mask pixels. The part of
    the object outside the RoI always counts as missed.

    Args:
        mask_bits: (R, M, M) bool, the prediction.
        gt_masks: (R, M, M) bool, the part of the object inside the RoI.
        box_area: (R,) area of the RoIs in image pixels.
        gt_area: (R,) area of the entire objects in image pixels.

    Returns:
        (R,) in [0, 1].
    """
    overlap, predicted, inside = (
        x.flatten(1).sum(1).float() for x in (mask_bits & gt_masks, mask_bits, gt_masks)
    )
    pixels = mask_bits[0].numel() if len(mask_bits) else 1
    whole = gt_area * pixels / box_area.clamp(min=1e-6)
    # Because of rounding to mask pixels, the part inside the RoI can be larger than the object.
    return overlap / (predicted + torch.maximum(whole, inside) - overlap).clamp(min=1.0)


def instance_areas(instances: list[Instances], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the areas of proposal boxes and of ground-truth masks, both (R,) in image pixels."""
    boxes, masks = [], []
    for x in instances:
        if len(x) == 0:  # an image without objects has no gt_masks
            continue
        boxes.append(x.proposal_boxes.area())
        gt = x.gt_masks
        area = gt.tensor.flatten(1).sum(1) if isinstance(gt, BitMasks) else gt.area()
        masks.append(area.to(device, torch.float32))
    if not boxes:
        return torch.zeros(0, device=device), torch.zeros(0, device=device)
    return torch.cat(boxes), torch.cat(masks)
