"""Draws a picture of training samples: augmented images, with and without their masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances

from ..evaluation.contact_sheet import LabelledMask, draw_masks, write_pairs
from .copy_paste import bit_masks


def write_training_sheet(cfg: CfgNode, samples: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws samples of a training loader into one PNG: pixels on the left, masks on the right.

    Args:
        cfg: provides INPUT.FORMAT and, through DATASETS.TRAIN, the class names.
        samples: each has ``image`` (C, H, W), and ``instances`` with ``gt_classes`` and
            ``gt_masks``.
        path: the PNG to write; its folder is created if missing.

    Raises:
        OSError: if the picture cannot be written.
    """
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    pairs = []
    for sample in samples:
        pixels = convert_image_to_rgb(sample["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
        image = np.ascontiguousarray(pixels, np.uint8)
        objects: Instances = sample["instances"]
        labelled = [
            LabelledMask(mask, k, names[k] if names else str(k))
            for mask, k in zip(bit_masks(sample).numpy(), objects.gt_classes.tolist(), strict=True)
        ]
        pairs.append((draw_masks(image, []), draw_masks(image, labelled)))
    write_pairs(pairs, ("training image", "its masks"), path)
