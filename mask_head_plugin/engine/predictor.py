"""detectron2's DefaultPredictor with weights and class names that belong together."""

from __future__ import annotations

from dataclasses import replace

import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.engine import DefaultPredictor

from ..class_names import class_names_of
from ..config import ConfigError
from .checkpoint import MaskHeadCheckpointer
from .weights import WeightsPolicy


def load_predictor(cfg: CfgNode) -> DefaultPredictor:
    """Returns detectron2's predictor for BGR images, with MODEL.WEIGHTS of any of our formats.

    Its ``metadata.thing_classes`` are the names of the classes that it predicts: those that the
    weights name, or for weights without names those of the first data set of DATASETS.TEST, or else
    TRAIN. There are none if that has another number of classes. No data set need be registered or
    on this machine.

    Args:
        cfg: of the model; not changed.

    Raises:
        ConfigError: if there are no weights, or they cannot be read or do not fill the model.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: name the file of a trained model")
    bare = cfg.clone()
    bare.defrost()
    bare.MODEL.WEIGHTS = ""  # its own checkpointer reads no safetensors
    predictor = DefaultPredictor(bare)
    policy = WeightsPolicy.of_predictor(cfg.DATASETS, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    # A model without masks may take weights with them.
    policy = replace(policy, strict=cfg.MODEL.WEIGHTS_STRICT, whole=True, surplus=True)
    try:
        MaskHeadCheckpointer(predictor.model, policy=policy).load(cfg.MODEL.WEIGHTS)
    except (OSError, AssertionError) as error:
        raise ConfigError(f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: {error}") from error
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":  # faster so, see Trainer.build_model
        predictor.model.to(memory_format=torch.channels_last)
    names = class_names_of(predictor.model) or policy.class_names
    if list(getattr(predictor, "metadata", Metadata()).get("thing_classes", ())) != names:
        predictor.metadata = Metadata()
        if names:
            predictor.metadata.thing_classes = list(names)
    return predictor
