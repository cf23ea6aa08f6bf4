"""Backbones from timm, with or without a feature pyramid.

Maps are named by their stride, as in detectron2's ResNets: ``res2`` (4 pixels) to ``res5`` (32).
The heads and the pyramid of a ResNet config therefore work unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import ConfigError
from ..messages import one_line
from ..shared_names import register_in
from .timm_model import Level, TimmModel, gives_nhwc, timm_part
from .timm_weights import build_pretrained

NORMS = ("", "FrozenBN", "SyncBN")


@register_in(BACKBONE_REGISTRY)
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builds a timm model with an FPN on top: p2 to p6, or fewer levels if IN_FEATURES is set.

    A plain vision transformer has a single map of stride 16. Instead of an FPN, it gets the simple
    feature pyramid of ViTDet (arXiv 2203.16527), which also has the levels p2 to p6.

    If MODEL.WEIGHTS is empty, the backbone's weights come from MODEL.TIMM.CHECKPOINT or, with
    PRETRAINED, from timm's hub. Otherwise, MODEL.WEIGHTS includes the backbone's weights.

    Args:
        cfg: the keys read are MODEL.TIMM; BACKBONE.FREEZE_AT, see ``freeze_stages``; and all keys
            of FPN, where an empty IN_FEATURES means all maps of stride 4 and above.
        input_shape: only the number of image channels is read.

    Raises:
        ConfigError: if timm or the model is missing, the model does not have the required maps, or
            the weights cannot be read or belong to another model.
    """
    fpn = cfg.MODEL.FPN
    model = TimmModel.probe(cfg.MODEL.TIMM.NAME, input_shape.channels)
    bottom_up = _build(cfg, model, "MODEL.FPN.IN_FEATURES", list(fpn.IN_FEATURES))
    if model.is_plain:
        return SimplePyramid(bottom_up, model.name, fpn.OUT_CHANNELS, fpn.NORM or "LN")
    return FPN(
        bottom_up=bottom_up,
        in_features=list(fpn.IN_FEATURES) or list(bottom_up.output_shape()),
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )


@register_in(BACKBONE_REGISTRY)
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Builds a timm model whose maps feed the heads directly, such as the single map of DC5.

    Args:
        cfg: the keys read are MODEL.TIMM and BACKBONE.FREEZE_AT, as in ``build_timm_fpn_backbone``;
            RESNETS.OUT_FEATURES, the names of the maps; and RESNETS.RES5_DILATION, where 2 keeps
            res5 at a stride of 16.
        input_shape: only the number of image channels is read.

    Raises:
        ConfigError: as in ``build_timm_fpn_backbone``, or if the model cannot be dilated.
    """
    resnets = cfg.MODEL.RESNETS
    model = TimmModel.probe(cfg.MODEL.TIMM.NAME, input_shape.channels)
    if resnets.RES5_DILATION not in (1, 2):
        raise ConfigError(f"MODEL.RESNETS.RES5_DILATION {resnets.RES5_DILATION} is neither 1 nor 2")
    if resnets.RES5_DILATION == 2:
        model = model.dilated()
    return _build(cfg, model, "MODEL.RESNETS.OUT_FEATURES", list(resnets.OUT_FEATURES))


def _build(cfg: CfgNode, model: TimmModel, key: str, names: list[str]) -> TimmBackbone:
    """Builds a timm model, loads its weights and freezes its first stages.

    Args:
        cfg: the config passed to the builders.
        model: the model to build.
        key: the config key that lists the maps, for error messages.
        names: the value of this key; an empty list means all maps.
    """
    keys = cfg.MODEL.TIMM
    if keys.NORM not in NORMS:
        raise ConfigError(f"MODEL.TIMM.NORM {keys.NORM!r} is not one of {NORMS}")
    if not 0 <= keys.DROP_PATH_RATE < 1:
        raise ConfigError(f"MODEL.TIMM.DROP_PATH_RATE {keys.DROP_PATH_RATE} is not in [0, 1)")
    levels = _chosen_levels(model, list(keys.OUT_INDICES), key, names)
    arguments: dict[str, Any] = {"out_indices": [level.out_index for level in levels]}
    if keys.DROP_PATH_RATE:
        arguments["drop_path_rate"] = keys.DROP_PATH_RATE
    source = _pretrained_source(cfg)
    try:
        net = build_pretrained(model, source, **arguments) if source else model.build(**arguments)
    except TypeError as error:  # DROP_PATH_RATE is the only argument that the probe did not pass
        raise ConfigError(
            f"MODEL.TIMM.DROP_PATH_RATE: {model.name} has no stochastic depth ({one_line(error)}); "
            "set it to 0"
        ) from error
    if keys.NORM == "FrozenBN":
        net = timm_part("layers").freeze_batch_norm_2d(net)
    elif keys.NORM == "SyncBN":
        net = timm_part("layers").convert_sync_batchnorm(net)
    freeze_stages(net, model.levels, cfg.MODEL.BACKBONE.FREEZE_AT)
    return TimmBackbone(net, levels)


class TimmBackbone(Backbone):
    """A timm model, built with ``features_only``, as a detectron2 backbone.

    ``forward`` takes normalised images (N, C, H, W) whose H and W are multiples of the largest
    stride. It returns maps (N, channels, H / stride, W / stride) by name. They are in NCHW order,
    even if timm's model uses NHWC.
    """

    def __init__(self, net: nn.Module, levels: Sequence[Level]) -> None:
        """
        Args:
            net: timm's model, which returns a list with one map per level.
            levels: the levels of these maps, in order of increasing stride.
        """
        super().__init__()
        self.net = net
        self._out_features = [level.name for level in levels]
        self._out_feature_channels = {level.name: level.channels for level in levels}
        self._out_feature_strides = {level.name: level.stride for level in levels}
        self._is_nhwc = gives_nhwc(net)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        for index, features in enumerate(self.net(x)):  # torch.jit.script has no zip(strict=True)
            if self._is_nhwc:
                features = features.permute(0, 3, 1, 2)
            maps[self._out_features[index]] = features
        return maps

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())


class SimplePyramid(SimpleFeaturePyramid):
    """detectron2's simple feature pyramid, p2 to p6, for images of any size.

    Differs from detectron2: this class declares that image sides must be padded to a multiple of
    the largest stride. detectron2's pyramid works only for square images, because its
    padding_constraints use the misspelt key "size_divisiblity", which nothing reads.
    """

    def __init__(self, net: TimmBackbone, name: str, out_channels: int, norm: str) -> None:
        """
        Args:
            net: returns one map of stride 16.
            name: the model's name, for error messages.
            out_channels: channels of the pyramid's maps.
            norm: normalisation of the pyramid's convolutions, see detectron2.layers.get_norm.

        Raises:
            ConfigError: if the stride of the map is not 16.
        """
        (map_name, shape), *_ = net.output_shape().items()
        if shape.stride != 16:
            raise ConfigError(
                f"MODEL.TIMM.NAME {name} has only maps of stride {shape.stride}, but the pyramid "
                f"of a plain transformer needs stride 16; use another model, such as "
                "vit_small_patch16_224 or swin_tiny_patch4_window7_224"
            )
        top = LastLevelMaxPool()
        super().__init__(net, map_name, out_channels, (4.0, 2.0, 1.0, 0.5), top, norm)

    @property
    def size_divisibility(self) -> int:
        return int(self._size_divisibility)

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {}


def _chosen_levels(model: TimmModel, indices: list[int], key: str, names: list[str]) -> list[Level]:
    """Returns the levels with the given indices; without indices, all levels of stride 4 and above.

    If ``names`` is not empty, returns only levels with these names. If several levels have the same
    name, returns the last of them.

    Raises:
        ConfigError: if the model does not have the requested maps, or a detector cannot use them.
    """
    known = {level.out_index: level for level in model.levels}
    unknown = [index for index in indices if index not in known]
    if unknown:
        raise ConfigError(
            f"MODEL.TIMM.OUT_INDICES: {model.name} has the maps {list(known)}, of strides "
            f"{[level.stride for level in model.levels]}, not {unknown}"
        )
    chosen = [known[index] for index in indices] or [x for x in model.levels if x.stride >= 4]
    levels = {level.name: level for level in chosen}
    strides = [level.stride for level in chosen]
    if not levels or "" in levels:
        raise ConfigError(
            f"MODEL.TIMM.NAME {model.name} has maps of strides {strides}, but a detector needs "
            f"4, 8, 16 or 32; use another model, such as convnext_tiny"
        )
    if indices and len(levels) < len(indices):
        raise ConfigError(
            f"MODEL.TIMM.OUT_INDICES {indices} have strides {strides}; choose one index per stride"
        )
    missing = [name for name in names if name not in levels]
    if missing:
        raise ConfigError(f"{key}: {model.name} has the maps {list(levels)}, not {missing[0]!r}")
    return [level for name, level in levels.items() if not names or name in names]


def _pretrained_source(cfg: CfgNode) -> str:
    """Returns where to load the backbone's weights from: a path, "hub", or "" for random weights.

    Also returns "" if MODEL.WEIGHTS includes them, or if the model is only built to be checked.
    """
    checkpoint, is_pretrained = cfg.MODEL.TIMM.CHECKPOINT, cfg.MODEL.TIMM.PRETRAINED
    is_tried_out = torch.get_default_device().type == "meta"
    if cfg.MODEL.WEIGHTS or is_tried_out:
        return ""
    return checkpoint or ("hub" if is_pretrained else "")


def freeze_stages(net: nn.Module, levels: Sequence[Level], freeze_at: int) -> None:
    """Freezes the first stages of a model. Stages are numbered as in detectron2's ResNets.

    Args:
        net: timm's model without its classifier; changed in place. Batch norms in frozen stages are
            replaced by norms that always use their running statistics.
        levels: all maps of the model.
        freeze_at: 0 freezes nothing, and 1 freezes everything before the stage of stride 4. If it
            is k >= 2, everything up to the end of res<k>, the stage of stride 2^k, is frozen. In a
            plain transformer, 1 to 3 freeze the embedding, and 4 or more freeze everything.
    """
    if freeze_at < 1:
        return
    parameters = list(net.named_parameters())
    names = [f"res{k}" for k in range(2, freeze_at + 1)]
    inner = [level for level in levels if level.name in names]
    if inner:
        last = _positions(net, parameters, inner[-1])[-1]
    else:
        first = next(level for level in levels if level.stride >= 4)
        # A plain transformer: timm lists only its last blocks, but the first block is needed here.
        if len({level.stride for level in levels}) == 1:
            first = first._replace(module=first.module.partition(".")[0])
        last = _positions(net, parameters, first)[0] - 1
    for _, parameter in parameters[: last + 1]:
        parameter.requires_grad = False
    norms = [
        name
        for name, module in net.named_modules()
        if isinstance(module, _BatchNorm) and not any(x.requires_grad for x in module.parameters())
    ]
    if norms:
        timm_part("utils").freeze(net, norms)


def _positions(
    net: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]], level: Level
) -> list[int]:
    """Returns the indices in ``parameters`` of the parameters of a map's module.

    Raises:
        ConfigError: if the module has no parameters, or timm does not expose it.
    """
    flat = level.module.replace(".", "_")  # some timm wrappers flatten names, others add a prefix
    own = [x for x in (level.module, flat, f"model.{level.module}") if _has_module(net, x)]
    found = [k for k, (name, _) in enumerate(parameters) if own and name.startswith(f"{own[0]}.")]
    if not found:
        raise ConfigError(
            "MODEL.BACKBONE.FREEZE_AT must be 0, because timm does not reveal where the stages of "
            "this model end; to change the backbone only slightly, give it a small factor in "
            "SOLVER.LR_FACTORS"
        )
    return found


def _has_module(net: nn.Module, name: str) -> bool:
    return any(found == name for found, _ in net.named_modules())
