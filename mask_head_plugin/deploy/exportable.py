"""A trained Mask R-CNN as a function of tensors that all of PyTorch's exporters can process.

The models of detectron2 pass lists of Instances, and branch in Python on the number of boxes. The
module below has the same layers with the same weights, but computes everything between the layers
with tensors only. It supports any image size and any number of detections, including none. It takes
one image at a time.

Shape alphabet: L feature maps of the RPN, A anchors per cell, R RoIs, K classes, C channels, M mask
side, H and W image or map sides.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import RoIPool

from ..modeling.class_selection import of_class
from ..modeling.mask_head import ClassSelection
from ..modeling.pooler import MultiLevelRoIPooler
from .class_nms import NO_CANDIDATE, class_nms


class ExportableMaskRCNN(nn.Module):
    """A module that returns the detections of ``model.inference(..., do_postprocess=False)``.

    It shares the model's layers instead of copying them. deploy.refusals checks whether a model is
    supported.
    """

    # Any, because detectron2's modules have no type annotations.
    model: Any
    box_pooler: Any
    mask_pooler: Any

    def __init__(self, model: GeneralizedRCNN) -> None:
        """
        Args:
            model: the model, in evaluation mode. Half-precision layers get half-precision features;
                boxes, scores and RoI pooling are always float32.
        """
        super().__init__()
        self.model = model
        heads = model.roi_heads
        self.has_masks = heads.mask_on
        self.has_mask_scores = (
            self.has_masks and getattr(heads.mask_head, "iou_head", None) is not None
        )
        self.box_pooler = plugin_pooler(heads.pooler if _is_res5(heads) else heads.box_pooler)
        if self.has_masks:
            pooler = heads.pooler if _is_res5(heads) else heads.mask_pooler
            self.mask_pooler = plugin_pooler(pooler)

    @property
    def output_names(self) -> list[str]:
        names = ["boxes", "scores", "classes"]
        names += ["mask_probs"] if self.has_masks else []
        return [*names, "mask_scores"] if self.has_mask_scores else names

    def halve(self) -> None:
        """Converts the weights of all layers to half precision, in place."""
        heads = self.model.roi_heads
        self.model.backbone.half()
        self.model.proposal_generator.rpn_head.half()
        for name in ("res5", "box_head", "box_predictor", "mask_head"):
            if hasattr(heads, name):
                getattr(heads, name).half()

    def forward(self, image: Tensor, image_hw: Tensor | None = None) -> tuple[Tensor, ...]:
        """
        Args:
            image: (C, H, W) float32 pixels in the format of the model's config, already resized.
            image_hw: (2,) int64, the size of the image in the top left corner of ``image``. The
                rest is padding with arbitrary values. None if there is no padding.

        Returns:
            Detections, best first: boxes (R, 4) in pixels of ``image``, scores (R,) and classes
            (R,) int64. Models with masks add the mask probabilities (R, M, M) of the detected
            class, and models with mask scoring add the mask scores (R,).
        """
        pixels, image_edge = self._prepare(image, image_hw)
        features = self.model.backbone(pixels)
        proposals = self._propose(features, image_edge)
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.in_features]
        find = self._find_cascade if isinstance(heads, CascadeROIHeads) else self._find
        found = find(maps, proposals, image_edge)
        return found + (self._masks(maps, *found) if self.has_masks else ())

    def _prepare(self, image: Tensor, image_hw: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the (1, C, H', W') input of the backbone, and the (4,) largest coordinates."""
        height, width = image.shape[1], image.shape[2]
        pixels = (image - self.model.pixel_mean) / self.model.pixel_std
        if image_hw is None:
            image_hw = torch.stack([_scalar(height), _scalar(width)])
        else:
            rows = torch.arange(height) < image_hw[0]
            columns = torch.arange(width) < image_hw[1]
            pixels = torch.where(rows[:, None] & columns, pixels, torch.zeros(()))
        backbone = self.model.backbone
        constraints = backbone.padding_constraints
        divisor = constraints.get("size_divisibility", backbone.size_divisibility)
        square = constraints.get("square_size", 0)
        if square > 0:
            padding = square - height, square - width
        else:
            padding = (-height) % max(divisor, 1), (-width) % max(divisor, 1)
        pixels = F.pad(pixels, [0, padding[1], 0, padding[0]])[None]
        dtype = next(backbone.parameters()).dtype
        return pixels.to(dtype), image_hw.flip(0).repeat(2).to(torch.float32)

    def _propose(self, features: dict[str, Tensor], image_edge: Tensor) -> Tensor:
        """Returns the (R, 4) boxes of detectron2's find_top_rpn_proposals, best first.

        Only the best anchors of each map become boxes. If a map has too few anchors, boxes that are
        not candidates are added, so that sizes are constant up to the non-maximum suppression.
        """
        rpn = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        generator = rpn.anchor_generator
        boxes, scores = [], []
        for logits, deltas, cell_anchors, stride in zip(
            *rpn.rpn_head(maps), generator.cell_anchors, generator.strides, strict=True
        ):
            number = rpn.pre_nms_topk[False]
            height, width = logits.shape[2], logits.shape[3]
            flat = F.pad(logits.flatten().float(), [0, number], value=NO_CANDIDATE)
            best, index = flat.topk(number)
            index = torch.minimum(index, _scalar(logits.numel()) - 1)
            cell, place = index // (height * width), index % (height * width)
            corner = torch.stack([place % width, place // width], dim=1) + generator.offset
            anchors = cell_anchors[cell] + (corner * stride).repeat(1, 2)
            deltas = deltas.unflatten(1, (-1, 4)).flatten(3)[0].transpose(1, 2).reshape(-1, 4)
            boxes.append(rpn.box2box_transform.apply_deltas(deltas[index], anchors))
            scores.append(best)
        stacked, logits = torch.stack(boxes), torch.stack(scores)
        is_finite = stacked.isfinite().all(dim=2) & logits.isfinite()
        stacked = _clip(stacked, image_edge)
        sides = stacked[..., 2:] - stacked[..., :2]
        is_candidate = is_finite & (sides > rpn.min_box_size).all(dim=2)
        logits = logits.masked_fill(~is_candidate, NO_CANDIDATE)
        limit = rpn.post_nms_topk[False]
        kept = class_nms(stacked, logits, rpn.nms_thresh, limit, image_edge)
        return stacked.flatten(0, 1)[_best(kept, logits, limit)]

    def _find(
        self, maps: list[Tensor], proposals: Tensor, image_edge: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.model.roi_heads
        pooled = self.box_pooler.pool_for_export(maps, proposals)
        is_res5 = _is_res5(heads)
        region = heads.res5(pooled).mean(dim=[2, 3]) if is_res5 else heads.box_head(pooled)
        scores, deltas = heads.box_predictor(region)
        probs = class_probs(heads.box_predictor, scores)
        boxes = heads.box_predictor.box2box_transform.apply_deltas(deltas, proposals)
        return self._select(heads.box_predictor, boxes, probs, image_edge)

    def _find_cascade(
        self, maps: list[Tensor], boxes: Tensor, image_edge: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Averages scores over stages and uses the last stage's boxes, as in CascadeROIHeads."""
        heads = self.model.roi_heads
        probs = []
        for stage, (head, predictor) in enumerate(
            zip(heads.box_head, heads.box_predictor, strict=True)
        ):
            if stage > 0:
                boxes = _clip(boxes, image_edge)
            scores, deltas = predictor(head(self.box_pooler.pool_for_export(maps, boxes)))
            probs.append(class_probs(predictor, scores))
            boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
        mean = torch.stack(probs).sum(dim=0) * (1.0 / len(probs))
        return self._select(predictor, boxes, mean, image_edge)

    def _select(
        self, predictor: Any, boxes: Tensor, probs: Tensor, image_edge: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the boxes, scores and classes of detectron2's fast_rcnn_inference.

        Args:
            predictor: the box predictor, from which the thresholds are read.
            boxes: (R, 4 K), or (R, 4) for class-agnostic boxes.
            probs: (R, K + 1).
            image_edge: see _prepare.
        """
        is_finite = boxes.isfinite().all(dim=1) & probs.isfinite().all(dim=1)
        num_classes = probs.shape[1] - 1
        # The number of classes is explicit, because ONNX cannot infer a -1 if there are no boxes.
        by_class = boxes.reshape(-1, boxes.shape[1] // 4, 4)
        by_class = _clip(by_class, image_edge).transpose(0, 1)
        by_class = by_class.expand(num_classes, -1, -1)
        scores = probs[:, :-1].t()
        is_candidate = (scores > predictor.test_score_thresh) & is_finite
        scores = scores.masked_fill(~is_candidate, NO_CANDIDATE)
        limit = predictor.test_topk_per_image
        kept = class_nms(by_class, scores, predictor.test_nms_thresh, limit, image_edge)
        best = _best(kept, scores, limit)
        classes = best // scores.shape[1]
        return by_class.reshape(-1, 4)[best], scores.reshape(-1)[best], classes

    def _masks(
        self, maps: list[Tensor], boxes: Tensor, scores: Tensor, classes: Tensor
    ) -> tuple[Tensor, ...]:
        heads = self.model.roi_heads
        pooled = self.mask_pooler.pool_for_export(maps, boxes)
        if _is_res5(heads):
            pooled = heads.res5(pooled)
        head = heads.mask_head
        if isinstance(head, ClassSelection) and head.num_classes == 1:  # or class-agnostic masks
            classes = torch.zeros_like(classes)
        probs = mask_probs(head, pooled, classes).float()
        if not self.has_mask_scores:
            return (probs,)
        iou = head.iou_head(pooled, probs.to(pooled.dtype), classes).float()
        return probs, scores * iou.clamp(0, 1)


def last_predictor(model: Any) -> Any:
    """Returns the box predictor whose thresholds apply. In a cascade, this is the last one."""
    predictor = model.roi_heads.box_predictor
    return predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor


def class_probs(predictor: Any, scores: Tensor) -> Tensor:
    """Returns (R, K + 1) probabilities, like FastRCNNOutputLayers.predict_probs."""
    scores = scores.float()
    return scores.sigmoid() if predictor.use_sigmoid_ce else scores.softmax(dim=1)


def mask_probs(head: Any, features: Tensor, classes: Tensor) -> Tensor:
    """Returns the (R, M, M) probabilities of each RoI's class.

    Args:
        head: the plugin's or detectron2's mask head.
        features: (R, C, P, P) region features.
        classes: (R,) int64 in [0, K); 0 for a head with one mask for all classes.
    """
    activation = head.losses[0].activation if isinstance(head, ClassSelection) else None
    if activation is not None:
        return activation(head.class_logits(features), classes)
    if isinstance(head, ClassSelection):
        return head.selected_logits(features, classes).sigmoid()
    logits = head.layers(features)
    return (logits[:, 0] if logits.shape[1] == 1 else of_class(logits, classes)).sigmoid()


def _clip(boxes: Tensor, image_edge: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), image_edge)


def _best(kept: Tensor, scores: Tensor, limit: int) -> Tensor:
    """Returns the flat indices of the ``limit`` best boxes that were kept, best first.

    A negative limit returns all of them.
    """
    order = scores.reshape(-1)[kept].sort(descending=True)[1]
    return kept[order[:limit] if limit >= 0 else order]


def _scalar(size: Any) -> Tensor:
    """Returns a size as an int64 tensor. A trace would record a plain number as a constant."""
    return torch.full((), size, dtype=torch.int64)


def _is_res5(heads: nn.Module) -> bool:
    return isinstance(heads, Res5ROIHeads)


def plugin_pooler(pooler: Any) -> Any:
    """Returns the plugin's counterpart of a detectron2 pooler.

    Args:
        pooler: a ROIPooler, or a MultiLevelRoIPooler, which is returned unchanged.

    Returns:
        A MultiLevelRoIPooler, or None for a pooler of rotated boxes, which has no counterpart.
    """
    if isinstance(pooler, MultiLevelRoIPooler):
        return pooler
    first, sampling_ratio = pooler.level_poolers[0], 0
    if isinstance(first, ROIAlign):
        pooler_type = "ROIAlignV2" if first.aligned else "ROIAlign"
        sampling_ratio = first.sampling_ratio
    elif isinstance(first, RoIPool):
        pooler_type = "ROIPool"
    else:
        return None
    return MultiLevelRoIPooler(
        pooler.output_size,
        [level.spatial_scale for level in pooler.level_poolers],
        sampling_ratio,
        pooler_type,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
