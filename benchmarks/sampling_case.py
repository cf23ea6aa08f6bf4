"""What the studies of sampling share: a trained model, its images, and the ways to pool.

Shape alphabet: R RoIs, C channels, P pooled side, M mask side; N images.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.data import detection_utils as utils
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from tqdm import tqdm

from mask_head_plugin import load_config
from mask_head_plugin.data.coco_files import register_coco_files
from mask_head_plugin.engine.predictor import load_predictor
from mask_head_plugin.image_file_mapper import ImageFileMapper
from mask_head_plugin.modeling import MultiLevelRoIPooler
from mask_head_plugin.ops import roi_align

ROOT = Path(__file__).resolve().parents[1]

MIDPOINT, GAUSS, BEST = 0.25, 0.5 / math.sqrt(3), (3 - math.sqrt(6)) / 2
"""Distance of two points from a bin's middle, in its width: the paper's, Gauss's for two points,
and that with the least expected error on a bilinear surface (docs/roi_align_sampling.md)."""

WAYS: dict[str, tuple[str, int]] = {
    "four samples": ("ROIAlignV2", 2),
    "one sample": ("ROIAlignV2", 1),
    "16 samples": ("ROIAlignV2", 4),
    "adaptive": ("ROIAlignV2", 0),
    "PrROIPool": ("PrROIPool", 0),
    "no half-pixel shift": ("ROIAlign", 2),
    "RoIWarp": ("ROIWarp", 2),
    "RoIPool": ("ROIPool", 0),
}
"""POOLER_TYPE and POOLER_SAMPLING_RATIO."""

OFFSETS = {"Gauss points": GAUSS, "best points": BEST}

BASELINE = "four samples"

NAMES = (*WAYS, *OFFSETS)


def two_point_align(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float] = 1.0,
    offset: float = MIDPOINT,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """RoIAlign whose 2 x 2 samples lie ``offset`` bins from the middle of their bin.

    They are the single samples of four RoIs, each moved by ``offset`` of a bin.

    Args: see ops.roi_align.
    """
    height, width = (output_size,) * 2 if isinstance(output_size, int) else output_size
    sides = (rois[:, 3:] - rois[:, 1:3]) / rois.new_tensor([width, height])
    total: Any = 0
    for x in (-offset, offset):
        for y in (-offset, offset):
            move = sides * rois.new_tensor([x, y])
            moved = torch.cat([rois[:, :1], rois[:, 1:] + move.repeat(1, 2)], dim=1)
            total = total + roi_align(
                features, moved, (height, width), spatial_scale, 1, levels=levels
            )
    return total / 4


class TwoPointPooler(MultiLevelRoIPooler):
    """A MultiLevelRoIPooler of ``two_point_align``."""

    def __init__(self, offset: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.offset = offset

    def forward(self, features: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        index = [torch.full((len(x), 1), float(i)) for i, x in enumerate(box_lists)]
        boxes = torch.cat([x.tensor for x in box_lists])
        rois = torch.cat([torch.cat(index).to(boxes), boxes], dim=1)
        levels = self._assign_levels(box_lists)
        size, scales = self.output_size, self.scales
        return two_point_align(features, rois, size, scales, self.offset, levels=levels)


def pooler_of(name: str, like: Any) -> nn.Module:
    """Returns a pooler of one of NAMES with the size and scales of another."""
    if name in OFFSETS:
        return TwoPointPooler(OFFSETS[name], like.output_size, like.scales, 2, "ROIAlignV2")
    kind, sampling_ratio = WAYS[name]
    return MultiLevelRoIPooler(like.output_size, like.scales, sampling_ratio, kind)


@dataclass(frozen=True)
class Scene:
    """An image as the network sees it, with its objects.

    Attributes:
        image_id: of the annotation file.
        image: (3, H, W).
        objects: with ``gt_boxes``, ``gt_classes``, ``gt_masks`` (bit masks).
    """

    image_id: Any
    image: Tensor
    objects: Instances


class Case:
    """A trained model and the data set that it is evaluated on."""

    def __init__(self, name: str, config_file: str, weights: str, opts: Sequence[str]) -> None:
        """
        Args:
            name: of the data set, for tables.
            config_file: of the model.
            weights: its file.
            opts: config keys and their values.
        """
        options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", weights, *opts]
        self.name, self.weights = name, Path(weights)
        self.cfg: CfgNode = load_config(config_file, options)
        register_coco_files(self.cfg)
        self.model: Any = load_predictor(self.cfg).model
        self.model.eval()
        heads = self.model.roi_heads
        self.in_features = heads.mask_in_features
        self.box_pooler, self.mask_pooler = heads.box_pooler, heads.mask_pooler
        augmentations = utils.build_augmentation(self.cfg, is_train=False)
        arguments = ImageFileMapper.from_config(self.cfg, is_train=True)
        arguments |= {"augmentations": augmentations, "instance_mask_format": "bitmask"}
        self._mapper = ImageFileMapper(**arguments)

    @property
    def facts(self) -> dict[str, str]:
        """What a reader needs to know of it."""
        digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()[:12]
        return {"data set": self.cfg.DATASETS.TEST[0], "weights": f"sha256 {digest}"}

    def scenes(self, split: str, limit: int) -> Iterator[Scene]:
        """Yields images with objects.

        Args:
            split: TRAIN or TEST.
            limit: how many at most.
        """
        records = DatasetCatalog.get(self.cfg.DATASETS[split][0])
        for record in tqdm(records[:limit], f"{self.name}, {split.lower()}", unit="image"):
            sample = self._mapper(record)
            if len(sample["instances"]):
                yield Scene(record["image_id"], sample["image"], sample["instances"])

    @torch.inference_mode()
    def maps(self, image: Tensor) -> list[Tensor]:
        """Returns the (1, C, Hi, Wi) maps that the mask branch reads, for a (3, H, W) image."""
        images = self.model.preprocess_image([{"image": image}])
        features = self.model.backbone(images.tensor)
        return [features[name].contiguous() for name in self.in_features]

    @property
    def strides(self) -> list[int]:
        return [round(1 / scale) for scale in self.mask_pooler.scales]

    def use_pooler(self, name: str) -> None:
        """Exchanges the poolers of both heads."""
        self.model.roi_heads.box_pooler = pooler_of(name, self.box_pooler)
        self.model.roi_heads.mask_pooler = pooler_of(name, self.mask_pooler)

    def test_loader(self) -> Any:
        """Returns detectron2's loader of the test images."""
        return build_detection_test_loader(self.cfg, self.cfg.DATASETS.TEST[0])


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a model and a data set; the embedded one by default."""
    parser.add_argument("--name", default="shapes", help="of the data set, in tables and figures")
    parser.add_argument(
        "--config-file", default=str(ROOT / "configs" / "shapes" / "mask_rcnn_shapes.yaml")
    )
    parser.add_argument(
        "--weights", default=str(ROOT / "checkpoints" / "mask_rcnn_shapes.safetensors")
    )
    parser.add_argument("--images", type=int, default=60, help="at most (default 60)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")


def case_of(args: argparse.Namespace) -> Case:
    """Returns the case that the flags name. PyTorch gets as many threads as OMP_NUM_THREADS."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return Case(args.name, args.config_file, args.weights, args.opts)


def interval(draws: np.ndarray, level: float = 0.95) -> list[float]:
    """Returns the percentiles between which ``level`` of the draws lie."""
    tail = 100 * (1 - level) / 2
    return [float(x) for x in np.nanpercentile(draws, [tail, 100 - tail])]
