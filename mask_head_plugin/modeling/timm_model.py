"""Finds out which maps a timm model has, and whether a detector can use them."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import ConfigError
from ..messages import listed, nearest_name, one_line

PROBE_HW = (96, 160)
"""Height and width of the test image that reveals whether a model accepts images of any size."""

ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""Arguments that may let a timm model with a fixed image size accept images of any size.

They are tried in this order.
"""


class Level(NamedTuple):
    """One map of a timm model.

    Attributes:
        name: follows from the stride, as in detectron2's ResNets: res2 (4 pixels) to res5 (32). A
            dilated res5 keeps its name. For a stride that is not a power of 2, such as 14 pixels,
            the name is "".
        out_index: the map's number in timm's ``out_indices``.
        channels: number of channels.
        stride: side of a cell in image pixels.
        module: name of the module that returns the map.
    """

    name: str
    out_index: int
    channels: int
    stride: int
    module: str


class TimmModel(NamedTuple):
    """A timm model that has not been built yet.

    Attributes:
        name: the model's name in timm.
        channels: number of image channels.
        arguments: arguments that make timm build the model for images of any size.
        levels: the model's maps.
    """

    name: str
    channels: int
    arguments: dict[str, Any]
    levels: list[Level]

    @classmethod
    def probe(cls, name: str, channels: int) -> TimmModel:
        """Builds the model on the meta device and runs it on a small image.

        Raises:
            ConfigError: if timm or the model is missing, or a detector cannot use its maps for
                images of any size.
        """
        settings = model_settings(name)
        refusals: list[Exception] = []
        for arguments in ANY_SIZE if settings.fixed_input_size else ({},):
            try:
                return cls(name, channels, arguments, [])._with_levels()
            except (ConfigError, TypeError) as error:  # TypeError: the model has no such argument
                refusals.append(error)
        told = [error for error in refusals if isinstance(error, ConfigError)]
        raise told[0] if told else _unfit(name, refusals[-1])

    def _with_levels(self) -> TimmModel:
        try:
            net = self.build_without_memory()
        except (RuntimeError, AttributeError, AssertionError) as error:
            raise _unfit(self.name, error) from error
        levels = []
        found = net.feature_info.get_dicts(keys=["num_chs", "reduction", "module"])
        for index, x in zip(net.feature_info.out_indices, found, strict=True):
            stage = math.log2(x["reduction"])
            name = f"res{int(stage)}" if stage.is_integer() else ""
            levels.append(Level(name, index, x["num_chs"], x["reduction"], x["module"]))
        model = self._replace(levels=levels)
        _check_maps(model, net)
        return model

    @property
    def is_plain(self) -> bool:
        """Whether all maps have the same size, as in a plain vision transformer."""
        return len({level.stride for level in self.levels}) == 1

    def dilated(self) -> TimmModel:
        """Returns the model with a dilated last stage, so that its largest stride is 16.

        Raises:
            ConfigError: if timm cannot dilate this model.
        """
        levels = [level._replace(stride=min(level.stride, 16)) for level in self.levels]
        arguments = {**self.arguments, "output_stride": 16}
        model = self._replace(arguments=arguments, levels=levels)
        try:
            _check_maps(model, model.build_without_memory())
        except (TypeError, NotImplementedError, AssertionError, RuntimeError, ConfigError) as error:
            raise ConfigError(
                f"MODEL.RESNETS.RES5_DILATION 2: timm cannot dilate {self.name} "
                f"({one_line(error)}); set it to 1, or use another model, such as resnet50"
            ) from error
        return model

    def build(self, **arguments: Any) -> Any:
        """Returns timm's model without its classifier."""
        return timm_part().create_model(
            self.name, features_only=True, in_chans=self.channels, **self.arguments, **arguments
        )

    def build_without_memory(self) -> Any:
        try:
            with torch.device("meta"):
                return self.build().eval()
        except NotImplementedError:  # timm up to 1.0.26 computes a RegNet's widths with tensors
            return self.build().eval().to("meta")


def _unfit(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"MODEL.TIMM.NAME {name} does not return feature maps ({one_line(error)}); use another "
        "model, such as convnext_tiny"
    )


def _check_maps(model: TimmModel, net: nn.Module) -> None:
    """Raises ConfigError unless a small image's maps have the sizes implied by their strides."""
    try:
        with torch.device("meta"), torch.no_grad():
            maps = net(torch.zeros(1, model.channels, *PROBE_HW))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"MODEL.TIMM.NAME {model.name} accepts only images of the size it was trained on "
            f"({one_line(error)}); use another model, such as convnext_tiny"
        ) from error
    for level, features in zip(model.levels, maps, strict=True):
        found = tuple(features.shape[1:3] if gives_nhwc(net) else features.shape[2:])
        expected = tuple(math.ceil(side / level.stride) for side in PROBE_HW)
        if found != expected:
            raise ConfigError(
                f"MODEL.TIMM.NAME {model.name} cuts off the borders of images: its map of stride "
                f"{level.stride} is {found} for {PROBE_HW} pixels, not {expected}; use another "
                "model, such as convnext_tiny"
            )


def gives_nhwc(net: nn.Module) -> bool:
    """Returns whether the maps of a timm model are (N, H, W, C)."""
    return str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")


def model_settings(name: str) -> Any:
    """Returns timm's PretrainedCfg for a model name with or without a weights tag.

    Raises:
        ConfigError: if timm or the model is missing.
    """
    timm, models = timm_part(), timm_part("models")
    if ":" in name or "/" in name:
        raise ConfigError(
            f"MODEL.TIMM.NAME {name!r} is an address; use a name from timm, such as resnet50 or "
            "resnet50.a1_in1k; for pretrained weights, set MODEL.TIMM.PRETRAINED True, or "
            "MODEL.TIMM.CHECKPOINT to a file"
        )
    if not timm.is_model(name):
        nearest = nearest_name(name, timm.list_models())
        hint = f"did you mean {nearest}?" if nearest else "use another name, such as convnext_tiny"
        raise ConfigError(f"MODEL.TIMM.NAME {name!r} is not a model of timm; {hint}")
    try:
        return models.get_pretrained_cfg(name) or models.PretrainedCfg()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ConfigError(
            f"MODEL.TIMM.NAME {name!r}: timm has no such weights; it has {listed(tags)}"
        ) from error


def pretrained_pixels(name: str) -> tuple[list[float], list[float]]:
    """Returns the pixel mean and standard deviation that a timm model was trained with.

    Both are RGB in [0, 255].

    Raises:
        ConfigError: if timm or the model is missing.
    """
    found = model_settings(name)
    return [round(255 * x, 3) for x in found.mean], [round(255 * x, 3) for x in found.std]


def timm_part(name: str = "") -> Any:
    """Returns timm or one of its submodules; raises ConfigError if timm is not installed."""
    try:
        return importlib.import_module(f"timm.{name}" if name else "timm")
    except ImportError as error:
        raise ConfigError(
            "the backbones of MODEL.TIMM need timm, which is not installed "
            f"({one_line(error)}): run 'pip install timm', or install this package's extra 'timm'"
        ) from error
