"""Provides images for calibrating an exported model and for comparing it with the trained model.

Shape alphabet: C channels, H and W image sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor
from torch.nn import functional as F

from ..data import check_registered_datasets
from ..image_files import read_image
from ..messages import ConfigError
from ..model_input import model_hw, resized

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

NUM_OF_DATASET = 3
"""Number of images that are taken from a data set if the user passes no images."""


@dataclass(frozen=True)
class Sample:
    """A (C, H, W) float32 input image for the model, and its name in messages."""

    name: str
    image: Tensor


def sample_images(cfg: CfgNode, paths: Sequence[str], size: tuple[int, int] | None) -> list[Sample]:
    """Returns the images in ``paths`` or, if it is empty, some images of DATASETS.TEST.

    Args:
        cfg: the model's config.
        paths: image files.
        size: height and width; larger images are shrunk to fit. None does not limit the size.

    Raises:
        ImageFileError: if a file cannot be used.
    """
    found = list(paths) or _images_of_dataset(cfg)
    return [Sample(path, read_sample(cfg, path, size)) for path in found]


def read_sample(cfg: CfgNode, path: str, size: tuple[int, int] | None) -> Tensor:
    """Returns a file's (C, H, W) pixels, resized as in detectron2's predictor.

    Args:
        cfg: the model's config.
        path: path of the file.
        size: height and width; a larger image is shrunk to fit. None does not limit the size.
    """
    pixels = read_image(path, cfg.INPUT.FORMAT)
    height, width = pixels.shape[:2]
    hw = model_hw((height, width), cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, size)
    pixels = resized(pixels, hw).transpose(2, 0, 1)
    return torch.from_numpy(np.array(pixels, np.float32, order="C"))


def _images_of_dataset(cfg: CfgNode) -> list[str]:
    """Returns some images of the first data set in DATASETS.TEST that is on this machine."""
    for name in cfg.DATASETS.TEST:
        folder = MetadataCatalog.get(name).get("image_root")
        if folder and Path(folder).is_dir():
            images = (
                x for x in sorted(Path(folder).iterdir()) if x.suffix.lower() in IMAGE_SUFFIXES
            )
            return [str(path) for path, _ in zip(images, range(NUM_OF_DATASET), strict=False)]
    return []


def usable_dataset(cfg: CfgNode, key: str) -> str:
    """Returns the first data set in DATASETS.TRAIN or TEST that is on this machine.

    Args:
        cfg: the model's config.
        key: "TRAIN" or "TEST".

    Raises:
        ConfigError: if there is no such data set; the message explains why.
    """
    reasons = []
    for name in cfg.DATASETS[key]:
        alone = cfg.clone()
        alone.defrost()
        alone.DATASETS.TEST = (name,)
        try:
            check_registered_datasets(alone, train=False)
        except ConfigError as error:
            reasons.append(str(error))
        else:
            return str(name)
    raise ConfigError("; ".join(reasons) or f"DATASETS.{key} is empty")


def images_of_dataset(name: str, number: int) -> list[str]:
    """Returns image files of a data set, spread evenly over it.

    Args:
        name: name of a registered data set.
        number: the largest number of files to return.
    """
    records = DatasetCatalog.get(name)
    chosen = np.linspace(0, len(records) - 1, min(number, len(records)), dtype=int)
    return [records[k]["file_name"] for k in chosen]


def made_images(cfg: CfgNode, size: tuple[int, int] | None, divisor: int) -> Iterator[Sample]:
    """Yields synthetic images: smooth noise in two sizes, and uniform images with few detections.

    Args:
        cfg: the model's config.
        size: the largest height and width of an image; None does not limit them.
        divisor: the backbone needs sides that are multiples of this number.
    """
    side = cfg.INPUT.MIN_SIZE_TEST or 160
    side = min(side, cfg.INPUT.MAX_SIZE_TEST, *(size or ()))
    wide = min(side * 4 // 3, cfg.INPUT.MAX_SIZE_TEST, *(size[1:] if size else ()))
    small = max(side * 2 // 3, min(side, 2 * divisor + 1))
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)
    std = torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    for hw in ((side, wide), (side, small)):
        cells = [max(x // 24, 2) for x in hw]
        noise = torch.randn(1, len(mean), *cells, generator=generator)
        noise = F.interpolate(noise, hw, mode="bicubic", align_corners=False)[0]
        yield Sample(f"noise {hw[0]} x {hw[1]}", mean + std * noise)
    for number, colour in enumerate((0.0, -2.0, 2.0)):
        image = (mean + colour * std).expand(-1, small, small).contiguous()
        yield Sample(f"one colour, {number + 1}", image)
