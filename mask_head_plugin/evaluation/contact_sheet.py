"""One picture to judge a model by: validation images, ground truth beside predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.evaluator import inference_context
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

ByteArray = npt.NDArray[np.uint8]

TILE_HW = (300, 400)
NUM_IMAGES = 12
NUM_COLUMNS = 3
HEADER_HEIGHT = 28


def write_contact_sheet(
    cfg: CfgNode, model: torch.nn.Module, dataset_name: str, path: Path, min_score: float = 0.5
) -> None:
    """Draws images spread over a data set, ground truth left and predictions right, into one PNG.

    Args:
        cfg: gives the test-time transforms.
        model: a detectron2 model; its training mode is restored.
        dataset_name: a registered data set with annotations in detectron2's standard format.
        path: the PNG to write; its folder is made if missing.
        min_score: detections below are not drawn.
    """
    records = DatasetCatalog.get(dataset_name)
    chosen = [records[i] for i in np.linspace(0, len(records) - 1, NUM_IMAGES, dtype=int)]
    # Unlike at evaluation, the ground truth of an image is wanted beside its prediction.
    unique = list({id(record): record for record in chosen}.values())
    mapper = DatasetMapper(cfg, is_train=False)
    metadata = MetadataCatalog.get(dataset_name)
    tiles = []
    with inference_context(model), torch.no_grad():
        for record in tqdm(unique, "drawing the contact sheet", unit="image"):
            instances = model([mapper(record)])[0]["instances"].to("cpu")
            tiles.append(_draw_pair(record, instances[instances.scores >= min_score], metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), _arrange(tiles)[:, :, ::-1]):
        raise OSError(f"could not write {path}")


def _draw_pair(record: dict[str, Any], instances: Any, metadata: Any) -> ByteArray:
    """Returns a (tile height, 2 x tile width, 3) RGB picture: ground truth, prediction."""
    image = read_image(record["file_name"], format="RGB")
    scale = min(TILE_HW[0] / image.shape[0], TILE_HW[1] / image.shape[1])
    truth = Visualizer(image, metadata, scale=scale).draw_dataset_dict(record)
    prediction = Visualizer(image, metadata, scale=scale).draw_instance_predictions(instances)
    return np.concatenate([_fit(x.get_image()) for x in (truth, prediction)], axis=1)


def _fit(picture: ByteArray) -> ByteArray:
    """Centres a picture on a white tile."""
    height, width = (min(a, b) for a, b in zip(picture.shape[:2], TILE_HW, strict=True))
    top, left = (TILE_HW[0] - height) // 2, (TILE_HW[1] - width) // 2
    tile = np.full((*TILE_HW, 3), 255, np.uint8)
    tile[top : top + height, left : left + width] = picture[:height, :width]
    return tile


def _arrange(tiles: list[ByteArray]) -> ByteArray:
    """Puts pairs into rows of NUM_COLUMNS under a header line."""
    blank = np.full_like(tiles[0], 255)
    columns = min(NUM_COLUMNS, len(tiles))
    rows = []
    for start in range(0, len(tiles), columns):
        row = tiles[start : start + columns]
        row += [blank] * (columns - len(row))
        rows.append(
            np.concatenate(
                [np.pad(x, ((6, 6), (6, 6), (0, 0)), constant_values=255) for x in row], axis=1
            )
        )
    sheet = np.concatenate(rows)
    header = np.full((HEADER_HEIGHT, sheet.shape[1], 3), 255, np.uint8)
    for column in range(2 * columns):
        label = "ground truth" if column % 2 == 0 else "prediction"
        x = 12 + (column // 2) * (2 * TILE_HW[1] + 12) + (column % 2) * TILE_HW[1]
        cv2.putText(
            header, label, (x, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA
        )
    return np.concatenate([header, sheet])
