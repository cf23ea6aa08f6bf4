"""Synthetic data sets of rectangles and rings, and detections with one kind of mistake."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from mask_head_plugin.analysis.reading import read_scene
from mask_head_plugin.analysis.scene import Scene

HW = (120, 160)
NAMES = ("dog", "cat", "bird")


def rectangle(x: float, y: float, w: float, h: float) -> np.ndarray:
    mask = np.zeros(HW, np.uint8)
    mask[round(y) : round(y + h), round(x) : round(x + w)] = 1
    return mask


def encode(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def decode(result: dict[str, Any]) -> np.ndarray:
    """Returns the pixels of a result's mask."""
    rle = result["segmentation"]
    return coco_mask.decode({"size": rle["size"], "counts": rle["counts"].encode()})


def objects_of(masks: Sequence[tuple[int, int, np.ndarray]], crowds: Sequence[int] = ()) -> Any:
    """Builds a COCO file's content from masks given as (image, category from 1 to 3, pixels)."""
    annotations = [
        {
            "id": k + 1,
            "image_id": image,
            "category_id": category,
            "iscrowd": int(k in crowds),
            "bbox": coco_mask.toBbox(encode(mask)).tolist(),
            "area": int(mask.sum()),
            "segmentation": encode(mask),
        }
        for k, (image, category, mask) in enumerate(masks)
    ]
    ids = sorted({image for image, _, _ in masks})
    return {
        "images": [
            {"id": k, "height": HW[0], "width": HW[1], "file_name": f"{k}.png"} for k in ids
        ],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)],
        "annotations": annotations,
    }


def detection(image: int, category: int, mask: np.ndarray, score: float = 0.9, **other) -> Any:
    rle = encode(mask)
    box = coco_mask.toBbox(rle).tolist()
    found = {"image_id": image, "category_id": category, "score": score, "bbox": box}
    return {**found, "segmentation": rle, **other}


def scene_of(folder: Path, content: Any, results: Sequence[Any]) -> Scene:
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return read_scene(path, results, folder / "results.json")


def ring(x: int, y: int, size: int) -> np.ndarray:
    """Returns a disk with a hole."""
    yy, xx = np.mgrid[: HW[0], : HW[1]] + 0.5
    radius = np.hypot(yy - y - size / 2, xx - x - size / 2)
    return ((radius <= size / 2) & (radius > size / 6)).astype(np.uint8)


def crowded_content(num_images: int = 24, seed: int = 3) -> Any:
    """Returns the content of a COCO file with 4 separate rings or rectangles per image."""
    rng = np.random.default_rng(seed)
    masks = []
    for image in range(1, num_images + 1):
        for place in range(4):
            category = int(rng.integers(1, 4))
            x, y = 10 + 75 * (place % 2), 8 + 56 * (place // 2)
            x, y, size = (
                x + int(rng.integers(8)),
                y + int(rng.integers(6)),
                int(rng.integers(28, 40)),
            )
            mask = ring(x, y, size) if category == 1 else rectangle(x, y, size, size - 6 * category)
            masks.append((image, category, mask))
    return objects_of(masks)


def perfect(content: Any, change: Callable[[dict[str, Any]], None] = lambda _: None) -> list[Any]:
    """Returns a correct detection of each object, scored 0.65 to 0.95, then edited by `change`."""
    results = []
    for k, x in enumerate(content["annotations"]):
        result = {key: x[key] for key in ("image_id", "category_id", "bbox", "segmentation")}
        result["score"] = 0.95 - 0.3 * (k * 7 % 48) / 48
        change(result)
        results.append(result)
    return results
