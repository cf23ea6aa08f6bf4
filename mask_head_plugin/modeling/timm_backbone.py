"""Backbones of timm, with their ImageNet weights, under a feature pyramid.

Maps have the names of detectron2's ResNets, by stride: ``res2`` (4 pixels) to ``res5`` (32). A
ResNet-FPN config needs no other change than MODEL.BACKBONE.NAME and MODEL.TIMM.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import ConfigError
from ..messages import listed, nearest_name, one_line
from ..shared_names import register_in
from ..weight_files import read_checkpoint

logger = logging.getLogger(__name__)

NORMS = ("", "FrozenBN", "SyncBN")

PROBE_HW = (96, 160)
"""Pixels of the image by which it is known whether a model takes images of any size."""

ANY_SIZE: tuple[dict[str, bool], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})
"""How timm's models of a fixed size are asked to take others; each knows one of these at most."""


@register_in(BACKBONE_REGISTRY)
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a timm model and an FPN (p2 to p6, or what IN_FEATURES gives) on top of it.

    Weights come from MODEL.TIMM.CHECKPOINT or, if PRETRAINED, from timm's hub, but only where
    MODEL.WEIGHTS is empty: a detector's weights hold the backbone's.

    Args:
        cfg: MODEL.TIMM; BACKBONE.FREEZE_AT, see ``freeze_stages``; all of FPN, of which
            IN_FEATURES may be empty, for all maps from stride 4 on.
        input_shape: channels of the image.

    Raises:
        ConfigError: if timm or the model is missing, the model does not give such maps, or the
            weights cannot be read or are another model's.
    """
    fpn = cfg.MODEL.FPN
    bottom_up = build_timm_backbone(cfg, input_shape)
    return FPN(
        bottom_up=bottom_up,
        in_features=list(fpn.IN_FEATURES) or list(bottom_up.output_shape()),
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )


def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Builds the timm model of ``build_timm_fpn_backbone``, with its weights, partly frozen."""
    keys = cfg.MODEL.TIMM
    if keys.NORM not in NORMS:
        raise ConfigError(f"MODEL.TIMM.NORM {keys.NORM!r} is none of {NORMS}")
    model = TimmModel.probe(keys.NAME, input_shape.channels)
    levels = _chosen_levels(model, list(keys.OUT_INDICES), list(cfg.MODEL.FPN.IN_FEATURES))
    arguments: dict[str, Any] = {"out_indices": [level.out_index for level in levels.values()]}
    if keys.DROP_PATH_RATE:
        arguments["drop_path_rate"] = keys.DROP_PATH_RATE
    source = _pretrained_source(cfg)
    net = build_pretrained(model, source, **arguments) if source else model.build(**arguments)
    if keys.NORM == "FrozenBN":
        net = timm_part("layers").freeze_batch_norm_2d(net)
    elif keys.NORM == "SyncBN":
        net = timm_part("layers").convert_sync_batchnorm(net)
    freeze_stages(net, model.levels, cfg.MODEL.BACKBONE.FREEZE_AT)
    return TimmBackbone(net, levels)


class Level(NamedTuple):
    """One map of a timm model.

    Attributes:
        out_index: for timm's ``out_indices``.
        channels: of the map.
        stride: pixels of the image per cell.
        module: the name, in the model, of what gives it.
    """

    out_index: int
    channels: int
    stride: int
    module: str


class TimmBackbone(Backbone):
    """A timm model built with ``features_only`` as a backbone of detectron2.

    ``forward`` takes images (N, C, H, W), normalised, H and W multiples of the greatest stride, and
    returns maps (N, channels, H / stride, W / stride) by name, NCHW whatever timm's are.
    """

    def __init__(self, net: nn.Module, levels: dict[str, Level]) -> None:
        """
        Args:
            net: gives a list of maps, one for each level.
            levels: by the names of their maps, strides rising.
        """
        super().__init__()
        self.net = net
        self.levels = levels
        self._is_nhwc = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.net(x)
        if self._is_nhwc:
            maps = [features.permute(0, 3, 1, 2) for features in maps]
        return dict(zip(self.levels, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=level.channels, stride=level.stride)
            for name, level in self.levels.items()
        }

    @property
    def size_divisibility(self) -> int:
        return max(level.stride for level in self.levels.values())


class TimmModel(NamedTuple):
    """What is known of a timm model before it is built.

    Attributes:
        name: timm's.
        channels: of the image.
        size_arguments: with which timm builds it for images of any size.
        levels: its maps.
    """

    name: str
    channels: int
    size_arguments: dict[str, bool]
    levels: list[Level]

    @classmethod
    def probe(cls, name: str, channels: int) -> TimmModel:
        """Builds the model without memory and shows it a small image.

        Raises:
            ConfigError: if timm or the model is missing, or its maps are no pyramid for images of
                any size.
        """
        timm = timm_part()
        if not timm.is_model(name):
            nearest = nearest_name(name, timm.list_models())
            hint = f"did you mean {nearest}?" if nearest else "set it, e.g. to convnext_tiny"
            raise ConfigError(f"MODEL.TIMM.NAME {name!r} is no model of timm; {hint}")
        is_fixed = timm_part("models").get_pretrained_cfg(name).fixed_input_size
        for arguments in ANY_SIZE if is_fixed else ({},):
            model = cls(name, channels, arguments, [])
            try:
                with torch.device("meta"):
                    net = model.build().eval()
            except TypeError as error:  # it does not know such an argument
                if arguments:
                    continue
                raise _unfit(name, error) from error
            except (RuntimeError, AttributeError, AssertionError) as error:
                raise _unfit(name, error) from error
            break
        found = net.feature_info.get_dicts(keys=["num_chs", "reduction", "module"])
        for index, x in zip(net.feature_info.out_indices, found, strict=True):
            model.levels.append(Level(index, x["num_chs"], x["reduction"], x["module"]))
        _check_maps(model, net)
        return model

    def build(self, **arguments: Any) -> Any:
        """Returns timm's model with its features alone."""
        return timm_part().create_model(
            self.name,
            features_only=True,
            in_chans=self.channels,
            **self.size_arguments,
            **arguments,
        )


def _unfit(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"MODEL.TIMM.NAME {name} gives no maps of features ({one_line(error)}); take another "
        "model, such as convnext_tiny"
    )


def _check_maps(model: TimmModel, net: nn.Module) -> None:
    """Raises ConfigError unless maps of a small image have the sizes that their strides promise."""
    backbone = TimmBackbone(net, {str(level.out_index): level for level in model.levels})
    try:
        with torch.device("meta"), torch.no_grad():
            maps = backbone(torch.zeros(1, model.channels, *PROBE_HW))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"MODEL.TIMM.NAME {model.name} does not take images of other sizes than it was trained "
            f"on ({one_line(error)}); take another model, such as convnext_tiny"
        ) from error
    for level, features in zip(model.levels, maps.values(), strict=True):
        expected = tuple(math.ceil(side / level.stride) for side in PROBE_HW)
        if tuple(features.shape[2:]) != expected:
            raise ConfigError(
                f"MODEL.TIMM.NAME {model.name} cuts off the borders of images: its map of stride "
                f"{level.stride} is {tuple(features.shape[2:])} for {PROBE_HW} pixels, not "
                f"{expected}; take another model, such as convnext_tiny"
            )


def _chosen_levels(
    model: TimmModel, indices: list[int], in_features: list[str]
) -> dict[str, Level]:
    """Returns the levels that are asked for, by name: of each stride the last, from stride 4 on.

    Raises:
        ConfigError: naming MODEL.TIMM.OUT_INDICES or MODEL.FPN.IN_FEATURES.
    """
    known = {level.out_index: level for level in model.levels}
    unknown = [index for index in indices if index not in known]
    if unknown:
        raise ConfigError(
            f"MODEL.TIMM.OUT_INDICES: {model.name} has the maps {list(known)}, of strides "
            f"{[level.stride for level in model.levels]}, not {unknown}"
        )
    chosen = [known[index] for index in indices] or [x for x in model.levels if x.stride >= 4]
    levels = {f"res{int(math.log2(x.stride))}": x for x in chosen}
    if indices and len(levels) < len(indices):
        strides = [level.stride for level in chosen]
        raise ConfigError(f"MODEL.TIMM.OUT_INDICES {indices} have strides {strides}; take one each")
    if not levels or any(2 ** int(math.log2(x.stride)) != x.stride for x in levels.values()):
        strides = [level.stride for level in model.levels]
        raise ConfigError(
            f"MODEL.TIMM.NAME {model.name} has maps of strides {strides}, and a pyramid needs "
            "4, 8, 16, ...; take another model, such as convnext_tiny"
        )
    missing = [name for name in in_features if name not in levels]
    if missing:
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES: {model.name} gives {list(levels)}, not {missing[0]!r}"
        )
    return {name: x for name, x in levels.items() if not in_features or name in in_features}


def _pretrained_source(cfg: CfgNode) -> str:
    """Returns a path, "hub", or "" where the weights of the detector hold those of the backbone."""
    source = cfg.MODEL.TIMM.CHECKPOINT or ("hub" if cfg.MODEL.TIMM.PRETRAINED else "")
    is_tried_out = torch.get_default_device().type == "meta"
    return "" if cfg.MODEL.WEIGHTS or is_tried_out else source


def build_pretrained(model: TimmModel, source: str, **arguments: Any) -> Any:
    """Returns timm's model, filled.

    Args:
        model: what to build.
        source: "hub", or the path of a file, see ``read_backbone``.
        arguments: of ``TimmModel.build``.

    Raises:
        ConfigError: if the weights cannot be read or are another model's.
    """
    logger.info("backbone %s starts from the weights of %s", model.name, source)
    if source == "hub":
        try:
            return model.build(pretrained=True, **arguments)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"MODEL.TIMM.PRETRAINED: the weights of {model.name} could not be downloaded "
                f"({one_line(error)}); fetch them on another machine and set MODEL.TIMM.CHECKPOINT"
            ) from error
    overlay = {"state_dict": read_backbone(Path(source).expanduser(), model)}
    timm_log = logging.getLogger("timm.models._builder")
    timm_log.addFilter(_is_not_unexpected)  # the file may hold the classifier; the rest is checked
    try:
        net = model.build(pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    finally:
        timm_log.removeFilter(_is_not_unexpected)
    net.pretrained_cfg.pop("state_dict", None)  # else a copy of the weights stays in memory
    return net


def _is_not_unexpected(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Unexpected keys")


def read_backbone(path: Path, model: TimmModel) -> dict[str, Tensor]:
    """Reads weights of a timm model by timm's names; nothing in the file can run.

    Args:
        path: safetensors or a torch file, of the whole model or without its classifier.
        model: which it should be of.

    Raises:
        ConfigError: if it cannot be read, or does not have the model's names and shapes.
    """
    key = f"MODEL.TIMM.CHECKPOINT {path}"
    if not path.is_file():
        raise ConfigError(
            f"{key} does not exist; fetch it with tools/fetch_backbone.py, or save the state_dict "
            f"of timm.create_model({model.name!r}, pretrained=True) with safetensors"
        )
    found = read_checkpoint(path)["model"]
    weights = {name: torch.as_tensor(x) for name, x in found.items()}
    expected = _expected_shapes(model)
    missing = [name for name in expected if name not in weights]
    other = [name for name in expected if name in weights and weights[name].shape != expected[name]]
    if missing or other:
        told = f"has no {listed(missing)}" if missing else f"has other shapes of {listed(other)}"
        raise ConfigError(
            f"{key} is not of {model.name}: it {told}; set MODEL.TIMM.NAME to the model that it is "
            "of, with timm's names of weights"
        )
    return weights


def _expected_shapes(model: TimmModel) -> dict[str, torch.Size]:
    """Returns the weights that a file must have: all but classifier and counters of batches."""
    with torch.device("meta"):
        whole = timm_part().create_model(model.name, **model.size_arguments)
    classifier = whole.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    return {
        name: tensor.shape
        for name, tensor in whole.state_dict().items()
        if name.rpartition(".")[0] not in heads and not name.endswith("num_batches_tracked")
    }


def pretrained_pixels(name: str) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation, RGB in [0, 255], that a timm model was trained with."""
    found = timm_part("models").get_pretrained_cfg(name)
    return [255 * x for x in found.mean], [255 * x for x in found.std]


def freeze_stages(net: nn.Module, levels: Sequence[Level], freeze_at: int) -> None:
    """Stops learning in the first stages, numbered as those of detectron2's ResNets.

    Args:
        net: timm's model with its features alone; frozen batch norms use their running statistics.
        levels: all its maps.
        freeze_at: 0 freezes nothing; 1 what comes before the stage of stride 4; k from 2 on all up
            to the end of the stage of stride 2^k.
    """
    if freeze_at < 1:
        return
    parameters = list(net.named_parameters())
    inner = [level for level in levels if 4 <= level.stride <= 2**freeze_at]
    if inner:
        last = _positions(net, parameters, inner[-1])[-1]
    else:
        first = next(level for level in levels if level.stride >= 4)
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
    """Returns where among the parameters those of the module of a map are.

    Raises:
        ConfigError: if it has none, or timm does not tell which module it is.
    """
    flat = level.module.replace(".", "_")  # some of timm's wrappers flatten, some put it deeper
    own = [x for x in (level.module, flat, f"model.{level.module}") if _has_module(net, x)]
    found = [k for k, (name, _) in enumerate(parameters) if own and name.startswith(f"{own[0]}.")]
    if not found:
        raise ConfigError(
            "MODEL.BACKBONE.FREEZE_AT: timm does not tell where the stages of this model end; set "
            "it to 0, and a small SOLVER.LR_FACTORS for the backbone if it should change little"
        )
    return found


def _has_module(net: nn.Module, name: str) -> bool:
    return any(found == name for found, _ in net.named_modules())


def timm_part(name: str = "") -> Any:
    """Returns timm, or one of its parts; raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(f"timm.{name}" if name else "timm")
    except ImportError as error:
        raise ConfigError(
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone needs timm, which is not installed "
            f"({one_line(error)}): pip install timm, or the extra 'timm' of this package"
        ) from error
