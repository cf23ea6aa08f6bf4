"""Shared parts of the sampling studies: a trained model, its images, and the ways to pool.

Shape alphabet: R RoIs, C channels, P pooled side, M mask side; N images.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.data import detection_utils as utils
from detectron2.structures import Boxes, Instances
from torch import Tensor

from mask_head_plugin import load_config
from mask_head_plugin.data.coco_files import register_coco_files
from mask_head_plugin.engine.predictor import load_predictor
from mask_head_plugin.evaluation.difference import LEVEL, student_t
from mask_head_plugin.image_file_mapper import ImageFileMapper
from mask_head_plugin.modeling import MultiLevelRoIPooler
from mask_head_plugin.modeling.pooler import boxes_to_rois
from mask_head_plugin.ops import roi_align
from mask_head_plugin.progress import progress

ROOT = Path(__file__).resolve().parents[1]

PoolerMaker = Callable[[MultiLevelRoIPooler], MultiLevelRoIPooler]

MIDPOINT, GAUSS, BEST = 0.25, 0.5 / math.sqrt(3), (3 - math.sqrt(6)) / 2
"""Distances of two points from the middle of a bin, as shares of the bin's width: in the paper, in
Gauss's rule, and with the least expected error along an axis (docs/roi_align_sampling.md)."""


def two_point_align(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float] = 1.0,
    offset: float = MIDPOINT,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """RoIAlign whose 2 x 2 samples lie ``offset`` bins from the middle of their bin on each axis.

    They are computed as the single samples of four RoIs, each moved by ``offset`` bins.

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


def rounded_align(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float] = 1.0,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """RoIAlign with four samples, in RoIs whose edges are rounded to cells.

    Sides are at least one cell long. Only the rounding differs from RoIAlign; ROIWarp also includes
    the cells of the upper edges.

    Args: see ops.roi_align.
    """
    scales = rois.new_tensor(spatial_scale).reshape(-1)
    scale = scales[torch.zeros(len(rois), dtype=torch.int64) if levels is None else levels, None]
    start, end = ((edges * scale + 0.5).floor() for edges in (rois[:, 1:3], rois[:, 3:]))
    rounded = torch.cat([rois[:, :1], start / scale, torch.maximum(end, start + 1) / scale], dim=1)
    return roi_align(features, rounded, output_size, spatial_scale, 2, levels=levels)


class FunctionPooler(MultiLevelRoIPooler):
    """A MultiLevelRoIPooler that calls a given function with the arguments of ops.roi_align."""

    def __init__(self, function: Callable[..., Tensor], like: MultiLevelRoIPooler) -> None:
        super().__init__(like.output_size, like.scales, 2, "ROIAlignV2")
        self.function = function

    def forward(self, features: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        rois, levels = boxes_to_rois(box_lists), self._assign_levels(box_lists)
        return self.function(features, rois, self.output_size, self.scales, levels=levels)


def _keys(pooler_type: str, ratio: int = 0, reduction: str = "mean") -> PoolerMaker:
    """Returns a function that makes poolers of a POOLER_TYPE, _SAMPLING_RATIO and _REDUCTION."""

    def make(like: MultiLevelRoIPooler) -> MultiLevelRoIPooler:
        size, scales = like.output_size, like.scales
        return MultiLevelRoIPooler(size, scales, ratio, pooler_type, reduction=reduction)

    return make


BASELINE = "four samples"

WAYS: dict[str, PoolerMaker] = {
    BASELINE: _keys("ROIAlignV2", 2),
    "one sample": _keys("ROIAlignV2", 1),
    "16 samples": _keys("ROIAlignV2", 4),
    "adaptive": _keys("ROIAlignV2"),
    "PrROIPool": _keys("PrROIPool"),
    "Gauss points": partial(FunctionPooler, partial(two_point_align, offset=GAUSS)),
    "best points": partial(FunctionPooler, partial(two_point_align, offset=BEST)),
    "largest of four": _keys("ROIAlignV2", 2, "max"),
    "no half-pixel shift": _keys("ROIAlign", 2),
    "edges rounded": partial(FunctionPooler, rounded_align),
    "RoIWarp": _keys("ROIWarp", 2),
    "RoIPool": _keys("ROIPool"),
}
"""For each way, a function that makes its pooler, with the size and scales of a given pooler."""


@dataclass(frozen=True)
class Scene:
    """An image as the network sees it, with its objects.

    Attributes:
        image_id: the image's id in the annotation file.
        image: (3, H, W).
        objects: the objects, with ``gt_boxes``, ``gt_classes``, ``gt_masks`` (bit masks).
    """

    image_id: Any
    image: Tensor
    objects: Instances


class Case:
    """A trained model and the data set that it is evaluated on."""

    def __init__(self, name: str, config_file: str, weights: str, opts: Sequence[str]) -> None:
        """
        Args:
            name: name of the data set, for tables.
            config_file: the model's config.
            weights: the file of the model's weights.
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
        """The data set and the checksum of the weights, to be written next to results."""
        digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()[:12]
        return {"data set": self.cfg.DATASETS.TEST[0], "weights": f"sha256 {digest}"}

    def scenes(self, split: str, limit: int) -> Iterator[Scene]:
        """Yields images with objects.

        Args:
            split: TRAIN or TEST.
            limit: number of images to read; images without objects are then skipped.
        """
        records = DatasetCatalog.get(self.cfg.DATASETS[split][0])
        for record in progress(records[:limit], f"{self.name}, {split.lower()}", "image"):
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

    def test_loader(self) -> Any:
        """Returns detectron2's loader of the test images."""
        return build_detection_test_loader(self.cfg, self.cfg.DATASETS.TEST[0])


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that select a model and a data set; the embedded data set is the default."""
    parser.add_argument("--name", default="shapes", help="the data set's name in the results")
    parser.add_argument(
        "--config-file", default=str(ROOT / "configs" / "shapes" / "mask_rcnn_shapes.yaml")
    )
    parser.add_argument(
        "--weights", default=str(ROOT / "checkpoints" / "mask_rcnn_shapes.safetensors")
    )
    parser.add_argument("--images", type=int, default=60, help="images to read (default 60)")
    parser.add_argument(
        "--group-sizes",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="numbers of successive images that show the same scene; intervals count each group as "
        "one image (default: every image shows a different scene)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")


def case_of(args: argparse.Namespace) -> Case:
    """Returns the case that the flags select, and sets PyTorch's threads from OMP_NUM_THREADS."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return Case(args.name, args.config_file, args.weights, args.opts)


def group_of_each_image(args: argparse.Namespace) -> list[int]:
    """Returns the index of the group that each image belongs to, from the flags.

    Raises:
        SystemExit: if the groups do not cover the images.
    """
    sizes = args.group_sizes or [1] * args.images
    if sum(sizes) != args.images:
        raise SystemExit(
            f"--group-sizes add up to {sum(sizes)} images, but --images is {args.images}"
        )
    return np.repeat(np.arange(len(sizes)), sizes).tolist()


def over_images(
    statistic: Callable[[np.ndarray], np.ndarray], num_images: int, num_compared: int = 1
) -> tuple[float, float, float]:
    """Returns a statistic with its 95% interval over images, from the jackknife and Student's t.

    Unlike percentiles of bootstrap draws, such an interval is not too narrow if images are few.

    Args:
        statistic: returns (S,) values for (S, N) weights of the images.
        num_images: N; with one image, the interval is nan.
        num_compared: number of intervals that must hold jointly (Bonferroni).
    """
    left_out = 1 - np.eye(num_images)
    value, *others = statistic(np.concatenate([np.ones((1, num_images)), left_out]))
    if num_images < 2:
        return float(value), math.nan, math.nan
    error = math.sqrt((num_images - 1) * np.var(others))
    reach = error * student_t(1 - (1 - LEVEL) / num_compared / 2, num_images - 1)
    return float(value), float(value - reach), float(value + reach)
