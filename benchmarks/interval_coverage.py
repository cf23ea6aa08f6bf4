#!/usr/bin/env python3
"""Measures how often the interval of a difference in AP contains the true difference.

A simulated study has a baseline and a variant, each trained with several seeds and evaluated on the
same images. An image shows 1 to 8 objects. A detection finds its object if a normal random number
is below the sum of five qualities: those of the model, the seed, the image, the image for this
model, and the image for this seed. Otherwise, the detection is a false positive. The true
difference in AP is computed from a very large number of images and seeds.

The second table simulates studies like those of benchmarks/sampling_training.py, which compare two
kinds of head by the mean IoU of objects in a few images. Both heads start from the same weights and
see the same objects, so differences are taken seed by seed. A seed shifts the IoU of both heads by
the same amount, plus a small amount that differs between them.

Writes two tables, and a JSON file with machine, versions and date. Takes about 10 minutes on one
core.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, write_json
from tabulate import tabulate

from mask_head_plugin.evaluation.bootstrap import average_precision, compare, image_weights
from mask_head_plugin.evaluation.difference import difference_of
from mask_head_plugin.evaluation.matching import Matches
from mask_head_plugin.progress import progress

IMAGE, IMAGE_OF_MODEL, IMAGE_OF_SEED = 0.6, 0.3, 0.3
"""Standard deviations of the qualities, in units of the standard deviation of one detection."""
SEED = 0.1
MOST_OBJECTS = 8
OBJECT_OF_WAY, IMAGE_OF_WAY, SEED_OF_WAY = 0.015, 0.02, 0.0025
"""Standard deviations of the difference between two heads: for each object with each seed, for each
image, and for each seed."""
SAME, BETTER = 0.0, 0.3
"""How much the variant's quality exceeds the baseline's: two equal models, or a better variant."""

Generator = np.random.Generator


def make_matches(rng: Generator, num_objects: Any, quality: Any) -> Matches:
    """Returns the matches of a single class at IoU 0.5, for I images.

    Args:
        rng: source of the random numbers.
        num_objects: (I,), objects in each image.
        quality: (I,), quality of the detections in each image.
    """
    image = np.repeat(np.arange(len(num_objects)), num_objects)
    found = rng.normal(size=len(image)) < quality[image]
    scores = rng.normal(size=len(image)) + found
    return Matches(
        image_ids=np.arange(len(num_objects)),
        class_names=np.array(["object"]),
        area_names=np.array(["all"]),
        iou_thresholds=np.array([0.5]),
        dt_image=image,
        dt_class=np.zeros(len(image), np.int64),
        dt_score=scores,
        dt_matched=found[None, None],
        dt_ignored=np.zeros((1, 1, len(image)), bool),
        gt_image=image,
        gt_class=np.zeros(len(image), np.int64),
        gt_ignored=np.zeros((1, len(image)), bool),
    )


def make_study(
    rng: Generator, num_images: int, num_seeds: int, more_quality: float
) -> tuple[list[Matches], list[Matches]]:
    """Returns the matches of a variant and of a baseline."""
    num_objects = rng.integers(1, MOST_OBJECTS + 1, num_images)
    image = rng.normal(0, IMAGE, num_images)
    models = []
    for quality in (more_quality, 0.0):
        of_model = quality + image + rng.normal(0, IMAGE_OF_MODEL, num_images)
        models.append(
            [
                make_matches(
                    rng,
                    num_objects,
                    of_model + rng.normal(0, SEED) + rng.normal(0, IMAGE_OF_SEED, num_images),
                )
                for _ in range(num_seeds)
            ]
        )
    return models[0], models[1]


@lru_cache
def true_difference_of(more_quality: float) -> float:
    """Returns the mean difference in AP50, in percent, over 400 seeds with 500 images each."""
    rng = np.random.default_rng(1)
    differences = []
    for _ in range(400):
        variant, baseline = make_study(rng, 500, 1, more_quality)
        differences.append(
            average_precision(variant[0], "AP50") - average_precision(baseline[0], "AP50")
        )
    return float(np.mean(differences))


def simulate(
    num_seeds: int, num_studies: int, num_images: int, true_difference: float | None = None
) -> dict[str, Any]:
    """Returns a row: the percentage of studies whose interval contains the truth.

    Args:
        num_seeds: seeds per model.
        num_studies: studies to simulate.
        num_images: images per study.
        true_difference: 0 to compare two equal models, None to compare two that differ.
    """
    more = SAME if true_difference == 0 else BETTER
    truth = 0.0 if true_difference == 0 else true_difference_of(BETTER)
    rng = np.random.default_rng(num_seeds)
    holds, over_images, different, widths = 0, 0, 0, []
    for _ in progress(range(num_studies), f"{num_seeds} seeds", "study"):
        variant, baseline = make_study(rng, num_images, num_seeds, more)
        found = compare(variant, baseline, ["AP50"], num_draws=200, seed=0)["AP50"]
        holds += found.low <= truth <= found.high
        over_images += found.image_low <= truth <= found.image_high
        different += not found.low <= 0 <= found.high
        widths.append(found.high - found.low)
    return {
        "seeds": num_seeds,
        "true difference": round(truth, 2),
        "studies": num_studies,
        "contains the truth": 100 * holds / num_studies,
        "called different": 100 * different / num_studies,
        "images alone": 100 * over_images / num_studies,
        "width": round(float(np.mean(widths)), 2),
    }


def simulate_pairs(num_images: int, num_seeds: int, num_studies: int) -> dict[str, Any]:
    """Returns a row: the percentage of studies with paired heads whose interval contains 0.

    A seed's effect on both heads cancels in the differences, so only differences are drawn.
    """
    rng, holds = np.random.default_rng(num_images), 0
    drawn = np.concatenate(
        [np.ones((1, num_images), np.int32), image_weights(num_images, 200, seed=0)]
    )
    for _ in progress(range(num_studies), f"{num_images} images, pairs", "study"):
        num_objects = rng.integers(1, MOST_OBJECTS + 1, num_images)
        of_image = rng.normal(0, IMAGE_OF_WAY, num_images)
        spread = OBJECT_OF_WAY / np.sqrt(num_objects)
        means = of_image + rng.normal(0, spread, (num_seeds, num_images))
        means += rng.normal(0, SEED_OF_WAY, (num_seeds, 1))
        weights = drawn * num_objects
        change = 100 * (means @ weights.T) / weights.sum(1)
        found = difference_of("mean IoU", change, np.zeros_like(change), num_images)
        holds += found.low <= 0 <= found.high
    return {
        "images": num_images,
        "seeds": num_seeds,
        "studies": num_studies,
        "contains the truth": 100 * holds / num_studies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/intervals.json"))
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10])
    args = parser.parse_args()
    rows = [
        simulate(num_seeds, args.studies, args.images, truth)
        for truth in (0.0, None)
        for num_seeds in args.seeds
    ]
    pairs = [simulate_pairs(num_images, 5, 4 * args.studies) for num_images in (8, 40, 100)]
    for table in (rows, pairs):
        print(tabulate(table, headers="keys", tablefmt="github"))
    content = {**machine("cpu"), "images": args.images, "rows": rows, "pairs": pairs}
    write_json(content, args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
