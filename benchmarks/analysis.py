#!/usr/bin/env python3
"""Times the analysis of a synthetic run of COCO's size: 5000 images, 35,000 objects, 100,000
detections.

Objects are polygons with 24 points, 12 to 180 pixels across, in images of 640 x 480 with 80
classes. Each object has two or three detections near it, some of a different class. There are
no image files, so the analysis draws no pictures. The time is for one run in a separate process,
including Python's startup.

Writes a table and a JSON file with machine, versions and date.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import add_busy_argument, busy_processes, machine
from pycocotools import mask as coco_mask

from mask_head_plugin.progress import progress

ROOT = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH, NUM_CLASSES, NUM_POINTS, PER_IMAGE = 480, 640, 80, 24, 7


def make_run(folder: Path, num_images: int) -> tuple[int, int]:
    """Writes annotations and results, and returns the numbers of objects and detections."""
    rng = np.random.default_rng(0)
    angle = np.arange(NUM_POINTS) * 2 * np.pi / NUM_POINTS
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in progress(range(1, num_images + 1), "making a run", "image"):
        for _ in range(PER_IMAGE):
            size = np.exp(rng.uniform(np.log(12), np.log(180)))
            radius = size / 2 * (1 + 0.25 * rng.standard_normal((NUM_POINTS, 1)).clip(-1, 1))
            points = _within(rng.uniform(0, [WIDTH, HEIGHT]) + radius * circle)
            place = {"image_id": image, "category_id": int(rng.integers(1, NUM_CLASSES + 1))}
            box, polygon = _box(points), points.ravel().tolist()
            true = {**place, "bbox": box, "area": box[2] * box[3] * 0.7, "iscrowd": 0}
            annotations.append({**true, "id": len(annotations) + 1, "segmentation": [polygon]})
            for _ in range(3 if rng.random() < 0.86 else 2):
                middle = points.mean(0)
                moved = (points - middle) * rng.uniform(0.8, 1.2) + middle
                moved = _within(moved + rng.normal(0, 0.08 * size, 2))
                rles = coco_mask.frPyObjects([moved.ravel().tolist()], HEIGHT, WIDTH)
                rle = {"size": rles[0]["size"], "counts": rles[0]["counts"].decode()}
                found = {**place, "score": rng.random(), "bbox": _box(moved), "segmentation": rle}
                if rng.random() < 0.2:
                    found["category_id"] = int(rng.integers(1, NUM_CLASSES + 1))
                results.append(found)
    sizes = {"height": HEIGHT, "width": WIDTH}
    images = [{"id": k, "file_name": f"{k}.jpg", **sizes} for k in range(1, num_images + 1)]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, NUM_CLASSES + 1)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))
    return len(annotations), len(results)


def _within(points: np.ndarray) -> np.ndarray:
    return points.clip(0, [WIDTH, HEIGHT])


def _box(points: np.ndarray) -> list[float]:
    low, high = points.min(0), points.max(0)
    return [*low.tolist(), *np.maximum(high - low, 1).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/analysis.json"))
    add_busy_argument(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, busy_processes(args.busy):
        folder = Path(directory)
        num_objects, num_detections = make_run(folder, args.images)
        command = [sys.executable, str(ROOT / "tools" / "analyze.py"), str(folder / "results.json")]
        start = time.perf_counter()
        subprocess.run([*command, "--annotations", str(folder / "annotations.json")], check=True)
        seconds = time.perf_counter() - start
    row = {"images": args.images, "objects": num_objects, "detections": num_detections}
    print("| images | objects | detections | seconds |\n|---:|---:|---:|---:|")
    print(f"| {args.images:,} | {num_objects:,} | {num_detections:,} | {seconds:.1f} |")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps({**machine("cpu"), **row, "busy": args.busy, "seconds": seconds}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
