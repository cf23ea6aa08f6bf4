"""Mask heads that compute only the mask of each RoI's class from the region features.

A per-class head has K output channels but uses only one of them per RoI: the channel of the
ground-truth class in training, and of the predicted class in inference. The last layer is linear,
per pixel or per mask, so its rows can be selected before it is applied:
``logits[r] = weight[class[r]] . features[r] + bias``. Values and gradients are the same as if all
channels were computed first, but the (R, K, M, M) tensor is never allocated. Only a loss that
couples the classes (the softmax of Table 2b) needs all K channels.

Shape alphabet: R RoIs, K classes, C channels, P pooled side, M mask side (2P), D hidden units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling import ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from ..config import DEFAULT_LOSSES
from ..ops import crop_masks
from ..shared_names import register_in
from .class_selection import select_class_logits, select_class_masks
from .graph_capture import stand_in
from .mask_loss_terms import parse_losses, weighted_mask_losses
from .mask_scoring import MaskIoUHead, instance_areas, mask_iou_targets

STATISTICS_PERIOD = 20
"""Iterations between two logs of mask accuracy; equal to DefaultTrainer's write period."""

Losses = Sequence[Sequence[Any]]
LossParams = Mapping[str, Mapping[str, Any]]

NO_PARAMETERS: LossParams = {}


class ClassSelection(nn.Module):
    """The losses, statistics and inference that the plugin's mask heads share.

    This is a mixin for subclasses of detectron2's BaseMaskRCNNHead that define ``selected_logits``
    and ``class_logits``.
    """

    vis_period: int
    _pixel_counts: Tensor

    def selected_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """Returns the (R, M, M) logits of each RoI's class."""
        raise NotImplementedError

    def class_logits(self, features: Tensor) -> Tensor:
        """Returns the (R, K, M, M) logits of all classes."""
        raise NotImplementedError

    def _init_selection(
        self,
        num_classes: int,
        losses: Losses,
        loss_params: LossParams,
        loss_weight: float,
        iou_head: MaskIoUHead | None,
        iou_loss_weight: float,
    ) -> None:
        self.num_classes = num_classes
        self.iou_head = iou_head
        self.iou_loss_weight = iou_loss_weight
        self.losses = [
            dataclasses.replace(term, weight=term.weight * loss_weight)
            for term in parse_losses(losses, loss_params)
        ]
        if iou_head is not None and "iou" in [term.name for term in self.losses]:
            raise ValueError(
                "mask scoring already logs loss_mask_iou: give the mask loss 'iou' another name"
            )
        # Since the last log, _pixel_counts counts wrong pixels, foreground pixels and wrong
        # foreground pixels, and _num_pixels counts all pixels. _storage_id identifies the run in
        # which they were counted. Checkpoints do not contain these attributes.
        counts = torch.zeros(3, dtype=torch.int64)
        self.register_buffer("_pixel_counts", counts, persistent=False)
        self._num_pixels = 0
        self._storage_id = 0

    def forward(
        self, features: Tensor, instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """
        Args:
            features: (R, C, P, P) region features.
            instances: one per image, with R instances in total. In training, these are the positive
                proposals with ``proposal_boxes``, ``gt_classes`` and ``gt_masks``. In inference,
                these are detections with ``pred_classes``.

        Returns:
            In training, the weighted loss terms by name. In inference, the given instances, to
            which ``pred_masks`` (Ri, 1, M, M) are added: the mask probabilities of the predicted
            class. With mask scoring, instances that have ``scores`` also get ``mask_scores`` (Ri,):
            the score times the predicted IoU.
        """
        field = "gt_classes" if self.training else "pred_classes"
        classes = cat([x.get(field) for x in instances])
        if self.num_classes == 1:  # class-agnostic masks, or only one class
            classes = torch.zeros_like(classes)
        activation = self.losses[0].activation
        if activation is None:
            mask_logits = self.selected_logits(features, classes)
            mask_probs = mask_logits.detach().sigmoid()
        else:
            mask_logits = self.class_logits(features)
            mask_probs = activation(mask_logits.detach(), classes)
        if not self.training:
            # shape instead of len(), which a trace would record as a constant.
            counts = [x.pred_classes.shape[0] for x in instances]
            for x, probs in zip(instances, mask_probs[:, None].split(counts), strict=True):
                x.pred_masks = probs
            if self.iou_head is not None:
                iou = self.iou_head(features, mask_probs, classes).clamp(0, 1)
                for x, iou_per_image in zip(instances, iou.split(counts), strict=True):
                    if x.has("scores"):  # boxes that a user passes may have no scores
                        x.mask_scores = x.scores * iou_per_image
            return instances
        gt_masks = crop_gt_masks(instances, mask_probs)
        # Cropping detectron2's masks returns bool; a user's class may return fractions in [0, 1].
        gt_bits = gt_masks if gt_masks.dtype == torch.bool else gt_masks > 0.5
        if torch.is_grad_enabled():  # no statistics for PreciseBN and TEST.EVAL_LOSS
            self._log(mask_probs, gt_bits)
        iteration = get_event_storage().iter
        losses = weighted_mask_losses(self.losses, mask_logits, classes, gt_masks, iteration)
        if self.iou_head is not None:
            areas = instance_areas(instances, mask_probs.device)
            target = mask_iou_targets(mask_probs > 0.5, gt_bits, *areas)
            iou = self.iou_head(features, mask_probs, classes).float()
            loss = (iou - target).square().sum() / max(len(iou), 1)
            losses["loss_mask_iou"] = self.iou_loss_weight * loss
        return losses

    def __prepare_scriptable__(self) -> nn.Module:
        """Returns the module that torch.jit.script compiles instead: detectron2's mask head.

        Raises:
            ValueError: if detectron2's head would compute different results.
        """
        term, where = self.losses[0], "cannot be scripted; use torch.jit.trace"
        if not isinstance(self, MaskRCNNConvUpsampleHead):
            raise ValueError(f"MODEL.ROI_MASK_HEAD.NAME {type(self).__name__} {where}")
        if self.iou_head is not None:
            raise ValueError(f"MODEL.ROI_MASK_HEAD.SCORING.ENABLED True {where}")
        if term.activation is not None:
            raise ValueError(f"MODEL.ROI_MASK_HEAD.LOSSES: {term.name!r} {where}")
        return stand_in(self, MaskRCNNConvUpsampleHead)

    @torch.no_grad()
    def _log(self, mask_probs: Tensor, gt_masks: Tensor) -> None:
        """Logs detectron2's mask statistics and, at vis_period, masks next to their targets."""
        storage = get_event_storage()
        if id(storage) != self._storage_id:  # a new run has started
            self._storage_id, self._num_pixels = id(storage), 0
            self._pixel_counts.zero_()
        wrong = (mask_probs > 0.5) != gt_masks
        self._pixel_counts += torch.stack([wrong.sum(), gt_masks.sum(), (wrong & gt_masks).sum()])
        self._num_pixels += wrong.numel()
        if (storage.iter + 1) % STATISTICS_PERIOD == 0:
            log_statistics(storage, self._num_pixels, *self._pixel_counts.tolist())
            self._num_pixels = 0
            self._pixel_counts.zero_()
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            pairs = torch.cat([mask_probs, gt_masks.to(mask_probs.dtype)], dim=2)
            for index, pair in enumerate(pairs):
                name = f"Left: mask prediction;   Right: mask GT ({index})"
                storage.put_image(name, pair.float().expand(3, -1, -1))


def selection_arguments(cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
    """Returns the constructor arguments that all mask heads of the plugin take from a config.

    Raises:
        KeyError: if the config does not have the plugin's keys.
    """
    head = cfg.MODEL.ROI_MASK_HEAD
    if "LOSSES" not in head:
        raise KeyError("MODEL.ROI_MASK_HEAD.LOSSES: call add_mask_head_config(cfg) on your config")
    check_mask_losses(head)
    num_classes = 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    iou_head = None
    if head.SCORING.ENABLED:
        shape = region_shape(cfg, input_shape)
        iou_head = MaskIoUHead(shape, num_classes, head.SCORING.CONV_DIM, head.SCORING.FC_DIM)
    return {
        "losses": head.LOSSES,
        "loss_params": head.LOSS_PARAMS,
        "loss_weight": head.LOSS_WEIGHT,
        "num_classes": num_classes,
        "vis_period": cfg.VIS_PERIOD,
        "iou_head": iou_head,
        "iou_loss_weight": head.SCORING.LOSS_WEIGHT,
    }


def region_shape(cfg: CfgNode, input_shape: ShapeSpec) -> ShapeSpec:
    """Returns the shape of the mask head's region features.

    It can differ from ``input_shape``, because Res5ROIHeads passes the shape before res5 halves it.
    """
    if not issubclass(ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME), Res5ROIHeads):
        return input_shape
    height, width = -(-input_shape.height // 2), -(-input_shape.width // 2)
    return ShapeSpec(channels=input_shape.channels, height=height, width=width)


def check_mask_losses(head_cfg: CfgNode) -> None:
    """Raises a ValueError if the losses in ``cfg.MODEL.ROI_MASK_HEAD`` cannot be used."""
    terms = parse_losses(head_cfg.LOSSES, head_cfg.LOSS_PARAMS)
    if head_cfg.CLS_AGNOSTIC_MASK and terms[0].activation is not None:
        raise ValueError(
            f"MODEL.ROI_MASK_HEAD.LOSSES: {terms[0].name!r} lets classes compete, but with "
            f"CLS_AGNOSTIC_MASK True there is only one class; set the latter to False, or use "
            "another loss"
        )


@register_in(ROI_MASK_HEAD_REGISTRY)
class FCNMaskHead(ClassSelection, MaskRCNNConvUpsampleHead):
    """The mask head of Mask R-CNN figure 4: 3x3 convolutions, a 2x2 deconvolution, K masks per RoI.

    Its layers, initialisation and parameter names are those of detectron2's
    MaskRCNNConvUpsampleHead. Checkpoints are therefore interchangeable, and this head works in
    every ROIHeads class that accepts detectron2's head. Differs from detectron2: only the logits of
    each RoI's class are computed, the losses come from MASK_LOSS_REGISTRY, and accuracy statistics
    are summed on the device and read once per STATISTICS_PERIOD.
    """

    predictor: nn.Conv2d

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: str = "",
        losses: Losses = DEFAULT_LOSSES,
        loss_params: LossParams = NO_PARAMETERS,
        loss_weight: float = 1.0,
        vis_period: int = 0,
        iou_head: MaskIoUHead | None = None,
        iou_loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            input_shape: shape of the region features; only the number of channels is read.
            num_classes: K, the number of foreground classes; 1 for class-agnostic masks.
            conv_dims: output channels of each 3x3 convolution, followed by those of the
                deconvolution.
            conv_norm: normalisation of the convolutions, see detectron2.layers.get_norm.
            losses: for each term, (name, weight) or (name, weight, ramp_iters), as in
                MODEL.ROI_MASK_HEAD.LOSSES.
            loss_params: parameters of each loss, as in MODEL.ROI_MASK_HEAD.LOSS_PARAMS.
            loss_weight: factor that multiplies all terms.
            vis_period: number of iterations between two times that masks and their targets are
                written to TensorBoard; 0 means never.
            iou_head: predicts the IoU of each mask (mask scoring); None disables mask scoring.
            iou_loss_weight: factor of the mask scoring loss, which is the mean squared error of the
                predicted IoU over the RoIs.

        Raises:
            ValueError: if ``losses`` or ``loss_params`` cannot be used.
        """
        super().__init__(
            input_shape,
            num_classes=num_classes,
            conv_dims=conv_dims,
            conv_norm=conv_norm,
            loss_weight=loss_weight,
            vis_period=vis_period,
        )
        self._init_selection(
            num_classes, losses, loss_params, loss_weight, iou_head, iou_loss_weight
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {**super().from_config(cfg, input_shape), **selection_arguments(cfg, input_shape)}

    def predictor_features(self, features: Tensor) -> Tensor:
        """Returns the (R, C, M, M) input of the predictor for (R, C, P, P) region features."""
        for name, layer in self.named_children():
            if name == "predictor":  # compared by name: torch.export substitutes modules
                break
            features = layer(features)
        return features

    def selected_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        return select_class_logits(self.predictor_features(features), self.predictor, classes)

    def class_logits(self, features: Tensor) -> Tensor:
        return self.predictor(self.predictor_features(features))

    def layers(self, features: Tensor) -> Tensor:
        """Returns the logits of all classes, like detectron2's method of the same name."""
        return self.class_logits(features)


@register_in(ROI_MASK_HEAD_REGISTRY)
class MLPMaskHead(ClassSelection, BaseMaskRCNNHead):
    """The multi-layer perceptron that Mask R-CNN Table 2e compares with FCNMaskHead.

    It has hidden layers ``fc1``, ``fc2``, ... (MODEL.ROI_MASK_HEAD.NUM_FC layers of FC_DIM units)
    and a ``predictor`` with K (2P)^2 outputs. The outputs of each class's mask are contiguous.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        fc_dims: Sequence[int],
        losses: Losses = DEFAULT_LOSSES,
        loss_params: LossParams = NO_PARAMETERS,
        loss_weight: float = 1.0,
        vis_period: int = 0,
        iou_head: MaskIoUHead | None = None,
        iou_loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of the region features, which must be square.
            num_classes: K, the number of foreground classes; 1 for class-agnostic masks.
            fc_dims: number of units in each of the hidden layers; there must be at least one.
            losses: see FCNMaskHead.
            loss_params: see FCNMaskHead.
            loss_weight: see FCNMaskHead.
            vis_period: see FCNMaskHead.
            iou_head: see FCNMaskHead.
            iou_loss_weight: see FCNMaskHead.

        Raises:
            ValueError: if ``fc_dims`` is empty, the region features are not square, or ``losses``
                or ``loss_params`` cannot be used.
        """
        super().__init__(loss_weight=loss_weight, vis_period=vis_period)
        if not fc_dims:
            raise ValueError("MLPMaskHead needs a hidden layer; raise MODEL.ROI_MASK_HEAD.NUM_FC")
        if not input_shape.height or input_shape.height != input_shape.width:
            raise ValueError(f"MLPMaskHead needs square region features, not {input_shape}")
        self.mask_side = 2 * input_shape.height
        width = input_shape.channels * input_shape.height * input_shape.width
        self.hidden = []
        for k, fc_dim in enumerate(fc_dims):
            layer = nn.Linear(width, fc_dim)
            weight_init.c2_xavier_fill(layer)
            self.add_module(f"fc{k + 1}", layer)
            self.hidden.append(layer)
            width = fc_dim
        self.predictor = nn.Linear(width, num_classes * self.mask_side**2)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)
        self._init_selection(
            num_classes, losses, loss_params, loss_weight, iou_head, iou_loss_weight
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_MASK_HEAD
        return {
            **selection_arguments(cfg, input_shape),
            "input_shape": region_shape(cfg, input_shape),
            "fc_dims": [head.FC_DIM] * head.NUM_FC,
        }

    def hidden_features(self, features: Tensor) -> Tensor:
        """Returns the (R, D) input of the predictor for (R, C, P, P) region features."""
        hidden = features.flatten(1)
        for layer in self.hidden:
            hidden = layer(hidden).relu()
        return hidden

    def selected_logits(self, features: Tensor, classes: Tensor) -> Tensor:
        hidden = self.hidden_features(features)
        return select_class_masks(hidden, self.predictor, classes, self.mask_side)

    def class_logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.predictor(self.hidden_features(features))
        return logits.unflatten(1, (self.num_classes, self.mask_side, self.mask_side))


def log_statistics(
    storage: EventStorage, num_pixels: int, num_wrong: int, num_positive: int, num_missed: int
) -> None:
    """Logs the accuracy and error rates of mask pixels under detectron2's names."""
    num_negative = num_pixels - num_positive
    storage.put_scalar("mask_rcnn/accuracy", 1 - num_wrong / max(num_pixels, 1))
    storage.put_scalar("mask_rcnn/false_positive", (num_wrong - num_missed) / max(num_negative, 1))
    storage.put_scalar("mask_rcnn/false_negative", num_missed / max(num_positive, 1))


def crop_gt_masks(instances: list[Instances], mask_logits: Tensor) -> Tensor:
    """Returns the (R, M, M) targets: the part of each ground-truth mask that is inside its RoI.

    Polygons are rasterised by pycocotools, as in detectron2.

    Args:
        instances: one per image, with R instances in total; each has ``proposal_boxes`` and
            ``gt_masks``.
        mask_logits: (R, M, M); only M and the device are read.
    """
    size, targets = mask_logits.shape[-1], []
    for x in instances:
        if len(x) == 0:  # an image without objects has no gt_masks
            continue
        boxes = x.proposal_boxes.tensor
        if isinstance(x.gt_masks, BitMasks):
            target = crop_masks(x.gt_masks.tensor, boxes, size)
        else:
            target = x.gt_masks.crop_and_resize(boxes, size)
        targets.append(target.to(mask_logits.device))
    return cat(targets) if targets else torch.zeros_like(mask_logits, dtype=torch.bool)
