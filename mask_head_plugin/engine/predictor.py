"""A detectron2 DefaultPredictor whose class names match its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from PIL import Image

from ..checkpoint import MaskHeadCheckpointer, WeightsPolicy
from ..class_names import class_names_of
from ..config import ConfigError
from ..evaluation.drawing import ByteArray
from ..image_files import in_format
from ..model_input import is_scaled_down
from ..modeling import to_channels_last


class BGRPredictor(DefaultPredictor):
    """A DefaultPredictor that takes BGR images of any size, regardless of INPUT.FORMAT.

    Differs from detectron2: it supports L and YUV-BT.601, and it scales huge images to
    INPUT.MAX_SIZE_TEST when INPUT.MIN_SIZE_TEST 0 would keep their size.
    """

    def __init__(self, cfg: CfgNode) -> None:
        converted = cfg.clone()
        converted.defrost()
        # detectron2 supports only BGR and RGB. With BGR, it leaves the conversion to __call__.
        converted.INPUT.FORMAT = "BGR"
        super().__init__(converted)
        self.cfg = cfg.clone()

    def __call__(self, original_image: ByteArray) -> dict[str, Any]:
        """Returns the model's output for a (H, W, 3) BGR image."""
        shortest, longest = self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST
        if self.scales_down(*original_image.shape[:2]):
            shortest = longest
        self.aug = ResizeShortestEdge([shortest, shortest], longest)
        as_rgb = Image.fromarray(np.ascontiguousarray(original_image[:, :, ::-1]))
        seen = in_format(as_rgb, self.cfg.INPUT.FORMAT)
        output: dict[str, Any] = super().__call__(seen)
        return output

    def scales_down(self, height: int, width: int) -> bool:
        """Returns whether a huge image is scaled down even though INPUT.MIN_SIZE_TEST is 0.

        Args:
            height: in pixels.
            width: in pixels.
        """
        sizes = self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST
        return is_scaled_down((height, width), *sizes)


def load_predictor(cfg: CfgNode) -> BGRPredictor:
    """Returns detectron2's predictor for BGR images; MODEL.WEIGHTS may have any supported format.

    ``metadata.thing_classes`` contains the names of the predicted classes. They come from the
    weights. If the weights have no names, they come from the first data set in DATASETS.TEST or,
    failing that, in TRAIN. Only a data set with as many classes as the model is used. Data sets do
    not have to be registered or present on this machine.

    Args:
        cfg: the model's config; not changed.

    Raises:
        ConfigError: if weights are missing, cannot be read or do not cover the whole model.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: set it to the weights of a trained model")
    bare = cfg.clone()
    bare.defrost()
    bare.MODEL.WEIGHTS = ""  # loaded below; detectron2's checkpointer cannot read safetensors
    predictor = BGRPredictor(bare)
    policy = WeightsPolicy.of_predictor(cfg.DATASETS, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    # A model without masks may load weights that include a mask head.
    policy = replace(policy, strict=cfg.MODEL.WEIGHTS_STRICT, whole=True, surplus=True)
    try:
        MaskHeadCheckpointer(predictor.model, policy=policy).load(cfg.MODEL.WEIGHTS)
    except (OSError, AssertionError) as error:
        raise ConfigError(f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: {error}") from error
    to_channels_last(predictor.model)  # as Trainer.build_model does
    names = class_names_of(predictor.model) or policy.class_names
    if list(getattr(predictor, "metadata", Metadata()).get("thing_classes", ())) != names:
        predictor.metadata = Metadata()
        if names:
            predictor.metadata.thing_classes = list(names)
    return predictor
