"""Builds the model of a config twice, with stock detectron2 and with the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY, build_model

from ..checkpoint import MaskHeadCheckpointer, WeightsPolicy
from ..config import DEFAULT_LOSSES, ConfigError
from ..config_check import check_config
from ..modeling.mask_head import ClassSelection
from ..user_code import load_config_and_code
from .lazy_twins import build_lazy_pair, load_lazy_model_config
from .zoo import ModelConfig

STOCK_NAMES = {
    "MaskRCNN": "GeneralizedRCNN",
    "PerClassMaskROIHeads": "StandardROIHeads",
    "PerClassMaskRes5ROIHeads": "Res5ROIHeads",
    "FCNMaskHead": "MaskRCNNConvUpsampleHead",
}
"""The plugin's modules and the detectron2 modules that they replace."""
PLUGIN_NAMES = {stock: plugin for plugin, stock in STOCK_NAMES.items()}


@dataclass(frozen=True)
class Twins:
    """Two models in evaluation mode with the same weights.

    Attributes:
        cfg: the plugin's config.
        stock: detectron2's model.
        plugin: the plugin's model.
        num_tensors: number of parameters and buffers loaded into each model.
        num_values: number of values in these tensors.
    """

    cfg: CfgNode
    stock: torch.nn.Module
    plugin: torch.nn.Module
    num_tensors: int
    num_values: int


def load_model_config(config: ModelConfig, opts: Sequence[str]) -> CfgNode:
    """Loads a config and adds the plugin's keys.

    If the config comes from the zoo, the plugin's model returns masks as run lengths.

    Args:
        config: result of ``zoo.find_config``.
        opts: "KEY VALUE" pairs in one flat list.

    Raises:
        ConfigError: if the config cannot be read or has no masks, or an option cannot be used.
    """
    if config.is_lazy:
        return load_lazy_model_config(config.file, opts)
    defaults = ["MODEL.MASK_OUTPUT", "rle"] if config.is_zoo_file else []
    cfg = load_config_and_code(config.file, [*defaults, *opts])
    if not cfg.MODEL.MASK_ON:
        raise ConfigError(f"MODEL.MASK_ON is False in {config.file}, so it has no masks to compare")
    return cfg


def twin_configs(cfg: CfgNode) -> tuple[CfgNode, CfgNode]:
    """Returns two versions of a config: with detectron2's modules and with the plugin's modules.

    Args:
        cfg: a config with modules of detectron2 or of the plugin.

    Raises:
        ConfigError: if a setting has no counterpart in detectron2.
    """
    stock, plugin = _renamed(cfg, STOCK_NAMES), _renamed(cfg, PLUGIN_NAMES)
    if plugin.MODEL.META_ARCHITECTURE != "MaskRCNN":
        plugin.MODEL.MASK_OUTPUT = "bitmask"
    stock.MODEL.MASK_OUTPUT = "bitmask"
    head = stock.MODEL.ROI_MASK_HEAD
    if issubclass(ROI_MASK_HEAD_REGISTRY.get(head.NAME), ClassSelection):
        raise ConfigError(f"MODEL.ROI_MASK_HEAD.NAME {head.NAME} has no counterpart in detectron2")
    head.LOSS_WEIGHT = 1.0  # affects training only
    if not any(entry[0] == "softmax_cross_entropy" for entry in head.LOSSES):
        # Of all losses, only the softmax changes inference.
        head.LOSSES = [list(term) for term in DEFAULT_LOSSES]
    check_config(plugin, train=False)
    try:
        check_config(stock, train=False)
    except ConfigError as error:
        raise ConfigError(f"the stock model to compare with cannot be built: {error}") from error
    return stock, plugin


def _renamed(cfg: CfgNode, names: dict[str, str]) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""  # weights are passed separately
    cfg.MODEL.META_ARCHITECTURE = names.get(
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE
    )
    for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_MASK_HEAD):
        node.NAME = names.get(node.NAME, node.NAME)
    return cfg


def load_twins(cfg: CfgNode, weights: Path, lazy_file: str = "") -> Twins:
    """Builds both models and loads the same weights into each.

    Both models keep detectron2's memory layout, so the layout causes no differences.

    Args:
        cfg: a config with modules of detectron2 or of the plugin.
        weights: a file in any format that MaskHeadCheckpointer reads.
        lazy_file: the LazyConfig that defines the models, if any. ``cfg`` must then contain its
            settings.

    Raises:
        ConfigError: if a model cannot be built, or the weights do not fit the models exactly. The
            message names the parameters that are missing, left over or of the wrong shape.
    """
    if lazy_file:
        models = build_lazy_pair(lazy_file, cfg)
    else:
        stock_cfg, cfg = twin_configs(cfg)
        models = [build_model(stock_cfg), build_model(cfg)]
    for model in models:
        load_exactly(model.eval(), weights, cfg)
    states = [model.state_dict() for model in models]
    differing = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert list(states[0]) == list(states[1]) and not differing, differing
    num_values = sum(x.numel() for x in states[0].values())
    return Twins(cfg, models[0], models[1], len(states[0]), num_values)


def load_exactly(model: torch.nn.Module, weights: Path, cfg: CfgNode) -> None:
    """Loads weights that must contain every tensor of the model and nothing else.

    Rows of weights that belong to classes are put into the class order of the first test data set.

    Raises:
        ConfigError: if the weights do not fit, or the file cannot be read.
    """
    policy = WeightsPolicy.from_config(cfg, train=False)
    policy = replace(policy, strict=True, advice="use weights trained with this config")
    try:
        MaskHeadCheckpointer(model, policy=policy).load(str(weights))
    except (ConfigError, OSError, AssertionError) as error:
        raise ConfigError(f"--weights: {error}") from error
