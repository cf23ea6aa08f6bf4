"""Checks that pixel means and pretrained weights have the colour order of INPUT.FORMAT."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode

from ..modeling.timm_model import pretrained_pixels
from .timm_keys import has_timm_backbone

logger = logging.getLogger(__name__)

IMAGENET_BGR = {
    "PIXEL_MEAN": ((103.5, 116.3, 123.7), 2.0),
    "PIXEL_STD": ((57.375, 57.12, 58.395), 0.3),
}
"""Statistics of ImageNet's channels with tolerances that cover Caffe's and torchvision's values."""

NEAR = 2.0
"""Largest accepted difference from a model's means and standard deviations. Authors may round them,
for example from 0.498 to 0.5.
"""

ZOO = ("detectron2://", "catalog://", "https://dl.fbaipublicfiles.com/detectron")
RGB_IN_ZOO = ("/torchvision/", "/ViTDet/")
"""Parts of addresses that identify zoo weights trained on RGB; all others were trained on BGR."""

ORDER_BY_AUTHOR = {"torchvision": "RGB", "Caffe2": "BGR", "pycls": "BGR"}
"""Colour order that ImageNet models were trained on, by the ``__author__`` in the file."""


def wrong_colours(cfg: CfgNode) -> str | None:
    """Describes what is wrong with the colour settings, and the fix; returns None if all is well.

    Args:
        cfg: a config whose PIXEL_MEAN and PIXEL_STD have one entry per channel of INPUT.FORMAT.
    """
    order, model = cfg.INPUT.FORMAT, cfg.MODEL
    if all(0 < x <= 1 for x in model.PIXEL_MEAN):
        return (
            f"MODEL.PIXEL_MEAN {model.PIXEL_MEAN} is for pixels in [0, 1], but pixels here are in "
            "[0, 255]; multiply it and MODEL.PIXEL_STD by 255"
        )
    if order not in ("BGR", "RGB"):
        return None
    told = _wrong_for_timm(cfg)
    if told:
        return told
    for key, (bgr, tolerance) in IMAGENET_BGR.items():
        reverse = bgr[::-1] if order == "BGR" else bgr
        if all(abs(x - y) <= tolerance for x, y in zip(model[key], reverse, strict=True)):
            return (
                f"INPUT.FORMAT is {order}, but MODEL.{key} {model[key]} is in "
                f"{order[::-1]} order; reverse it to {model[key][::-1]}"
            )
    trained = "RGB" if any(part in model.WEIGHTS for part in RGB_IN_ZOO) else "BGR"
    if model.WEIGHTS.startswith(ZOO) and trained != order:
        return (
            f"INPUT.FORMAT is {order}, but MODEL.WEIGHTS {model.WEIGHTS} was trained on {trained}; "
            f"set INPUT.FORMAT to {trained}, and put MODEL.PIXEL_MEAN and PIXEL_STD in that order"
        )
    return None


def _wrong_for_timm(cfg: CfgNode) -> str | None:
    """Describes how the config contradicts a timm model's pretrained weights, if it does."""
    order, model = cfg.INPUT.FORMAT, cfg.MODEL
    if not (has_timm_backbone(cfg) and (model.TIMM.CHECKPOINT or model.TIMM.PRETRAINED)):
        return None
    mean, std = pretrained_pixels(model.TIMM.NAME)
    given = {"INPUT.FORMAT": order, "MODEL.PIXEL_MEAN": model.PIXEL_MEAN}
    given["MODEL.PIXEL_STD"] = model.PIXEL_STD
    if order == "RGB" and _is_near(model.PIXEL_MEAN, mean) and _is_near(model.PIXEL_STD, std):
        return None
    told = ", ".join(f"{key} {value}" for key, value in given.items())
    return (
        f"the config has {told}, but MODEL.TIMM.NAME {model.TIMM.NAME} was trained with other "
        f"values; set INPUT.FORMAT to RGB, MODEL.PIXEL_MEAN to {mean} and MODEL.PIXEL_STD to {std}"
    )


def _is_near(values: Sequence[float], others: Sequence[float]) -> bool:
    return all(abs(x - y) <= NEAR for x, y in zip(values, others, strict=True))


def warn_of_colours(input_format: str, author: str, source: str) -> None:
    """Logs a warning if weights were trained on another colour order.

    Args:
        input_format: INPUT.FORMAT, or "" if it is unknown.
        author: author recorded in the file.
        source: path of the file.
    """
    trained = ORDER_BY_AUTHOR.get(author, input_format)
    if input_format in ("BGR", "RGB") and trained != input_format:
        logger.warning(
            "%s comes from %s and was trained on %s, but INPUT.FORMAT is %s; change the latter, "
            "and put PIXEL_MEAN and PIXEL_STD in the same order",
            source,
            author,
            trained,
            input_format,
        )
