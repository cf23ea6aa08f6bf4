"""Builds the stock model and the plugin's model of a LazyConfig.

The settings of the LazyConfig are converted to the form of a YAML config.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf

from ..config import ConfigError, flatten, read_config
from ..lazy_config import (
    SETTINGS,
    calls,
    load_lazy_config,
    settings_of,
    use_plugin_modules,
    use_stock_modules,
)
from ..user_code import load_config_and_code

PREDICTOR_SETTINGS = {
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": ("test_score_thresh", 0.0),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": ("test_nms_thresh", 0.5),
    "TEST.DETECTIONS_PER_IMAGE": ("test_topk_per_image", 100),
}
"""Keys of a YAML config with the corresponding arguments of box predictors and their defaults."""

SIZE_SETTINGS = {"INPUT.MIN_SIZE_TEST": "short_edge_length", "INPUT.MAX_SIZE_TEST": "max_size"}
CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES"
READ_SECTIONS = ("DATASETS.", "DATALOADER.", "IMPORTS", "OUTPUT_DIR", "MODEL.DEVICE")
"""Keys or prefixes of keys that a comparison reads for any model."""


def load_lazy_model_config(file: str, opts: Sequence[str]) -> CfgNode:
    """Returns the settings of a LazyConfig model in the form of a YAML config.

    Args:
        file: a LazyConfig of detectron2 or this plugin, whose code is executed.
        opts: "KEY VALUE" pairs in one flat list, for keys that a comparison reads.

    Raises:
        ConfigError: if the file or an option cannot be used, or the model has no masks.
    """
    lazy = load_lazy_config(file)
    use_plugin_modules(lazy.model)  # called only to raise errors early
    pairs = ["MODEL.MASK_OUTPUT", lazy.model.get("mask_output", "rle"), *settings_of(lazy)]
    predictor = _box_predictors(lazy)[0]
    for key, (argument, default) in PREDICTOR_SETTINGS.items():
        pairs += [key, str(predictor.get(argument, default))]
    resize = _resize(lazy, file)
    for key, argument in SIZE_SETTINGS.items():
        pairs += [key, str(resize[argument])]
    pairs += ["MODEL.WEIGHTS", ""]  # weights are passed separately
    cfg = load_config_and_code("", [*pairs, *opts])
    before, after = flatten(read_config(opts=pairs)), flatten(cfg)
    known = {*PREDICTOR_SETTINGS, *SIZE_SETTINGS, CLASSES, "MODEL.MASK_OUTPUT"}
    for key, value in after.items():
        if value != before[key] and key not in known and not key.startswith(READ_SECTIONS):
            raise ConfigError(
                f"option {key}: {file} is a LazyConfig, which lacks this key; for its model, you "
                f"can set {', '.join(sorted(known))}"
            )
    return cfg


def build_lazy_pair(file: str, cfg: CfgNode) -> list[torch.nn.Module]:
    """Builds the model of a LazyConfig with detectron2's modules and with the plugin's modules.

    Args:
        file: see ``load_lazy_model_config``.
        cfg: result of ``load_lazy_model_config``.

    Raises:
        ConfigError: if the model has no stock counterpart.
    """
    lazy = load_lazy_config(file)
    OmegaConf.update(lazy, SETTINGS[CLASSES], cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    values = flatten(cfg)
    for predictor in _box_predictors(lazy):
        for key, (argument, _) in PREDICTOR_SETTINGS.items():
            predictor[argument] = values[key]
    stock = instantiate_or_refuse(use_stock_modules(lazy.model))
    plugin = instantiate(use_plugin_modules(lazy.model))
    if hasattr(plugin, "mask_output"):
        plugin.mask_output = cfg.MODEL.MASK_OUTPUT
    return [model.to(cfg.MODEL.DEVICE) for model in (stock, plugin)]


def instantiate_or_refuse(model: DictConfig) -> torch.nn.Module:
    """Builds a stock model.

    Raises:
        ConfigError: if an argument exists only in the plugin's modules.
    """
    try:
        built: torch.nn.Module = instantiate(model)
    except TypeError as error:
        raise ConfigError(f"the stock model to compare with cannot be built: {error}") from error
    return built


def _box_predictors(lazy: DictConfig) -> list[DictConfig]:
    heads = lazy.model.roi_heads
    return list(heads.box_predictors) if "box_predictors" in heads else [heads.box_predictor]


def _resize(lazy: DictConfig, file: str) -> DictConfig:
    """Returns the only augmentation in evaluation, which must be a ResizeShortestEdge."""
    found = list(calls(lazy.dataloader.test.mapper.augmentations))
    if [x._target_ for x in found] != [T.ResizeShortestEdge]:
        raise ConfigError(
            f"{file}: dataloader.test.mapper.augmentations must be a single ResizeShortestEdge; "
            "a comparison supports no other augmentation"
        )
    return found[0]
