"""detectron2's DefaultPredictor with weights and class names that belong together."""

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
    """DefaultPredictor for BGR images of any size, whatever INPUT.FORMAT is.

    Differs from detectron2's: it knows L and YUV-BT.601, and it scales huge images to
    INPUT.MAX_SIZE_TEST where INPUT.MIN_SIZE_TEST 0 would keep their size.
    """

    def __init__(self, cfg: CfgNode) -> None:
        converted = cfg.clone()
        converted.defrost()
        converted.INPUT.FORMAT = "BGR"  # passed on as it is; detectron2 refuses all but BGR and RGB
        super().__init__(converted)
        self.cfg = cfg.clone()

    def __call__(self, original_image: ByteArray) -> dict[str, Any]:
        """Returns the model's output for a (H, W, 3) BGR image."""
        shortest, longest = self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST
        if self.scales_down(*original_image.shape[:2]):
            shortest = longest
        self.aug = ResizeShortestEdge([shortest, shortest], longest)
        as_rgb = Image.fromarray(np.ascontiguousarray(original_image[:, :, ::-1]))
        seen = in_format(as_rgb, self.cfg.INPUT.FORMAT)  # also Pillow's other modes
        output: dict[str, Any] = super().__call__(seen)
        return output

    def scales_down(self, height: int, width: int) -> bool:
        """Returns whether an image is scaled to INPUT.MAX_SIZE_TEST although sizes are kept.

        Args:
            height: in pixels.
            width: in pixels.
        """
        sizes = self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST
        return is_scaled_down((height, width), *sizes)


def load_predictor(cfg: CfgNode) -> BGRPredictor:
    """Returns detectron2's predictor for BGR images, with MODEL.WEIGHTS of any of our formats.

    Its ``metadata.thing_classes`` names the classes that it predicts: those of the weights or, for
    weights without names, those of the first data set of DATASETS.TEST, or else TRAIN. They are
    unknown if that data set has another number of classes. Data sets need not be registered or on
    this machine.

    Args:
        cfg: of the model; not changed.

    Raises:
        ConfigError: if weights are missing, cannot be read or do not fill the model.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: name the file of a trained model")
    bare = cfg.clone()
    bare.defrost()
    bare.MODEL.WEIGHTS = ""  # its own checkpointer reads no safetensors
    predictor = BGRPredictor(bare)
    policy = WeightsPolicy.of_predictor(cfg.DATASETS, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    # A model without masks may take weights with them.
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
