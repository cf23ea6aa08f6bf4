"""Records the stages of Mask R-CNN on one image while the model runs (paper, Figure 1).

Shape alphabet: H, W image height and width in pixels; A proposals, N detections, K classes, C
channels, P pooled side, M mask side.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ...config import ConfigError
from ...engine.predictor import BGRPredictor
from ...ops import encode_masks

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stages:
    """Intermediate results of Mask R-CNN on one image.

    Boxes are XYXY in pixels of the image; detections are sorted by descending score.

    Attributes:
        image: (H, W, 3) RGB.
        proposals: (A, 4) boxes; those most likely to contain an object come first.
        boxes: (N, 4) boxes of the detections.
        scores: (N,) scores of the detections.
        classes: (N,) classes of the detections, in [0, K).
        names: K class names.
        mask_probs: (N, M, M) mask probabilities for the class of each detection.
        rois: (N, 4) boxes of the detections in pixels of the network's input.
        map_of: (N,) index of the map that each detection is pooled from.
        map_hws: height and width of each map.
        strides: stride of each map, in pixels of the network's input.
        region_features: (N, C, P, P) input of the mask head.
        pixels: pixels of the image per pixel of the network's input, in x and y.
        classes_compete: whether the classes compete for each pixel, as with a softmax.
        pooled_hw: number of bins of a RoI, down and across.
        sampling_ratio: samples per bin along each side; 0 for one per cell.
    """

    image: ByteArray
    proposals: FloatArray
    boxes: FloatArray
    scores: FloatArray
    classes: npt.NDArray[np.int64]
    names: list[str]
    mask_probs: Tensor
    rois: FloatArray
    map_of: npt.NDArray[np.int64]
    map_hws: list[tuple[int, int]]
    strides: list[float]
    region_features: Tensor
    pixels: FloatArray
    classes_compete: bool
    pooled_hw: tuple[int, int]
    sampling_ratio: int

    def pasted(self, number: int) -> list[dict[str, Any]]:
        """Returns a list with the RLE of one detection's mask, pasted into the image."""
        probs = self.mask_probs[number : number + 1]
        box = torch.as_tensor(self.boxes[number : number + 1], dtype=probs.dtype)
        return encode_masks(probs, box, self.image.shape[:2])


def run_stages(predictor: BGRPredictor, image: ByteArray) -> Stages:
    """Runs a model on an image and records its stages.

    Args:
        predictor: a model with a box branch and a mask branch.
        image: (H, W, 3) RGB.

    Raises:
        ConfigError: if the model has no mask branch, takes proposals from a file, or finds nothing.
    """
    heads = getattr(predictor.model, "roi_heads", None)
    if heads is None or not getattr(heads, "mask_on", False):
        raise ConfigError("the model has no mask branch (MODEL.MASK_ON, MODEL.ROI_HEADS.NAME)")
    if predictor.model.proposal_generator is None:
        raise ConfigError("the model takes proposals from a file; set MODEL.LOAD_PROPOSALS False")
    pooler = heads.mask_pooler if hasattr(heads, "mask_pooler") else heads.pooler
    seen: dict[str, Any] = {}
    notes: list[tuple[nn.Module, Callable[..., None]]] = [
        (predictor.model.proposal_generator, _noting(seen, "proposals", "output")),
        (pooler, _noting(seen, "pooled", "input")),
        (heads.mask_head, _noting(seen, "masked", "input")),
    ]
    with _hooks(notes):
        predictor(np.ascontiguousarray(image[:, :, ::-1]))
    features, (found,) = seen["masked"]
    if len(found) == 0:
        raise ConfigError(
            "the model finds no object in this image, but the pictures need one: use another "
            "image, or lower MODEL.ROI_HEADS.SCORE_THRESH_TEST"
        )
    order = found.scores.argsort(descending=True, stable=True)
    found, features = found[order], features[order]
    (height, width), network_hw = image.shape[:2], found.image_size
    pixels = np.array([width / network_hw[1], height / network_hw[0]])
    maps, _ = seen["pooled"]
    proposals = seen["proposals"][0][0]
    likeliest = proposals.objectness_logits.argsort(descending=True)
    rois = found.pred_boxes.tensor
    names = predictor.metadata.get("thing_classes") if hasattr(predictor, "metadata") else None
    is_stock = isinstance(pooler, ROIPooler)
    scales = [x.spatial_scale for x in pooler.level_poolers] if is_stock else pooler.scales
    levels = assign_boxes_to_levels(
        *([Boxes(rois)], pooler.min_level, pooler.min_level + len(scales) - 1),
        *(pooler.canonical_box_size, pooler.canonical_level),
    )
    return Stages(
        image=image,
        proposals=_boxes(proposals.proposal_boxes[likeliest], pixels),
        boxes=_boxes(found.pred_boxes, pixels),
        scores=found.scores.double().cpu().numpy(),
        classes=found.pred_classes.cpu().numpy(),
        names=list(names or map(str, range(1, 1 + predictor.cfg.MODEL.ROI_HEADS.NUM_CLASSES))),
        mask_probs=found.pred_masks[:, 0].cpu(),
        rois=rois.double().cpu().numpy(),
        map_of=levels.cpu().numpy(),
        map_hws=[tuple(x.shape[2:]) for x in maps],
        strides=[1 / scale for scale in scales],
        region_features=features,
        pixels=pixels,
        classes_compete=mask_activation(heads.mask_head) is not None,
        pooled_hw=pooler.output_size,
        sampling_ratio=_sampling_ratio(pooler),
    )


def mask_activation(mask_head: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Returns the activation that makes a mask head's classes compete; None for sigmoids."""
    activation: Callable[[Tensor, Tensor], Tensor] | None = None
    if hasattr(mask_head, "class_logits"):
        activation = mask_head.losses[0].activation
    return activation


def class_probs(mask_head: Any, features: Tensor) -> Tensor:
    """Returns a mask head's probabilities for each class, (K, M, M).

    Args:
        mask_head: a mask head of this plugin or detectron2, whose activation is used.
        features: (1, C, P, P) input of the mask head.
    """
    with torch.no_grad():
        own = hasattr(mask_head, "class_logits")
        logits: Tensor = (mask_head.class_logits if own else mask_head.layers)(features)
        activation = mask_activation(mask_head)
        if activation is None:
            return logits[0].sigmoid().cpu()
        classes = torch.arange(logits.shape[1], device=logits.device)
        return activation(logits.expand(len(classes), -1, -1, -1), classes).cpu()


def features_of_box(predictor: BGRPredictor, image: ByteArray, box: FloatArray, k: int) -> Tensor:
    """Returns the input of a model's mask head for a box that another model found.

    Args:
        predictor: a model with a mask branch.
        image: (H, W, 3) RGB.
        box: (4,) XYXY in pixels of the network's input.
        k: class of the box.

    Returns:
        (1, C, P, P) features.
    """
    model, seen = predictor.model, dict[str, Any]()
    inner = model.inference

    def given(inputs: list[dict[str, Any]], *_: Any, **__: Any) -> Any:
        instances = Instances(tuple(inputs[0]["image"].shape[1:]))
        instances.pred_boxes = Boxes(torch.as_tensor(box[None], dtype=torch.float32))
        instances.pred_classes = torch.tensor([k])
        return inner(inputs, [instances], do_postprocess=False)

    model.inference = given
    try:
        with _hooks([(model.roi_heads.mask_head, _noting(seen, "masked", "input"))]):
            predictor(np.ascontiguousarray(image[:, :, ::-1]))
    finally:
        del model.inference
    features: Tensor = seen["masked"][0]
    return features


def _noting(seen: dict[str, Any], name: str, what: str) -> Callable[..., None]:
    def note(_: nn.Module, inputs: Any, output: Any) -> None:
        # Copied, because postprocessing scales the boxes of detections in place.
        seen[name] = copy.deepcopy(inputs if what == "input" else output)

    return note


@contextlib.contextmanager
def _hooks(notes: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(note) for module, note in notes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sampling_ratio(pooler: Any) -> int:
    """Returns the sampling ratio of this plugin's or detectron2's pooler; 0 if it has none."""
    first = pooler.level_poolers[0] if isinstance(pooler, ROIPooler) else pooler
    return int(getattr(first, "sampling_ratio", 0))


def _boxes(boxes: Boxes, pixels: FloatArray) -> FloatArray:
    scaled: FloatArray = boxes.tensor.double().cpu().numpy() * np.tile(pixels, 2)
    return scaled
