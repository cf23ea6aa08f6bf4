"""Writes synthetic ablation folders in the runner's format, with shifted objects as detections."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from conftest import ROOT
from pycocotools import mask as coco_mask

from mask_head_plugin import load_config
from mask_head_plugin.evaluation.coco_ap import Evaluation, GroundTruth

sys.path.insert(0, str(ROOT / "tests" / "evaluation"))
from made_data import HW, blob, encode

NUM_ITERATIONS = 400
DATASET = "report_blobs"


def write_dataset(folder: Path, num_images: int = 10, num_classes: int = 2) -> Path:
    """Writes a small COCO file with its images, and returns its path."""
    rng = np.random.default_rng(5)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image in range(1, num_images + 1):
        picture = rng.integers(90, 130, (*HW, 3)).astype(np.uint8)
        for _ in range(4):
            mask, category = blob(rng), int(rng.integers(1, num_classes + 1))
            if mask.sum() < 30:
                continue
            picture[mask > 0] = 60 * category % 256
            rle = encode(mask)
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": category}
            entry |= {"bbox": coco_mask.toBbox(rle).tolist(), "segmentation": rle}
            annotations.append({**entry, "area": float(mask.sum()), "iscrowd": 0})
        cv2.imwrite(str(folder / "images" / f"{image}.png"), picture)
        images.append({"id": image, "file_name": f"{image}.png", "height": HW[0], "width": HW[1]})
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(num_classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "blobs.json").write_text(json.dumps(content))
    return folder / "blobs.json"


def detections(content: Mapping[str, Any], quality: float, seed: int) -> list[dict[str, Any]]:
    """Returns COCO results; with quality 1, every object is found exactly."""
    rng = np.random.default_rng(seed)
    categories = [category["id"] for category in content["categories"]]
    results = []
    for annotation in content["annotations"]:
        if rng.random() > 0.4 + 0.6 * quality:
            continue
        moved = coco_mask.decode(annotation["segmentation"])
        shift = rng.normal(0, 12 * (1 - quality), 2).round().astype(int)
        moved = np.roll(moved, shift, (0, 1))
        category = annotation["category_id"]
        if rng.random() > 0.7 + 0.3 * quality:
            category = int(rng.choice(categories))
        rle = encode(moved)
        kept = {"image_id": annotation["image_id"], "category_id": category}
        score = float(np.clip(rng.normal(0.75, 0.2), 0.05, 1))
        results.append({**kept, "score": score, "bbox": coco_mask.toBbox(rle).tolist()})
        results[-1]["segmentation"] = rle
    return results


def write_trial(
    folder: Path, variant: str, seed: int, annotations: Path, results: list[Any], cfg: Any
) -> dict[str, Any]:
    """Writes a finished trial and returns the content of its trial.json."""
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    truth = GroundTruth(str(annotations))
    metrics = {}
    for task in ("bbox", "segm", "boundary"):
        kind = "bbox" if task == "bbox" else "segm"
        evaluation = Evaluation(truth, truth.detections(results, kind), kind)
        evaluation = evaluation.with_boundaries() if task == "boundary" else evaluation
        evaluation.matches().save(folder / "inference" / f"matches_{task}.npz")
        found = evaluation.metrics()
        metrics[task] = {k: None if math.isnan(x) else x for k, x in found.items()}
    (folder / "metrics.json").write_text("".join(log_lines(seed)))
    record = {
        "variant": variant,
        "seed": seed,
        "status": "finished",
        "error": None,
        "iterations": NUM_ITERATIONS,
        "seconds": 60.0,
        "seconds_per_iteration": 0.1 + 0.01 * seed,
        "peak_memory_mb": 1000.0 + seed,
        "num_parameters": 1_234_567,
        "results": metrics,
        "device": "cpu",
        "versions": {"torch": "2.14.1"},
        "commit": "0123456789abcdef",
        "finished_at": f"2026-11-2{seed} 10:00:00",
    }
    (folder / "trial.json").write_text(json.dumps(record))
    return record


def log_lines(seed: int) -> list[str]:
    """Returns lines in the format of detectron2's metrics.json. The last line is incomplete."""
    rng = np.random.default_rng(seed)
    rows = []
    for iteration in range(19, NUM_ITERATIONS, 20):
        loss = 1.0 + math.exp(-iteration / 80) + rng.normal(0, 0.05)
        row = {"iteration": iteration, "total_loss": loss, "time": 0.1}
        rows.append({**row, "loss_mask_a": loss / 4, "loss_mask_b": loss / 8})
    return [json.dumps(row) + "\n" for row in rows] + ['{"iteration": 399, "tot']


def write_ablation(
    folder: Path,
    annotations: Path,
    qualities: Mapping[str, float],
    seeds: Sequence[int] = (1, 2),
    **description: Any,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Writes an ablation whose first variant is the baseline; returns the trials' records.

    Args:
        folder: folder to create.
        annotations: a COCO file, next to a folder ``images``.
        qualities: quality of the detections, 0 to 1, by variant.
        seeds: seeds of each variant.
        description: entries of ablation.json that replace the defaults.
    """
    files = [[DATASET, str(annotations), str(annotations.parent / "images")]]
    cfg = load_config("", ["DATASETS.COCO_FILES", str(files)])
    records: dict[str, dict[int, dict[str, Any]]] = {}
    content = json.loads(annotations.read_text())
    for number, (variant, quality) in enumerate(qualities.items()):
        for seed in seeds:
            trial = folder / f"variant_{number}" / f"seed_{seed}"
            results = detections(content, quality, seed + 10 * number)
            record = write_trial(trial, variant, seed, annotations, results, cfg)
            records.setdefault(variant, {})[seed] = record
    described = {
        "title": "Synthetic variants",
        "metric": "segm/AP",
        "baseline": next(iter(qualities)),
        "size": "tiny",
        "file": "configs/ablations/made.yaml",
        "dataset": DATASET,
        "command": "python tools/ablate.py configs/ablations/made.yaml --size tiny",
        "seeds": list(seeds),
        "variants": [
            {
                "name": name,
                "folder": f"variant_{number}",
                "differs": {"MODEL.ROI_MASK_HEAD.NUM_FC": number} if number else {},
            }
            for number, name in enumerate(qualities)
        ],
        "paper": {},
        **description,
    }
    (folder / "ablation.json").write_text(json.dumps(described))
    return records
