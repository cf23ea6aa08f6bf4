"""Chooses a backbone and its base config, depending on the device and the installed packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .commented_yaml import Setting
from .device import Device

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL, R50_FPN = "Base-Small.yaml", "Base-MaskRCNN-FPN.yaml"
ROI_LEVELS = ("p2", "p3", "p4", "p5")
R50_RATE = 0.02 / 16
"""Learning rate per image of a batch in detectron2's R50-FPN configs."""
SMALL_RATE = 0.02 / 2
"""Learning rate per image of a batch in configs/nuclei/."""
LITE0 = "tf_efficientnet_lite0"
LITE0_FILE = Path("backbones") / f"{LITE0}.safetensors"
"""File that tools/fetch_backbone.py writes."""


@dataclass(frozen=True)
class Backbone:
    """A backbone: its base config, and the settings that the new config adds to it.

    Attributes:
        name: name shown to the user.
        base: file in ``configs/``.
        rate_per_image: learning rate per image of a batch.
        why_learning_rate: source of the learning rate, for a comment.
        pixels_per_second: training speed of one CPU core; see docs/new_config.md.
        settings: settings that are added to the base config.
        advice: how to get a better config, shown to the user.
    """

    name: str
    base: str
    rate_per_image: float
    why_learning_rate: str
    pixels_per_second: float
    settings: list[Setting] = field(default_factory=list)
    advice: str = ""

    def learning_rate(self, batch_size: int) -> float:
        """Returns the learning rate for a batch, proportional to its number of images."""
        return float(f"{self.rate_per_image * batch_size:.2g}")

    def head_levels(self, levels: Sequence[str]) -> list[str]:
        """Returns the maps that the heads read; an empty list keeps those of the base config."""
        few = self.base == SMALL and levels[-1] in ("p5", "p6")
        return [*ROI_LEVELS] if few else []


def choose_backbone(device: Device) -> Backbone:
    """Returns the best backbone for a device.

    On a CPU, chooses only among backbones that need no further installation or download.
    """
    if device.kind == "cuda":
        return Backbone(
            "R50-FPN",
            R50_FPN,
            R50_RATE,
            "The rate of detectron2's R50-FPN configs: 0.02 for 16 images.",
            0,
        )
    why = "The rate of configs/nuclei/: 0.02 for 2 images."
    file = next((x for x in (LITE0_FILE, CONFIGS.parent / LITE0_FILE) if x.is_file()), None)
    has_timm = importlib.util.find_spec("timm") is not None
    if has_timm and file:
        settings = _lite0_settings(file.absolute())
        return Backbone(
            "EfficientNet-Lite0 with ImageNet weights", SMALL, SMALL_RATE, why, 1.5e5, settings
        )
    missing = "" if has_timm else "pip install timm, and "
    return Backbone(
        "a small model trained from scratch",
        SMALL,
        SMALL_RATE,
        why,
        2.8e5,
        advice="for better results, start from ImageNet weights (nothing was downloaded). "
        f"Run {missing}python tools/fetch_backbone.py efficientnet_lite0, then run this "
        "command again with --overwrite",
    )


def _lite0_settings(file: Path) -> list[Setting]:
    why = "With ImageNet weights from tools/fetch_backbone.py, and fast enough on a CPU."
    pixels = "The weights were trained on pixels that were scaled from 0 to 255 in this way."
    return [
        Setting("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", why),
        Setting("MODEL.TIMM.NAME", LITE0),
        Setting("MODEL.TIMM.CHECKPOINT", str(file)),
        Setting("MODEL.TIMM.NORM", "FrozenBN", "Two images are too few for batch statistics."),
        Setting("MODEL.PIXEL_MEAN", [127.5] * 3, pixels),
        Setting("MODEL.PIXEL_STD", [127.5] * 3),
    ]
