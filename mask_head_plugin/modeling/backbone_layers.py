"""Assigns the parameters of a pretrained backbone to layers, counted from the input.

In detectron2's ResNets and RegNets, a layer is a stage. In timm's models, a layer is a block, as
defined by the model's ``group_matcher``.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..config import ConfigError

_STAGE = re.compile(r"(?:backbone(?:\.bottom_up)?|roi_heads)\.(?:stem|(?:res|s)(\d+))\.")
"""Matches the start of the parameter names of a stage in detectron2's RegNets and ResNets.

The ROI heads are included because they may contain a ResNet's res5.
"""


def backbone_layers(model: nn.Module) -> dict[str, int]:
    """Returns the layer of each backbone parameter. Layers are numbered from 0 at the input.

    Args:
        model: a detector whose backbone is one of detectron2's ResNets or RegNets, or a timm model.

    Returns:
        The layer by parameter name. Parameters that are added to the backbone, such as those of an
        FPN, are left out.

    Raises:
        ConfigError: if the layers of the backbone are unknown.
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
    """Returns the names of parameters that timm exempts from weight decay, such as position
    embeddings.
    """
    whole, names = _timm_names(model)
    told = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()
    return {name for name, original in names.items() if original in told}


def _timm_layers(model: nn.Module) -> dict[str, int]:
    whole, names = _timm_names(model)
    if not hasattr(whole, "group_matcher"):
        kind = type(whole or getattr(model, "backbone", model)).__name__
        raise ConfigError(
            "SOLVER.LAYER_DECAY supports detectron2's ResNets and RegNets, and timm's models with "
            f"a group_matcher, but not the backbone {kind}; set LAYER_DECAY to 1.0, or use "
            "SOLVER.LR_FACTORS, which supports any module"
        )
    from timm.models import group_parameters

    matcher = whole.group_matcher(coarse=False)
    layers: dict[str, int] = group_parameters(whole, matcher, reverse=True)
    return {name: layers[original] for name, original in names.items()}


def _timm_names(model: nn.Module) -> tuple[Any, dict[str, str]]:
    """Returns the full timm model that a detector's backbone is part of, and its parameter names.

    The full model is needed because timm's feature extractors rename parameters and have no
    group_matcher.

    Returns:
        The full model on the meta device, and timm's name for each of the detector's parameter
        names. If the backbone does not come from timm, None and an empty dict.
    """
    named = model.named_modules()
    trunks = (x for x in named if hasattr(x[1], "feature_info") and hasattr(x[1], "pretrained_cfg"))
    prefix, trunk = next(trunks, ("", None))
    if trunk is None:
        return None, {}
    import timm  # an optional dependency, which is installed if a backbone comes from it

    with torch.device("meta"):
        whole = timm.create_model(trunk.pretrained_cfg["architecture"])
    originals = {alias: name for name, _ in whole.named_parameters() for alias in _aliases(name)}
    own = {name: f"{prefix}.{name}".removeprefix(".") for name, _ in trunk.named_parameters()}
    return whole, {own[name]: originals[name] for name in own if name in originals}


def _aliases(name: str) -> tuple[str, ...]:
    """Returns all names that a parameter may have in timm's feature extractors."""
    return name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}"
