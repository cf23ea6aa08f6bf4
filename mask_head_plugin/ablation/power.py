"""Estimates how many seeds and images an ablation needs to show a difference."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.difference import detectable_difference
from ..messages import counted
from .report.study import Study, read_study
from .trial_folder import ABLATION_FILE

ASSUMED_SEED_STD = 2.7
"""Standard deviation over seeds, in percent AP, assumed until a variant has two finished trials.

The value is the root mean square of the standard deviations of the two variants in
configs/ablations/independent_vs_softmax.yaml on the embedded data set (docs/independent_masks.md).
"""
ASSUMED_IMAGE_ERROR = 0.6
"""Standard error of a difference in AP that is due to testing on only ASSUMED_IMAGES images.

The value comes from the same study and is assumed until variants can be compared.
"""
ASSUMED_IMAGES = 200
MOST_SEEDS = 1000
IMAGE_FACTORS = (1, 4, 16)
"""Factors by which to enlarge the test set, tried in this order until a plan is feasible."""
DRAWS = 200
INTERVAL_OF_NORMAL = 2 * 1.96
"""Width of the 95% interval of a normal distribution, in standard errors."""


@dataclass(frozen=True)
class Spreads:
    """How much results vary with seeds and images, in percent AP.

    Attributes:
        seed_std: standard deviation of the metric over seeds.
        seeds_from: number of trials that seed_std was measured on; 0 if it is assumed.
        image_error: standard error of a difference that is due to testing on only ``num_images``
            images.
        images_from: number of comparisons that image_error was measured on; 0 if it is assumed.
        num_images: size of the test set.
    """

    seed_std: float
    seeds_from: int
    image_error: float
    images_from: int
    num_images: int


def measured_spreads(output: Path) -> Spreads:
    """Measures the spreads on an ablation's finished trials.

    Uses the assumed values for spreads that cannot be measured yet.
    """
    study = read_study(output, DRAWS) if (output / ABLATION_FILE).exists() else None
    stds = [] if study is None else [v for v in study.variants if len(v.values(study.metric)) > 1]
    seed_std, seeds_from = ASSUMED_SEED_STD, 0
    if study is not None and stds:
        seeds_from = sum(len(variant.values(study.metric)) for variant in stds)
        seed_std = math.sqrt(statistics.mean(v.std(study.metric) ** 2 for v in stds))
    errors = [] if study is None else _image_errors(study)
    if study is None or not errors:
        return Spreads(seed_std, seeds_from, ASSUMED_IMAGE_ERROR, 0, ASSUMED_IMAGES)
    num_images = len(study.matches(study.task)[study.baseline.name][0].image_ids)
    return Spreads(seed_std, seeds_from, statistics.mean(errors), len(errors), num_images)


def _image_errors(study: Study) -> list[float]:
    """Returns the standard error due to the images for each comparison that has an interval."""
    found = [study.comparison(variant) for variant in study.variants]
    widths = [c.image_high - c.image_low for c in found if c is not None]
    return [width / INTERVAL_OF_NORMAL for width in widths if math.isfinite(width) and width > 0]


def seeds_needed(wanted: float, spreads: Spreads, num_images: int, num_compared: int) -> int | None:
    """Returns how many seeds per variant are needed; None if more than MOST_SEEDS.

    Args:
        wanted: the true difference to show, in percent AP.
        spreads: result of ``measured_spreads``.
        num_images: size of the test set.
        num_compared: number of variants compared with the baseline.
    """

    def is_enough(num_seeds: int) -> bool:
        found = detectable(spreads, num_seeds, num_images, num_compared)
        return found <= wanted

    low, high = 1, MOST_SEEDS
    if not is_enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def detectable(spreads: Spreads, num_seeds: int, num_images: int, num_compared: int) -> float:
    """Returns the smallest true difference that 80% of studies of this size would show."""
    image_error = spreads.image_error * math.sqrt(spreads.num_images / num_images)
    return detectable_difference(num_seeds, spreads.seed_std, image_error, num_images, num_compared)


def power_lines(
    output: Path, metric: str, wanted: float, num_seeds: int, num_compared: int
) -> list[str]:
    """Returns sentences that say what a planned ablation can show.

    Args:
        output: the ablation's folder, which need not exist.
        metric: name of the metric, such as ``segm/AP``.
        wanted: the difference that you want to show, in percent AP.
        num_seeds: planned number of seeds.
        num_compared: number of variants compared with the baseline.
    """
    spreads = measured_spreads(output)
    images = spreads.num_images
    lines = [
        f"Spread of {metric}: {spreads.seed_std:.2f} between seeds "
        f"({_source(spreads.seeds_from, 'trial')}), {spreads.image_error:.2f} "
        f"from {counted(images, 'image')} ({_source(spreads.images_from, 'comparison')})"
    ]
    if num_seeds > 1:
        planned = detectable(spreads, num_seeds, images, num_compared)
        lines.append(
            f"With {num_seeds} seeds, 4 of 5 studies would show a true difference of {planned:.2f}"
        )
    else:
        lines.append("1 seed cannot show a difference: its interval ignores the noise of training")
    for factor in IMAGE_FACTORS:
        needed = seeds_needed(wanted, spreads, images * factor, num_compared)
        seeds = (
            "an impractical number of seeds" if needed is None else f"{needed} seeds per variant"
        )
        lines.append(
            f"A difference of {wanted:g} needs {seeds} with {counted(images * factor, 'image')}"
        )
        if needed is not None:
            break
    return lines


def _source(number: int, what: str) -> str:
    return (
        f"measured on {counted(number, what)}" if number else "assumed until trials have finished"
    )
