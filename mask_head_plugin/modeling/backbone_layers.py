"""Maps the parameters of a pretrained backbone to its layers, counted from the input.

A layer is a stage in detectron2's ResNets and RegNets, and a block in timm's models, by their
``group_matcher``.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..config import ConfigError

_STAGE = re.compile(r"(?:backbone(?:\.bottom_up)?|roi_heads)\.(?:stem|(?:res|s)(\d+))\.")
"""How names start in detectron2's ResNets (also with res5 in the ROI heads) and RegNets."""


def backbone_layers(model: nn.Module) -> dict[str, int]:
    """Returns the layer of each parameter of a model's backbone, counted from its input, from 0.

    Args:
        model: a detector; its backbone is one of detectron2's ResNets or RegNets, or timm's.

    Returns:
        Layers by name of the parameter, without parameters that are added to the backbone, such as
        an FPN's.

    Raises:
        ConfigError: if the layers of the backbone are not known.
    """
    layers = {
        name: int(found[1] or 0)
        for name, _ in model.named_parameters()
        if (found := _STAGE.match(name))
    }
    if not layers:
        layers = _timm_layers(model)
    rank = {number: k for k, number in enumerate(sorted(set(layers.values())))}
    return {name: rank[number] for name, number in layers.items()}


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Returns the names of parameters that timm exempts from weight decay, such as positions."""
    whole, names = _timm_names(model)
    told = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()
    return {name for name, original in names.items() if original in told}


def _timm_layers(model: nn.Module) -> dict[str, int]:
    whole, names = _timm_names(model)
    if not hasattr(whole, "group_matcher"):
        kind = type(whole or getattr(model, "backbone", model)).__name__
        raise ConfigError(
            f"SOLVER.LAYER_DECAY needs to know the layers of the backbone, but those of {kind} are "
            f"unknown: only those of detectron2's ResNets and RegNets, and of timm's models with a "
            f"group_matcher, are known. Set it to 1.0; SOLVER.LR_FACTORS takes any module"
        )
    from timm.models import group_parameters

    matcher = whole.group_matcher(coarse=False)
    layers: dict[str, int] = group_parameters(whole, matcher, reverse=True)
    return {name: layers[original] for name, original in names.items()}


def _timm_names(model: nn.Module) -> tuple[Any, dict[str, str]]:
    """Returns the timm model that a detector uses in part, and the names of the used parameters.

    timm's feature extractors rename a model's parameters and lack group_matcher.

    Returns:
        The whole model, without memory, and its names by the detector's names. None without timm.
    """
    named = model.named_modules()
    trunks = (x for x in named if hasattr(x[1], "feature_info") and hasattr(x[1], "pretrained_cfg"))
    prefix, trunk = next(trunks, ("", None))
    if trunk is None:
        return None, {}
    import timm  # an extra; a timm model implies that it is installed

    with torch.device("meta"):
        whole = timm.create_model(trunk.pretrained_cfg["architecture"])
    originals = {alias: name for name, _ in whole.named_parameters() for alias in _aliases(name)}
    own = {name: f"{prefix}.{name}".removeprefix(".") for name, _ in trunk.named_parameters()}
    return whole, {own[name]: originals[name] for name in own if name in originals}


def _aliases(name: str) -> tuple[str, ...]:
    """Returns the names that timm's feature extractors give a parameter."""
    return name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}"
