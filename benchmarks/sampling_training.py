#!/usr/bin/env python3
r"""Compares ways to pool by training mask heads for each of them on the same fixed maps.

Each way pools a trained model's maps once, within true boxes. For each way and seed, a new
FCNMaskHead is trained on these features. Its masks of validation objects are then compared with the
true masks by their IoU in the image. Intervals cover images and training and hold jointly for all
ways. The "paired" intervals compare two heads with the same seed, which started from the same
weights and saw the objects in the same order, so a seed's effect on both heads cancels. The other
intervals do not pair the seeds. Finished trainings are kept in --work, so an interrupted command
continues where it stopped.

Three numbers show how much such a study can detect. "ceiling" is the IoU of the true masks at the
resolution of the head. "feature error" is how far a way's features are from PrROIPool's, in percent
of the spread of PrROIPool's features. "noise 20%" is four samples plus noise with a standard
deviation of 20% of the features' spread; it shows how much IoU an error of that size costs.

Writes a table, and a JSON file with machine, versions and date. Takes minutes. For large RoIs:

    python benchmarks/sampling_training.py --name "large RoIs" --finest --bins 7 \
        --work output/sampling/large --output output/sampling/training_large.json \
        INPUT.MIN_SIZE_TEST 256
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from branch_alone import Objects, Schedule, predict, train_head
from measure import machine, write_json
from pycocotools import mask as coco_mask
from sampling_case import (
    BASELINE,
    WAYS,
    Case,
    add_case_arguments,
    case_of,
    group_of_each_image,
    over_images,
)
from tabulate import tabulate
from torch import Tensor

from mask_head_plugin.evaluation.bootstrap import image_weights
from mask_head_plugin.evaluation.difference import difference_of
from mask_head_plugin.modeling import MultiLevelRoIPooler
from mask_head_plugin.ops import crop_masks, encode_masks

NUM_DRAWS = 1000
NOISES = {"noise 10%": 0.1, "noise 20%": 0.2, "noise 40%": 0.4}
EXACT = "PrROIPool"


def pooled_objects(
    case: Case, split: str, limits: tuple[int, int], num_bins: int, finest: bool, ways: list[str]
) -> dict[str, Any]:
    """Returns the pooled features, targets and other data of objects that heads train or test on.

    Args:
        case: the model and data set.
        split: TRAIN or TEST.
        limits: largest numbers of images and of objects.
        num_bins: P.
        finest: whether all RoIs are read from the finest map.
        ways: names in WAYS and NOISES, including BASELINE.

    Returns:
        A dictionary: ``features``, (R, C, P, P) for each way; ``targets``, (R, 2P, 2P) bool;
        ``classes`` and ``images``, (R,); ``boxes``, (R, 4); ``truth``, R run lengths if the split
        is TEST.
    """
    scales = case.mask_pooler.scales[: 1 if finest else None]
    like = MultiLevelRoIPooler(num_bins, scales, 2, "ROIAlignV2")
    poolers = {way: WAYS[way](like) for way in ways if way in WAYS}
    features: dict[str, list[Tensor]] = {way: [] for way in poolers}
    parts: list[dict[str, Tensor]] = []
    truth: list[Any] = []
    for index, scene in enumerate(case.scenes(split, limits[0])):
        objects, maps = scene.objects, case.maps(scene.image)[: len(scales)]
        for way, pooler in poolers.items():
            features[way].append(pooler(maps, [objects.gt_boxes]).clone().contiguous())
        boxes, bits = objects.gt_boxes.tensor, objects.gt_masks.tensor
        parts.append(
            {
                "targets": crop_masks(bits, boxes, 2 * num_bins),
                "classes": objects.gt_classes,
                "boxes": boxes,
                "images": torch.full((len(boxes),), index),
            }
        )
        if split == "TEST":
            columns = np.asfortranarray(bits.permute(1, 2, 0).numpy().astype(np.uint8))
            truth += coco_mask.encode(columns)
        if sum(len(part["classes"]) for part in parts) >= limits[1]:
            break
    joined = {key: torch.cat([part[key] for part in parts])[: limits[1]] for key in parts[0]}
    pooled = {way: torch.cat(x)[: limits[1]] for way, x in features.items()}
    for name in set(ways) & set(NOISES):
        usual, generator = pooled[BASELINE], torch.Generator().manual_seed(0)
        noise = torch.randn(usual.shape, generator=generator)
        pooled[name] = usual + NOISES[name] * usual.std((0, 2, 3), keepdim=True) * noise
    return {**joined, "features": pooled, "truth": truth[: limits[1]]}


def settings_digest(case: Case, *settings: Any) -> str:
    """Returns a short name for the results of a model with these settings."""
    key = json.dumps([case.facts, case.cfg.INPUT.MIN_SIZE_TEST, settings])
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def kept_objects(folder: Path, case: Case, *settings: Any) -> dict[str, Any]:
    """Returns the result of ``pooled_objects``, which is saved in the folder the first time."""
    path = folder / f"objects-{settings_digest(case, *settings)}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(pooled_objects(case, *settings), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def image_iou(mask_probs: Tensor, boxes: Tensor, truth: list[Any]) -> np.ndarray:
    """Pastes masks into their images and returns their (R,) IoUs with the true masks."""
    ious = []
    for probs, box, rle in zip(mask_probs, boxes, truth, strict=True):
        hw = (int(rle["size"][0]), int(rle["size"][1]))
        found = encode_masks(probs[None], box[None], hw)
        ious.append(coco_mask.iou(found, [rle], [0])[0, 0])
    return np.array(ious)


def train_way(
    data: tuple[dict[str, Any], dict[str, Any]],
    num_classes: int,
    way: str,
    seed: int,
    schedule: Schedule,
) -> np.ndarray:
    """Trains a head on a way's features and returns the (R,) IoU of the test objects."""
    learned, measured = (
        Objects(
            x["features"][way].contiguous(memory_format=torch.channels_last),
            x["targets"],
            x["classes"],
        )
        for x in data
    )
    head = train_head(learned, num_classes, seed, schedule)
    return image_iou(predict(head, measured).sigmoid(), data[1]["boxes"], data[1]["truth"])


def statistics(ious: np.ndarray, groups: np.ndarray) -> dict[str, np.ndarray]:
    """Returns (N, 1 + S) percentages by statistic: for all images, then for each draw of groups.

    Args:
        ious: (N, R) by seed and object.
        groups: (R,) index of the group of images that each object belongs to.
    """
    numbers, place = np.unique(groups, return_inverse=True)
    draws = image_weights(len(numbers), NUM_DRAWS, seed=0)
    weights = np.concatenate([np.ones((1, len(numbers)), draws.dtype), draws])
    counts = weights @ np.bincount(place)
    values = {"mean IoU": ious, "IoU > 0.5": ious > 0.5, "IoU > 0.75": ious > 0.75}
    return {
        name: np.stack([100 * (weights @ np.bincount(place, row)) / counts for row in x])
        for name, x in values.items()
    }


def feature_errors(features: dict[str, Tensor]) -> dict[str, float]:
    """Returns how far each way's features are from the exact ones, in percent of their spread."""
    exact = features[EXACT]
    spread = exact.std((0, 2, 3), keepdim=True).square().mean()
    return {
        way: round(100 * float(((x - exact).square().mean() / spread).sqrt()), 2)
        for way, x in features.items()
    }


def own_head(case: Case, test: dict[str, Any], groups: np.ndarray) -> list[dict[str, Any]]:
    """Returns the IoU that the model's own mask head reaches with the features of each way."""
    ious = {}
    for way, features in test["features"].items():
        with torch.inference_mode():
            logits = case.model.roi_heads.mask_head.selected_logits(features, test["classes"])
        ious[way] = image_iou(logits.sigmoid().clone(), test["boxes"], test["truth"])
    _, place = np.unique(groups, return_inverse=True)
    counts, rows = np.bincount(place), []
    for way, own in ious.items():
        change = np.bincount(place, own - ious[BASELINE])
        found = over_images(
            lambda w, change=change: 100 * (w @ change) / (w @ counts), len(counts), len(ious) - 1
        )
        row = dict(zip(("difference", "low", "high"), [round(x, 2) for x in found], strict=True))
        rows.append({"way": way, "value": round(100 * float(own.mean()), 2), **row})
    return rows


def compare(ious: dict[str, np.ndarray], groups: np.ndarray) -> list[dict[str, Any]]:
    """Returns a row for each way and statistic, with its difference from four samples."""
    values = {way: statistics(x, groups) for way, x in ious.items()}
    rows = []
    for way, of_way in values.items():
        for name, own in of_way.items():
            base = values[BASELINE][name]
            sizes = len(np.unique(groups)), max(len(ious) - 1, 1)
            found = difference_of(name, own, base, *sizes)
            paired = difference_of(name, own - base, np.zeros_like(base), *sizes)
            rows.append(
                {
                    "way": way,
                    "statistic": name,
                    "value": round(found.value, 3),
                    "difference": round(found.difference, 3),
                    "low": round(found.low, 3),
                    "high": round(found.high, 3),
                    "paired low": round(paired.low, 3),
                    "paired high": round(paired.high, 3),
                    "seed std": round(found.seed_std, 3),
                    "detectable": round(found.detectable, 3),
                    "by seed": [round(float(x), 2) for x in own[:, 0]],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/sampling/training_shapes.json"))
    parser.add_argument("--work", type=Path, default=Path("output/sampling/shapes"))
    every = [*WAYS, *NOISES]
    parser.add_argument("--ways", nargs="+", default=every, choices=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--bins", type=int, default=14, help="bins along each side of a RoI (default 14)"
    )
    parser.add_argument("--finest", action="store_true", help="read all RoIs from the finest map")
    parser.add_argument("--train-images", type=int, default=400)
    parser.add_argument(
        "--objects",
        type=int,
        nargs=2,
        default=[1200, 800],
        help="largest numbers of training and test objects",
    )
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument(
        "--conv-dims", type=int, nargs="+", default=[16, 16], help="channels of the heads"
    )
    add_case_arguments(parser)
    args = parser.parse_args()
    if BASELINE not in args.ways:
        parser.error(f"--ways needs {BASELINE!r}, which the others are compared with")
    case = case_of(args)
    pooling = args.bins, args.finest, args.ways
    limits = (args.train_images, args.objects[0]), (args.images, args.objects[1])
    train, test = (
        kept_objects(args.work, case, split, limit, *pooling)
        for split, limit in zip(("TRAIN", "TEST"), limits, strict=True)
    )
    num_classes = case.cfg.MODEL.ROI_HEADS.NUM_CLASSES
    schedule = Schedule(args.iterations, 32, 5e-3, args.conv_dims)
    digest = settings_digest(case, limits, pooling[:2], args.iterations, args.conv_dims)
    start, ious = time.perf_counter(), {way: [] for way in args.ways}
    for seed in args.seeds:
        for way in args.ways:
            kept = args.work / f"{digest}-{way.replace(' ', '_')}-{seed}.npy"
            if not kept.exists():
                np.save(kept, train_way((train, test), num_classes, way, seed, schedule))
                print(f"{way}, seed {seed}: {100 * np.load(kept).mean():.2f}", flush=True)
            ious[way].append(np.load(kept))
    groups = np.array(group_of_each_image(args))[test["images"].numpy()]
    rows = compare({way: np.stack(x) for way, x in ious.items()}, groups)
    shown = [{k: v for k, v in row.items() if k != "by seed"} for row in rows]
    print(tabulate(shown, headers="keys", tablefmt="github"))
    is_usual = args.bins == case.mask_pooler.output_size[0] and not args.finest
    own = own_head(case, test, groups) if is_usual else []
    errors = feature_errors(test["features"]) if EXACT in args.ways else {}
    ceiling = image_iou(test["targets"].float(), test["boxes"], test["truth"])
    facts = {
        "name": args.name,
        "bins": args.bins,
        "finest": args.finest,
        "seeds": args.seeds,
        "opts": args.opts,
        "iterations": args.iterations,
        "channels": args.conv_dims,
        "feature error": errors,
        "ceiling": round(100 * float(ceiling.mean()), 2),
        "objects": {"train": len(train["classes"]), "test": len(test["classes"])},
        "images": len(test["images"].unique()),
        "groups of images": len(np.unique(groups)),
        "seconds": round(time.perf_counter() - start),
    }
    tables = {"own head": own, "rows": rows}
    write_json({**machine("cpu"), **case.facts, **facts, **tables}, args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
