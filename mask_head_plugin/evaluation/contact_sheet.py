"""Draws a contact sheet: validation images with ground truth and predictions side by side.

Shape alphabet: H, W image height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation.evaluator import inference_context

from ..class_names import class_names_of, matched_predictions
from ..image_file_mapper import ImageFileMapper
from ..image_files import read_image
from ..progress import progress
from .drawing import (
    FONT,
    ByteArray,
    LabelStyle,
    Rectangle,
    class_colour,
    scaled,
    tint_mask,
    write_labels,
)

NUM_IMAGES = 12
NUM_COLUMNS = 3
TILE_HW = (300, 400)
MARGIN = 6
HEADER_HEIGHT = 28
WHITE = (255, 255, 255)
LABEL_STYLE = LabelStyle(scale=0.45)


@dataclass(frozen=True)
class LabelledMask:
    """An instance to draw: its (H, W) mask, its class and its label."""

    mask: npt.NDArray[np.bool_]
    class_index: int
    label: str


def write_contact_sheet(
    cfg: CfgNode, model: torch.nn.Module, dataset_name: str, path: Path, min_score: float = 0.5
) -> None:
    """Draws images of a data set into one PNG, with ground truth to the left of predictions.

    The images are spread evenly over the data set.

    Args:
        cfg: the model's config.
        model: a detectron2 model; its training mode is restored afterwards.
        dataset_name: a registered data set with instances in detectron2's standard format.
        path: the PNG to write; its folder is created if it does not exist.
        min_score: detections with a lower score are not drawn.

    Raises:
        OSError: if the picture cannot be written.
    """
    records = DatasetCatalog.get(dataset_name)
    chosen = np.unique(np.linspace(0, len(records) - 1, NUM_IMAGES, dtype=int))
    names = MetadataCatalog.get(dataset_name).thing_classes
    found = class_names_of(model)
    # This mapper drops annotations, so that the model gets the same input as in evaluation.
    mapper = ImageFileMapper(cfg, is_train=False)
    pairs = []
    with inference_context(model), torch.no_grad():
        for index in progress(chosen, "drawing the contact sheet", "image"):
            record = records[index]
            instances = model([mapper(record)])[0]["instances"].to("cpu")
            instances = matched_predictions(instances, found, names, dataset_name)
            image = read_image(record["file_name"], "RGB")
            truth = draw_masks(image, _true_masks(record, names))
            predicted = draw_masks(image, _predicted_masks(instances, names, min_score))
            pairs.append((truth, predicted))
    write_pairs(pairs, ("ground truth", "prediction"), path)


def write_pairs(
    pairs: Sequence[tuple[ByteArray, ByteArray]], titles: tuple[str, str], path: Path
) -> None:
    """Writes pairs of pictures into one PNG.

    Args:
        pairs: (H, W, 3) RGB pictures from ``draw_masks``.
        titles: titles of the left and the right pictures.
        path: the PNG to write; its folder is created if it does not exist.

    Raises:
        OSError: if the picture cannot be written.
    """
    tiles = [np.concatenate([_on_tile(x) for x in pair], axis=1) for pair in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), _arrange(tiles, titles)[:, :, ::-1]):
        raise OSError(f"could not write {path}")


def draw_masks(image: ByteArray, masks: Sequence[LabelledMask]) -> ByteArray:
    """Returns the (H, W, 3) RGB image, scaled to a tile, with masks tinted, outlined and named."""
    scale = min(TILE_HW[0] / image.shape[0], TILE_HW[1] / image.shape[1])
    canvas = scaled(image, scale)
    below = canvas.copy()
    size = canvas.shape[1], canvas.shape[0]
    for item in sorted(masks, key=lambda x: -np.count_nonzero(x.mask)):  # small masks on top
        colour = class_colour(item.class_index)
        mask = cv2.resize(item.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        tint_mask(canvas, below, np.asarray(mask, np.uint8), colour, WHITE)
    places = [_place(item.mask, scale) for item in masks]
    styles = [LABEL_STYLE] * len(masks)
    # Labels come last, so that no mask covers them.
    write_labels(canvas, [item.label for item in masks], places, styles)
    return canvas


def _place(mask: npt.NDArray[np.bool_], scale: float) -> Rectangle:
    """Returns the bounding rectangle of a mask in the scaled picture.

    The rectangle is empty if the mask is empty.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(rows) == 0:
        return 0, 0, 0, 0
    x0, y0 = int(columns[0] * scale), int(rows[0] * scale)
    return x0, y0, math.ceil((columns[-1] + 1) * scale), math.ceil((rows[-1] + 1) * scale)


def _true_masks(record: dict[str, Any], names: Sequence[str]) -> list[LabelledMask]:
    # Keeps only keys that are drawn, because detectron2 would reject keypoints of varying length.
    keys = ("bbox", "bbox_mode", "category_id", "segmentation", "iscrowd")
    annotations = [
        {key: a[key] for key in keys if key in a}
        for a in record["annotations"]
        if "segmentation" in a
    ]
    if not annotations:
        return []
    image_hw = (record["height"], record["width"])
    instances = annotations_to_instances(annotations, image_hw, mask_format="bitmask")
    classes = instances.gt_classes.tolist()
    masks = instances.gt_masks.tensor.numpy()
    return [LabelledMask(m, k, names[k]) for m, k in zip(masks, classes, strict=True)]


def _predicted_masks(instances: Any, names: Sequence[str], min_score: float) -> list[LabelledMask]:
    kept = instances[instances.scores >= min_score]
    return [
        LabelledMask(np.asarray(kept.pred_masks[i]), k, f"{names[k]} {score:.2f}")
        for i, (k, score) in enumerate(
            zip(kept.pred_classes.tolist(), kept.scores.tolist(), strict=True)
        )
    ]


def _on_tile(picture: ByteArray) -> ByteArray:
    """Centres a picture on a white tile."""
    height, width = picture.shape[:2]
    top, left = (TILE_HW[0] - height) // 2, (TILE_HW[1] - width) // 2
    tile = np.full((*TILE_HW, 3), 255, np.uint8)
    tile[top : top + height, left : left + width] = picture
    return tile


def _arrange(pairs: list[ByteArray], titles: tuple[str, str]) -> ByteArray:
    """Arranges pairs of tiles in rows of NUM_COLUMNS below a header with the titles."""
    columns = min(NUM_COLUMNS, len(pairs))
    framed = [
        np.pad(x, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255) for x in pairs
    ]
    framed += [np.full_like(framed[0], 255)] * (-len(framed) % columns)
    rows = [np.concatenate(framed[i : i + columns], axis=1) for i in range(0, len(framed), columns)]
    header = np.full((HEADER_HEIGHT, rows[0].shape[1], 3), 255, np.uint8)
    for column in range(columns):
        for side, label in enumerate(titles):
            x = MARGIN + column * (2 * TILE_HW[1] + 2 * MARGIN) + side * TILE_HW[1]
            cv2.putText(header, label, (x, 20), FONT, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([header, *rows])
