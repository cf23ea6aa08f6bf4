#!/usr/bin/env python3
"""Compares the output of masks and their evaluation with detectron2 and pycocotools.

output: masks of 28 x 28 and their boxes are converted to COCO run lengths; detectron2 pastes the
masks into full-size images and encodes these. evaluation: AP is computed from result
dictionaries for synthetic data (images of 480 x 640 with 7 objects and 20 detections of 80
classes); detectron2's COCOEvaluator uses pycocotools. Boundary AP, which detectron2 does not
compute, is timed separately. Reading images and inference are not measured.

Times are medians of several runs in which detectron2 and our code take turns; ratios are
detectron2 / ours. Memory is the largest growth of the process's memory, measured in a separate run.
With --device cuda, masks are made on the GPU and encoded on the CPU, and memory is the peak that
PyTorch allocates on the GPU. Where detectron2's bit masks would take more than --limit-gb,
detectron2 is not run.

Writes a table, a JSON file with machine, versions and date, and a plot next to it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import paste_masks_in_image
from measure import (
    Sizes,
    add_busy_argument,
    add_tiny_argument,
    machine,
    median_times,
    peak_resident_megabytes,
    write_results,
)
from pycocotools import mask as coco_mask
from torch import Tensor

from mask_head_plugin.evaluation import MaskEvaluator
from mask_head_plugin.machine import peak_megabytes
from mask_head_plugin.ops import encode_masks
from mask_head_plugin.progress import progress, tell

MASK_SIDE, EVALUATED_HW, NUM_CLASSES = 28, (480, 640), 80
OBJECTS_PER_IMAGE, DETECTIONS_PER_IMAGE = 7, 20

Sides = dict[str, Callable[[], object]]


def make_masks(num_masks: int, image_hw: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns smooth masks, and boxes whose sides are 3% to 60% of the image's sides."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(num_masks, 1, 5, 5, generator=generator) + 0.7
    size = (MASK_SIDE, MASK_SIDE)
    probs = torch.nn.functional.interpolate(low, size, mode="bicubic")[:, 0].mul(4).sigmoid()
    extent = torch.tensor(image_hw[::-1], dtype=torch.float32)
    sides = extent * 0.03 * 20 ** torch.rand(num_masks, 2, generator=generator)
    corner = (extent - sides) * torch.rand(num_masks, 2, generator=generator)
    return probs, torch.cat([corner, corner + sides], dim=1)


def paste_and_encode(probs: Tensor, boxes: Tensor, image_hw: tuple[int, int]) -> list[Any]:
    """Does the same as detectron2's postprocessing followed by its instances_to_coco_json."""
    masks = paste_masks_in_image(probs, boxes, image_hw).cpu()
    return [
        coco_mask.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0] for mask in masks
    ]


def make_annotations(num_images: int, folder: Path) -> tuple[str, list[list[dict[str, Any]]]]:
    """Registers synthetic ground truth; returns its name and the results of each image.

    A third of the detections are objects of the ground truth, moved by a few pixels.
    """
    rng, height, width = np.random.default_rng(0), *EVALUATED_HW
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    images, annotations, results = [], [], []
    for image_id in progress(range(1, num_images + 1), "making annotations", "image"):
        images.append({"id": image_id, "height": height, "width": width, "file_name": ""})
        sides = np.exp(rng.uniform(np.log(12), np.log(300), (OBJECTS_PER_IMAGE, 2)))
        centers = rng.uniform(sides / 2, np.array([width, height]) - sides / 2)
        classes = rng.integers(1, NUM_CLASSES + 1, OBJECTS_PER_IMAGE)
        for center, side, category in zip(centers, sides, classes.tolist(), strict=True):
            outline = center + side / 2 * np.stack([np.cos(angles), np.sin(angles)], 1)
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0}
            annotation |= {"category_id": category, "area": float(side.prod() * 0.75)}
            annotation |= {"bbox": [*(center - side / 2), *side]}
            annotations.append({**annotation, "segmentation": [outline.ravel().tolist()]})
        probs, boxes = make_masks(DETECTIONS_PER_IMAGE, EVALUATED_HW, image_id)
        moved = centers + rng.normal(0, 0.05, centers.shape) * sides
        boxes[:OBJECTS_PER_IMAGE] = torch.from_numpy(
            np.concatenate([moved - sides / 2, moved + sides / 2], 1)
        )
        y, x = np.mgrid[:MASK_SIDE, :MASK_SIDE] / (MASK_SIDE - 1) * 2 - 1
        probs[:OBJECTS_PER_IMAGE] = torch.from_numpy(1 / (1 + np.exp(9 * (y**2 + x**2 - 1))))
        other = rng.integers(1, NUM_CLASSES + 1, DETECTIONS_PER_IMAGE - OBJECTS_PER_IMAGE)
        found = []
        for rle, box, category in zip(
            encode_masks(probs, boxes, EVALUATED_HW),
            boxes.tolist(),
            [*classes.tolist(), *other.tolist()],
            strict=True,
        ):
            result = {"image_id": image_id, "category_id": category, "score": float(rng.random())}
            result["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
            found.append(result)
        results.append(found)
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(NUM_CLASSES)]
    path = folder / "annotations.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    name = f"made_{num_images}"
    DatasetCatalog.register(name, list)
    classes = [category["name"] for category in categories]
    MetadataCatalog.get(name).set(json_file=str(path), thing_classes=classes)
    return name, results


def evaluate_with_detectron2(name: str, results: list[list[dict[str, Any]]]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOEvaluator(name, ("bbox", "segm"), distributed=False)
        # This is what process() would store. Results are copied because detectron2 changes them.
        evaluator._predictions = [{"instances": [dict(x) for x in found]} for found in results]
        evaluator.evaluate()


def evaluate_with_plugin(name: str, results: list[list[dict[str, Any]]], tasks: tuple[str]) -> None:
    evaluator = MaskEvaluator(name, tasks, distributed=False)
    evaluator.reset()
    for found in results:  # process() does the same with detections in this format
        evaluator._log.append(found[0]["image_id"], found)
    evaluator.evaluate()


def output_sides(
    num_masks: int, image_hw: tuple[int, int], limit_bytes: float, device: str
) -> Sides:
    probs, boxes = make_masks(num_masks, image_hw)
    arguments = probs.to(device), boxes.to(device), image_hw
    sides: Sides = {"ours": partial(encode_masks, *arguments)}
    if num_masks * image_hw[0] * image_hw[1] <= limit_bytes:
        sides = {"detectron2": partial(paste_and_encode, *arguments), **sides}
    return sides


def settings(
    sizes: Sizes, num_images: int, folder: Path, limit_bytes: float, device: str
) -> Iterator[tuple[dict[str, Any], Callable[[], Sides]]]:
    for image_hw in sizes.output_images:
        for count in sizes.output_counts:
            what = {"what": "output", "image_hw": image_hw, "masks": count}
            what["dense_gb"] = round(count * image_hw[0] * image_hw[1] / 1e9, 2)
            yield what, partial(output_sides, count, image_hw, limit_bytes, device)
    if num_images == 0:
        return

    def evaluation_sides(boundary: bool) -> Sides:
        name, results = made
        if boundary:
            return {"ours": partial(evaluate_with_plugin, name, results, ("boundary",))}
        tasks = ("bbox", "segm")
        return {
            "detectron2": partial(evaluate_with_detectron2, name, results),
            "ours": partial(evaluate_with_plugin, name, results, tasks),
        }

    made = make_annotations(num_images, folder)
    count = num_images * DETECTIONS_PER_IMAGE
    for task, boundary in (("bbox and segm", False), ("boundary", True)):
        what = {"what": f"evaluation, {task}", "image_hw": EVALUATED_HW, "masks": count}
        yield what, partial(evaluation_sides, boundary)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the time and memory of both sides on logarithmic axes."""
    from matplotlib.figure import Figure

    from mask_head_plugin.pages.plots import COLOURS, label_bars, save_plot

    figure = Figure(figsize=(11, 5), layout="constrained")
    names = [f"{row['what']}\n{row['masks']} masks, {row['size']}" for row in rows]
    for axes, unit in zip(figure.subplots(1, 2), ("ms", "mb"), strict=True):
        for k, who in enumerate(("detectron2", "ours")):
            found = [
                (n, row[f"{who}_{unit}"]) for n, row in enumerate(rows) if f"{who}_{unit}" in row
            ]
            values = [max(value, 1) for _, value in found]
            bars = axes.barh(
                [n + 0.4 * k for n, _ in found], values, height=0.38, label=who, color=COLOURS[k]
            )
            label_bars(axes, bars, "{:,.0f}")
        axes.set_xscale("log")
        axes.set_yticks([n + 0.2 for n in range(len(rows))], names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("milliseconds" if unit == "ms" else "peak memory, MB")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    save_plot(figure, path)


def measure(sides: Sides, repeats: int, busy: int, device: str) -> dict[str, Any]:
    """Returns the times and memory peaks of a setting. Measuring the peak is also the warm-up."""
    row: dict[str, Any] = {}
    for name, step in sides.items():
        gc.collect()
        peak = peak_megabytes(step, device) if device == "cuda" else peak_resident_megabytes(step)
        row[f"{name}_mb"] = round(peak, 1)
    times = median_times(list(sides.values()), repeats, device, busy=busy, warm_up=0)
    for name, time in zip(sides, times, strict=True):
        row[f"{name}_ms"] = round(time, 2)
    if "detectron2_ms" in row:
        row["time_ratio"] = round(row["detectron2_ms"] / row["ours_ms"], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/mask_output.json"))
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs per measurement; their median is reported"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--images", type=int, default=5000, help="images to evaluate; 0 skips the evaluation"
    )
    parser.add_argument(
        "--limit-gb",
        type=float,
        default=8,
        help="run detectron2 only if its bit masks take at most this many GB (default 8)",
    )
    add_busy_argument(parser)
    add_tiny_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("mask_head_plugin").setLevel(logging.WARNING)
    rows: list[dict[str, Any]] = []
    tell(f"{'':26}{'image':>12}{'masks':>8}{'detectron2 ms, MB':>24}{'ours ms, MB':>22}{'x':>8}")
    with tempfile.TemporaryDirectory() as folder:
        limit = args.limit_gb * 1e9
        for what, make in settings(args.sizes, args.images, Path(folder), limit, args.device):
            torch.manual_seed(0)
            row = {**what, **measure(make(), args.repeats, args.busy, args.device)}
            row["size"] = "{} x {}".format(*row["image_hw"])
            rows.append(row)
            stock = [row.get(f"detectron2_{unit}", "-") for unit in ("ms", "mb")]
            tell(
                f"{row['what']:26}{row['size']:>12}{row['masks']:>8}{stock[0]:>13}{stock[1]:>11}"
                f"{row['ours_ms']:>12}{row['ours_mb']:>10}{row.get('time_ratio', '-'):>8}"
            )
    results = {
        **machine(args.device),
        "repeats": args.repeats,
        "threads": args.threads,
        "busy": args.busy,
        "rows": rows,
    }
    write_results(results, args.output, plot)


if __name__ == "__main__":
    main()
