#!/usr/bin/env python3
"""Times the data set check on synthetic data of COCO's size: 118,000 images, 860,000 annotations.

Polygons have 25 points on average, like COCO's. Image files are hard links to small JPEGs whose
size agrees with the records, so the check reads the headers of all files but no pixels. Reading
COCO's files from a disk would take extra time. Times are for one run in a separate process, with
files in the operating system's cache. Memory is the peak of that process, including 0.7 GB for the
interpreter, PyTorch and detectron2. "again" is a second run, which reuses the result of the first.

Writes a table and a JSON file with machine, versions and date.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import add_busy_argument, busy_processes, machine
from PIL import Image

from mask_head_plugin.dataset_check.config_datasets import CocoSource, check_with_cache
from mask_head_plugin.progress import progress, tell

IMAGE_HW = (480, 640)
MEAN_POINTS, NUM_CLASSES = 25, 80


def make_images(folder: Path, num_images: int) -> None:
    """Writes images with 10,000 hard links each, because file systems limit the number of links."""
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*IMAGE_HW, 3), np.uint8))
    for index in progress(range(num_images), "making images", "file"):
        name = folder / f"{index + 1:012d}.jpg"
        if index % 10_000 == 0:
            first = name
            picture.save(first, quality=20)
        else:
            os.link(first, name)


def make_annotations(path: Path, num_images: int, num_annotations: int) -> None:
    """Writes an annotation file piece by piece to save memory."""
    rng, extent = np.random.default_rng(0), np.array(IMAGE_HW[::-1])
    sizes = {"height": IMAGE_HW[0], "width": IMAGE_HW[1]}
    images = [{"id": i + 1, "file_name": f"{i + 1:012d}.jpg", **sizes} for i in range(num_images)]
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(NUM_CLASSES)]
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, ')
        file.write('"annotations": [')
        for i in progress(range(num_annotations), "making annotations"):
            points = 3 + int(rng.poisson(MEAN_POINTS - 3))
            side = np.exp(rng.uniform(np.log(8), np.log(300), 2))
            center = rng.uniform(side / 2, extent - side / 2)
            angles = np.sort(rng.uniform(0, 2 * np.pi, points))
            outline = center + side / 2 * np.stack([np.cos(angles), np.sin(angles)], 1)
            outline = outline.round(2)
            low, high = outline.min(0), outline.max(0)
            annotation = {"id": i + 1, "image_id": i % num_images + 1, "iscrowd": 0}
            annotation |= {"category_id": i % NUM_CLASSES + 1, "area": float(side.prod())}
            annotation |= {
                "bbox": [*low, *(high - low)],
                "segmentation": [outline.ravel().tolist()],
            }
            file.write(("," if i else "") + json.dumps(annotation))
        file.write("]}")


def run_check(json_file: Path, images: Path, queue: multiprocessing.Queue[Any]) -> None:
    source = CocoSource("made", str(json_file), str(images), lvis=False, matched=False)
    start, cpu_start = time.perf_counter(), time.process_time()
    result = check_with_cache(source, NUM_CLASSES)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    kinds = sorted({finding.kind for finding in result.findings})
    times = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
    queue.put({**times, "peak_gb": round(peak, 2), "findings": kinds})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/check_dataset.json"))
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--annotations", type=int, default=860_000)
    add_busy_argument(parser)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        make_images(folder / "images", args.images)
        make_annotations(folder / "made.json", args.images, args.annotations)
        size = (folder / "made.json").stat().st_size / 1e6
        context = multiprocessing.get_context("spawn")
        for what in ("first", "again"):
            queue = context.Queue()
            job = (folder / "made.json", folder / "images", queue)
            process = context.Process(target=run_check, args=job)
            with busy_processes(args.busy):
                process.start()
                row = {"what": what, **queue.get()}
                process.join()
            rows.append(row)
            tell(
                f"{what:8}{row['seconds']:>8} s, {row['cpu_seconds']} s of CPU time, "
                f"{row['peak_gb']} GB, findings: {row['findings']}"
            )
    counts = {"images": args.images, "annotations": args.annotations, "json_mb": round(size)}
    counts["busy"] = args.busy
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**machine("cpu"), **counts, "rows": rows}, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
