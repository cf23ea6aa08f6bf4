"""Refuses models that cannot be exported before they are converted. Errors name the config key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, StandardROIHeads
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor, nn

from ..config import ConfigError
from ..messages import first_line
from ..modeling.fast_rcnn import ClassSelectiveOutputLayers
from ..modeling.mask_head import ClassSelection
from ..modeling.mask_loss import softmax_probs
from ..modeling.pooler import MultiLevelRoIPooler
from ..modeling.rcnn import MaskRCNN
from ..modeling.roi_heads import PerClassMaskRes5ROIHeads, PerClassMaskROIHeads
from .exportable import ExportableMaskRCNN, mask_probs, plugin_pooler

# Exact types are compared, because a subclass could compute anything.
META_ARCHITECTURES = (GeneralizedRCNN, MaskRCNN)
ROI_HEADS = (
    *(StandardROIHeads, PerClassMaskROIHeads, CascadeROIHeads),
    *(Res5ROIHeads, PerClassMaskRes5ROIHeads),
)
BOX_PREDICTORS = (FastRCNNOutputLayers, ClassSelectiveOutputLayers)
MASK_HEAD_FORWARDS = (ClassSelection.forward, BaseMaskRCNNHead.forward)
KNOWN_PACKAGES = ("torch", "torchvision", "fvcore", "detectron2", "mask_head_plugin")


def check_architecture(cfg: CfgNode) -> None:
    """Refuses models that cannot be exported according to their config.

    Raises:
        ConfigError: if the model cannot be exported; the message names the key.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name in META_ARCH_REGISTRY and META_ARCH_REGISTRY.get(name) not in META_ARCHITECTURES:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: {name} cannot be exported; only MaskRCNN and "
            "GeneralizedRCNN can"
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise ConfigError("MODEL.KEYPOINT_ON: keypoints cannot be exported; set it to False")


def check_exportable(model: Any) -> None:
    """Refuses parts that ExportableMaskRCNN would compute differently from the model.

    Raises:
        ConfigError: if there is such a part; the message names the key.
    """
    _require("MODEL.META_ARCHITECTURE", model, META_ARCHITECTURES)
    rpn, heads = model.proposal_generator, model.roi_heads
    _require("MODEL.PROPOSAL_GENERATOR.NAME", rpn, (RPN,))
    _require("MODEL.ANCHOR_GENERATOR.NAME", rpn.anchor_generator, (DefaultAnchorGenerator,))
    _require("MODEL.ROI_HEADS.NAME", heads, ROI_HEADS)
    if getattr(heads, "keypoint_on", False):
        raise ConfigError("MODEL.KEYPOINT_ON: keypoints cannot be exported; set it to False")
    for predictor in _listed(heads.box_predictor):
        _require("MODEL.ROI_HEADS.NAME", predictor, BOX_PREDICTORS)
    if isinstance(heads, Res5ROIHeads):
        _check_pooler("MODEL.ROI_BOX_HEAD", heads.pooler)
    else:
        _check_pooler("MODEL.ROI_BOX_HEAD", heads.box_pooler)
        if heads.mask_on:
            _check_pooler("MODEL.ROI_MASK_HEAD", heads.mask_pooler)
    if heads.mask_on:
        _check_mask_head(heads.mask_head)


def check_traces(exportable: ExportableMaskRCNN) -> None:
    """Traces each part that contains a user's code, and checks the trace on inputs of another size.

    Raises:
        ConfigError: if a part cannot be traced correctly; the message names the key.
    """
    for key, part, examples in _parts(exportable):
        if all(_is_known(module) for module in part.modules()):
            continue
        name = type(part.head if isinstance(part, _MaskProbs) else part).__name__
        try:
            trace = torch.jit.trace(part, examples[0], check_trace=False, strict=False)
            expected, found = (_tensors(x(*examples[1])) for x in (part, trace))
        except Exception as error:  # the user's code can raise anything
            raise ConfigError(
                f"{key}: {name} cannot be exported, because PyTorch cannot trace it: "
                f"{first_line(error)}"
            ) from error
        same = len(expected) == len(found) and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
            for a, b in zip(expected, found, strict=True)
        )
        if not same:
            raise ConfigError(
                f"{key}: {name} cannot be exported, because its trace is wrong for inputs of "
                "another size; compute sizes with tensors, and do not branch on values"
            )


def _parts(exportable: ExportableMaskRCNN) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yields each part that may contain a user's code: its config key, the part, and two inputs."""
    model = exportable.model
    backbone, heads = model.backbone, model.roi_heads
    side = 2 * max(backbone.size_divisibility, 32)
    square = backbone.padding_constraints.get("square_size", 0)
    sizes = [(square, square)] * 2 if square else [(side, side), (side, 2 * side)]
    images = [torch.rand(1, len(model.pixel_mean), *hw) for hw in sizes]
    yield "MODEL.BACKBONE.NAME", backbone, [(image,) for image in images]
    shapes = backbone.output_shape()
    rpn = model.proposal_generator
    maps = [
        ([torch.rand(1, shapes[x].channels, *hw) for x in rpn.in_features],)
        for hw in ((8, 8), (8, 12))
    ]
    yield "MODEL.RPN.HEAD_NAME", rpn.rpn_head, maps
    pooled = [
        _pooled(exportable.box_pooler, shapes[heads.in_features[0]].channels, n) for n in (2, 3)
    ]
    if isinstance(heads, Res5ROIHeads):
        regions = [heads.res5(x) for x in pooled]
    else:
        for head in _listed(heads.box_head):
            yield "MODEL.ROI_BOX_HEAD.NAME", head, [(x,) for x in pooled]
    if heads.mask_on:
        if not isinstance(heads, Res5ROIHeads):
            regions = [_pooled(exportable.mask_pooler, x.shape[1], len(x)) for x in pooled]
        classes = [torch.zeros(len(x), dtype=torch.int64) for x in regions]
        masks = list(zip(regions, classes, strict=True))
        yield "MODEL.ROI_MASK_HEAD.NAME", _MaskProbs(heads.mask_head), masks


class _MaskProbs(nn.Module):
    """A mask head without its losses, as it is exported."""

    head: Any

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        return mask_probs(self.head, features, classes)


def _pooled(pooler: MultiLevelRoIPooler, num_channels: int, number: int) -> Tensor:
    return torch.rand(number, num_channels, *pooler.output_size)


def _check_pooler(section: str, pooler: Any) -> None:
    _require(f"{section}.POOLER_TYPE", pooler, (MultiLevelRoIPooler, ROIPooler))
    pooler = plugin_pooler(pooler)
    if pooler is None:
        raise ConfigError(
            f"{section}.POOLER_TYPE: ROIAlignRotated cannot be exported; train with ROIAlignV2"
        )
    if pooler.pooler_type == "PrROIPool":
        raise ConfigError(
            f"{section}.POOLER_TYPE: PrROIPool cannot be exported, because ONNX and torchvision "
            "have no operator for the integral; train with ROIAlignV2"
        )
    if pooler.reduction == "max" and pooler.pooler_type != "ROIPool":
        raise ConfigError(
            f"{section}.POOLER_REDUCTION: the maximum of samples cannot be exported; train with "
            "'mean', or POOLER_TYPE ROIPool"
        )


def _check_mask_head(head: Any) -> None:
    if type(head).forward not in MASK_HEAD_FORWARDS:
        raise ConfigError(
            f"MODEL.ROI_MASK_HEAD.NAME: {type(head).__name__} cannot be exported, because it "
            "overrides forward; override `layers` instead, as in detectron2's BaseMaskRCNNHead"
        )
    if not isinstance(head, ClassSelection):
        return
    activation = head.losses[0].activation
    if activation not in (None, softmax_probs):
        raise ConfigError(
            f"MODEL.ROI_MASK_HEAD.LOSSES: {head.losses[0].name!r} has a custom activation, "
            f"{getattr(activation, '__name__', activation)}, which cannot be exported; use a loss "
            "with the sigmoid or with softmax_probs"
        )


def _require(key: str, part: Any, types: tuple[type, ...]) -> None:
    if type(part) not in types:
        names = ", ".join(x.__name__ for x in types)
        raise ConfigError(f"{key}: {type(part).__name__} cannot be exported; only {names} can")


def _listed(parts: Any) -> list[Any]:
    """Returns the stages of a cascade, or the single part of other heads."""
    return list(parts) if isinstance(parts, nn.ModuleList) else [parts]


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in KNOWN_PACKAGES


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in _tensors(value)]
