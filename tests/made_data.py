"""Synthetic ground truth and detections that cover the difficult cases of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

HW = (60, 80)


def blob(rng: np.random.Generator) -> np.ndarray:
    """Returns an ellipse that may touch the image's edge."""
    corner, size = rng.integers(-3, np.array(HW) - 5), rng.integers(3, 40, 2)
    y, x = np.mgrid[: HW[0], : HW[1]]
    v, u = ((p - c) / (s / 2) - 1 for p, c, s in zip((y, x), corner, size, strict=True))
    return (v**2 + u**2 <= 1).astype(np.uint8)


def encode(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def make_coco(
    seed: int, *, num_classes: int = 3, num_images: int = 6, most_copies: int = 4
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns annotations, and results in random order.

    They include crowds, images without objects or detections, tied scores, wrong classes, and
    areas that differ from the number of pixels in the mask.

    Args:
        seed: seed of the random generator.
        num_classes: number of classes.
        num_images: number of images. The last image has no objects.
        most_copies: each object has fewer detections than this, shifted by up to 3 pixels.
    """
    rng = np.random.default_rng(seed)
    images = [
        {"id": int(k), "height": HW[0], "width": HW[1], "file_name": f"{k}.png"}
        for k in rng.permutation(100)[:num_images]
    ]
    ids = sorted(rng.permutation(50)[:num_classes].tolist())
    categories = [{"id": k + 1, "name": f"class {k}"} for k in ids]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []

    def detect(image: int, mask: np.ndarray, category: int) -> None:
        rle = encode(mask)
        box, score = coco_mask.toBbox(rle).tolist(), round(float(rng.random()), 1)
        kept = {"image_id": image, "category_id": category, "score": score}
        results.append({**kept, "bbox": box, "segmentation": rle})

    for image in images[:-1]:
        for _ in range(rng.integers(0, 8)):
            mask, category = blob(rng), categories[rng.integers(num_classes)]["id"]
            if not mask.any():
                continue
            rle = encode(mask)
            annotation = {"id": len(annotations) + 1, "image_id": image["id"]}
            annotation |= {"category_id": category, "iscrowd": int(rng.random() < 0.15)}
            annotation |= {"bbox": coco_mask.toBbox(rle).tolist(), "segmentation": rle}
            annotation["area"] = float(mask.sum() * rng.choice([1, 1, 3, 0.5]))
            annotations.append(annotation)
            for _ in range(rng.integers(0, most_copies)):
                moved = np.roll(mask, rng.integers(-3, 4, 2), (0, 1))
                right = rng.random() < 0.85
                detect(image["id"], moved, category if right else categories[0]["id"])
    detect(images[-1]["id"], blob(rng), categories[0]["id"])
    rng.shuffle(results)
    return {"images": images, "categories": categories, "annotations": annotations}, results
