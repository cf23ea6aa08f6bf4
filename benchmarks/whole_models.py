#!/usr/bin/env python3
r"""Summarises an ablation that trained whole models, for the pages that discuss its results.

For example:

    python tools/ablate.py --config-file configs/ablations/roi_pooling.yaml \
        --output output/ablations/roi_pooling
    python benchmarks/whole_models.py --input output/ablations/roi_pooling

Variants with fewer than --seeds trainings are left out. Intervals cover training and images and
hold jointly for all variants. In addition to the APs, the table has "mask IoU". For each object, it
takes the largest IoU with the mask of a detection of the object's class in the same image, or 0 if
there are no such detections, and averages over all objects. Benchmarks that train only the mask
branch measure the IoU in the true boxes; here, the model has found the boxes.

Writes a table, and a JSON file. Takes a minute.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from measure import write_json
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tabulate import tabulate

from mask_head_plugin.ablation.report.study import Study, Variant, machine, read_study
from mask_head_plugin.config import load_config
from mask_head_plugin.data.coco_files import register_coco_files
from mask_head_plugin.evaluation.bootstrap import compare_all, image_weights
from mask_head_plugin.evaluation.difference import PairedDifference, difference_of

TASKS = {"segm": "mask", "bbox": "box", "boundary": "boundary"}
METRICS = ("AP", "AP50", "AP75")
BEST_IOU = "mask IoU"


def best_ious(truth: COCO, results: Path) -> np.ndarray:
    """Returns each object's largest IoU with a mask of its class: (R,), 0 to 1."""
    found = defaultdict(list)
    for x in json.loads(results.read_text(encoding="utf-8")):
        found[x["image_id"], x["category_id"]].append(x["segmentation"])
    best = []
    for truly in truth.anns.values():
        masks = found[truly["image_id"], truly["category_id"]]
        best.append(coco_mask.iou(masks, [truth.annToRLE(truly)], [0]).max() if masks else 0.0)
    return np.array(best)


def mean_iou_draws(truth: COCO, results: list[Path], num_draws: int) -> np.ndarray:
    """Returns (N, 1 + S) mean best IoUs in percent: for all images, then for draws of images."""
    images = np.array([x["image_id"] for x in truth.anns.values()])
    numbers, place = np.unique(images, return_inverse=True)
    draws = image_weights(len(numbers), num_draws, seed=0)
    weights = np.concatenate([np.ones((1, len(numbers)), draws.dtype), draws])
    ious = [np.bincount(place, best_ious(truth, path)) for path in results]
    return 100 * np.stack([weights @ x for x in ious]) / (weights @ np.bincount(place))


def row(
    way: str, metric: str, by_seed: list[float], found: PairedDifference, is_baseline: bool
) -> dict[str, Any]:
    """Returns a row of the results; the baseline has no differences."""
    change = {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "images low": found.image_low,
        "images high": found.image_high,
        "detectable": found.detectable,
    }
    return {
        "way": way,
        "metric": metric,
        "value": round(found.value, 2),
        "seed std": round(found.seed_std, 2),
        **{key: None if is_baseline else round(x, 2) for key, x in change.items()},
        "by seed": [round(x, 2) for x in by_seed],
    }


def summarize(study: Study, num_seeds: int, num_draws: int) -> list[dict[str, Any]]:
    """Returns a row for each metric and variant with at least ``num_seeds`` trainings."""
    variants: list[Variant] = [v for v in study.variants if len(v.finished) >= num_seeds]
    names, baseline = [v.name for v in variants], study.baseline.name
    rows = []
    for task, what in TASKS.items():
        matches = {name: study.matches(task)[name] for name in names}
        compared = compare_all(matches, baseline, METRICS, num_draws)
        for metric in METRICS:
            for variant in variants:
                values, found = variant.values(f"{task}/{metric}"), compared[variant.name][metric]
                is_baseline = variant.name == baseline
                rows.append(row(variant.name, f"{what} {metric}", values, found, is_baseline))
    register_coco_files(load_config(str(study.finished[0].folder / "config.yaml")))
    DatasetCatalog.get(study.dataset)  # the embedded data set is written when it is first read
    truth = COCO(MetadataCatalog.get(study.dataset).json_file)
    ious = {
        v.name: mean_iou_draws(
            truth, [t.inference / "coco_instances_results.json" for t in v.finished], num_draws
        )
        for v in variants
    }
    sizes = len({x["image_id"] for x in truth.anns.values()}), max(len(names) - 1, 1)
    for name, values in ious.items():
        found = difference_of(BEST_IOU, values, ious[baseline], *sizes)
        rows.append(row(name, BEST_IOU, values[:, 0].tolist(), found, name == baseline))
    return rows


def facts(study: Study) -> dict[str, Any]:
    """Returns the facts about the trainings that readers need to interpret the results."""
    records = [trial.record() for trial in study.finished]
    seconds = sorted(x["seconds"] for x in records)
    return {
        "data set": study.dataset,
        "images": len(next(iter(study.matches("segm").values()))[0].image_ids),
        "iterations": sorted({x["iterations"] for x in records}),
        "commits": sorted({x["commit"][:12] for x in records}),
        "torch": sorted({x["versions"]["torch"] for x in records}),
        "machine": sorted({machine(trial) for trial in study.finished}),
        "dates": sorted({x["finished_at"][:10] for x in records}),
        "seconds of a training": [seconds[0], seconds[-1]],
    }


def curves(study: Study) -> list[dict[str, Any]]:
    """Returns the mask AP of each training at each evaluation."""
    table = []
    for trial in study.finished:
        points = [x for x in trial.log() if study.metric in x]
        its, values = [x["iteration"] for x in points], [round(x[study.metric], 2) for x in points]
        row = {"way": trial.variant, "seed": trial.seed}
        table.append({**row, "iterations": its, study.metric: values})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("output/sampling/whole_models.json")
    parser.add_argument("--input", type=Path, required=True, help="an ablation's --output")
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument(
        "--seeds", type=int, default=5, help="smallest number of trainings per variant (default 5)"
    )
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws (default 1000)")
    args = parser.parse_args()
    study = read_study(args.input, args.draws)
    rows = summarize(study, args.seeds, args.draws)
    shown = [{key: x for key, x in row.items() if key != "by seed"} for row in rows]
    print(tabulate(shown, headers="keys", tablefmt="github"))
    content = {"name": "whole models", "baseline": study.baseline.name, **facts(study)}
    write_json({**content, "rows": rows, "curves": curves(study)}, args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
