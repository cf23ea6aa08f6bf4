#!/usr/bin/env python3
r"""Compares independent and competing masks on the feature maps of a trained model.

The maps are pooled within true boxes, and four kinds of mask head are trained on them from scratch:
a sigmoid for the object's own class, a softmax over the classes, a sigmoid for every class, and one
mask for all classes. Their logits are turned into masks in several ways. Intervals allow for
the choice of images and for training noise, and hold jointly for all rows. The model that produced
the maps was trained with a sigmoid. True boxes and classes are given, so errors in boxes and
classes play no part.

    python benchmarks/mask_real_images.py --work output/masks/shapes \
        --output output/masks/shapes.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from branch_alone import Objects, Schedule, mask_iou, predict, train_head
from detectron2.data import MetadataCatalog
from every_class import every_class_cross_entropy, own_class
from mask_readouts import any_class, at_threshold, largest
from measure import machine, write_json
from sampling_case import BASELINE, add_case_arguments, case_of, group_of_each_image
from sampling_training import image_iou, pooled_objects, statistics
from tabulate import tabulate
from torch import Tensor

from mask_head_plugin.evaluation.difference import difference_of
from mask_head_plugin.modeling.mask_loss import softmax_probs

FloatArray = npt.NDArray[np.float64]
ARMS = {
    "sigmoid": "binary_cross_entropy",
    "softmax": "softmax_cross_entropy",
    "sigmoid of every class": every_class_cross_entropy.__name__,
    "class-agnostic": "binary_cross_entropy",
}
OWN, SOFTMAX, LARGEST = "own class against background", "softmax at 0.5", "largest"
ANY = "any class against background"
READINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    OWN: own_class,
    SOFTMAX: softmax_probs,
    LARGEST: largest,
    ANY: any_class,
}
TUNED = {"own class, tuned": own_class, "softmax, tuned": softmax_probs}
THRESHOLDS = np.linspace(0.05, 0.95, 19)


def objects_of(data: dict[str, Any]) -> Objects:
    """Converts the result of ``pooled_objects`` to the inputs of ``train_head``."""
    features = data["features"][BASELINE].contiguous(memory_format=torch.channels_last)
    return Objects(features, data["targets"], data["classes"])


def read(
    arm: str, num_classes: int, seed: int, schedule: Schedule, data: tuple[Any, Any]
) -> dict[str, FloatArray]:
    """Trains a head and returns the (R,) IoUs of the test objects for each reading.

    Thresholds are tuned on the objects that the head was trained on.
    """
    learned, measured = objects_of(data[0]), objects_of(data[1])
    outputs = 1 if arm == "class-agnostic" else num_classes
    head = train_head(learned, outputs, seed, schedule, [(ARMS[arm], 1.0)])
    classes = [x.classes * (outputs > 1) for x in (learned, measured)]
    logits = [predict(head, x, all_classes=True) for x in (learned, measured)]
    probs = {name: reading(logits[1], classes[1]) for name, reading in READINGS.items()}
    for name, reading in TUNED.items():
        known = reading(logits[0], classes[0])
        reached = [float(mask_iou(known > t, learned.targets).mean()) for t in THRESHOLDS]
        threshold = float(THRESHOLDS[int(np.argmax(reached))])
        probs[name] = at_threshold(threshold, reading)(logits[1], classes[1])
    boxes, truth = data[1]["boxes"], data[1]["truth"]
    return {name: image_iou(x, boxes, truth) for name, x in probs.items()}


def compare(
    ious: dict[tuple[str, str], list[FloatArray]], groups: FloatArray
) -> list[dict[str, Any]]:
    """Returns the mean IoU of each arm and reading, and its difference from the sigmoid's."""
    values = {key: statistics(np.stack(x), groups)["mean IoU"] for key, x in ious.items()}
    rows = []
    for (arm, reading), own in values.items():
        base_reading = TUNED_OF.get(reading, OWN)
        base = values["sigmoid", base_reading]
        found = difference_of("IoU", own, base, len(np.unique(groups)), len(values) - 2)
        rows.append(
            {
                "arm": arm,
                "reading": reading,
                "seeds": len(own),
                "iou": round(found.value, 2),
                "std": round(found.seed_std, 2),
                "difference": round(found.difference, 2),
                "low": round(found.low, 2),
                "high": round(found.high, 2),
            }
        )
    return rows


TUNED_OF = {name: "own class, tuned" for name in TUNED}
"""Rows with a tuned threshold are compared with the sigmoid whose threshold is tuned as well."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the results of the training runs"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--bins", type=int, default=14, help="bins along each side of a RoI (default 14)"
    )
    parser.add_argument("--train-images", type=int, default=400)
    parser.add_argument(
        "--objects",
        type=int,
        nargs=2,
        default=[1200, 800],
        help="maximum numbers of training and test objects",
    )
    parser.add_argument("--iterations", type=int, default=1000)
    add_case_arguments(parser)
    args = parser.parse_args()
    case = case_of(args)
    pooling = args.bins, False, [BASELINE]
    train = pooled_objects(case, "TRAIN", (args.train_images, args.objects[0]), *pooling)
    test = pooled_objects(case, "TEST", (args.images, args.objects[1]), *pooling)
    num_classes = case.cfg.MODEL.ROI_HEADS.NUM_CLASSES
    schedule = Schedule(args.iterations, 32, 5e-3, (16, 16))
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    ious: dict[tuple[str, str], list[FloatArray]] = {}
    for seed in args.seeds:
        for arm in ARMS:
            kept = args.work / f"{arm}-{args.iterations}-{seed}.npz"
            if not kept.exists():
                np.savez(kept, **read(arm, num_classes, seed, schedule, (train, test)))
                print(f"{arm}, seed {seed}: {100 * np.load(kept)[OWN].mean():.2f}", flush=True)
            for reading, values in np.load(kept).items():
                if arm == "softmax" or reading in (OWN, "own class, tuned"):
                    ious.setdefault((arm, reading), []).append(values)
    groups = np.array(group_of_each_image(args))[test["images"].numpy()]
    rows = compare(ious, groups)
    print(tabulate(rows, headers="keys"))
    names = MetadataCatalog.get(case.cfg.DATASETS.TEST[0]).thing_classes
    counts = torch.bincount(test["classes"], minlength=num_classes).tolist()
    facts = {
        "name": args.name,
        "bins": args.bins,
        "classes": num_classes,
        "iterations": args.iterations,
        "objects": {"train": len(train["classes"]), "test": len(test["classes"])},
        "objects by class": dict(zip(names, counts, strict=True)),
        "images": len(test["images"].unique()),
        "groups of images": len(np.unique(groups)),
        "seconds": round(time.perf_counter() - start),
    }
    write_json({**machine("cpu"), **case.facts, **facts, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
