"""Estimates how many seeds and images an ablation needs to show a difference."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.difference import SeedSpread, Spread, detectable_difference
from ..messages import counted
from .report.study import Study, read_study
from .trial_folder import ABLATION_FILE, FINISHED, TRIAL_FILE, read_object

ASSUMED_SEED_STD = 2.7
"""Standard deviation over seeds, in percent AP, assumed until a variant and the baseline
have two finished trials.

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
INTERVAL_OF_NORMAL = 2 * 1.96
"""Width of the 95% interval of a normal distribution, in standard errors."""


@dataclass(frozen=True)
class Spreads:
    """How much results vary with seeds and images, in percent AP.

    Attributes:
        of_comparisons: spreads of each comparison with the baseline; at least one.
        seeds_from: number of trials that the spread over seeds was measured on; 0 if it is assumed.
        images_from: number of comparisons that the spread over images was measured on; 0 if it is
            assumed.
        num_images: size of the test set.
    """

    of_comparisons: tuple[Spread, ...]
    seeds_from: int
    images_from: int
    num_images: int

    @property
    def seed_stds(self) -> list[float]:
        both = ((x.variant.std, x.baseline.std) for x in self.of_comparisons)
        return [std for pair in both for std in pair]

    @property
    def image_errors(self) -> list[float]:
        return [x.of_images for x in self.of_comparisons]


def measured_spreads(output: Path, num_draws: int) -> Spreads:
    """Measures the spreads from an ablation's finished trials, as the report does.

    Uses the assumed values for spreads that cannot be measured yet.

    Args:
        output: the ablation's folder, which need not exist.
        num_draws: number of bootstrap draws of the images.
    """
    assumed = SeedSpread(ASSUMED_SEED_STD, ASSUMED_SEED_STD)
    unknown = Spread(ASSUMED_IMAGE_ERROR, assumed, assumed)
    records = map(read_object, output.glob(f"*/seed_*/{TRIAL_FILE}"))
    has_finished = any(record.get("status") == FINISHED for record in records)
    if not has_finished or not (output / ABLATION_FILE).exists():
        return Spreads((unknown,), 0, 0, ASSUMED_IMAGES)
    study = read_study(output, num_draws)
    compared = {v.name: c for v in study.variants if (c := study.comparison(v)) is not None}
    known = {name: c.spread for name, c in compared.items() if c.spread is not None}
    if known:
        names = {study.baseline.name, *known}
        num_trials = sum(len(v.finished) for v in study.variants if v.name in names)
        return Spreads(tuple(known.values()), num_trials, len(known), _num_images(study))
    errors = [(c.image_high - c.image_low) / INTERVAL_OF_NORMAL for c in compared.values()]
    errors = [error for error in errors if math.isfinite(error) and error > 0]
    if not errors:
        return Spreads((unknown,), 0, 0, ASSUMED_IMAGES)
    spreads = tuple(Spread(error, assumed, assumed) for error in errors)
    return Spreads(spreads, 0, len(errors), _num_images(study))


def _num_images(study: Study) -> int:
    return len(study.matches(study.task)[study.baseline.name][0].image_ids)


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
    """Returns the smallest true difference that 80% of studies of this size would show.

    If this depends on the variant, returns the largest of the variants' values.
    """
    return max(detectable_each(spreads, num_seeds, num_images, num_compared))


def detectable_each(
    spreads: Spreads, num_seeds: int, num_images: int, num_compared: int
) -> list[float]:
    """Returns ``detectable`` for each comparison."""
    shrink = math.sqrt(spreads.num_images / num_images)
    return [
        detectable_difference(
            num_seeds,
            dataclasses.replace(spread, of_images=spread.of_images * shrink),
            num_images,
            num_compared,
        )
        for spread in spreads.of_comparisons
    ]


def power_lines(
    output: Path, metric: str, wanted: float, num_seeds: int, num_compared: int, num_draws: int
) -> list[str]:
    """Returns sentences that say what a planned ablation can show.

    Args:
        output: the ablation's folder, which need not exist.
        metric: name of the metric, such as ``segm/AP``.
        wanted: the difference that you want to show, in percent AP.
        num_seeds: planned number of seeds.
        num_compared: number of variants compared with the baseline.
        num_draws: number of bootstrap draws of the images.
    """
    spreads = measured_spreads(output, num_draws)
    images = spreads.num_images
    lines = [
        f"Spread of {metric}: {_extent(spreads.seed_stds)} between seeds "
        f"({_source(spreads.seeds_from, 'trial', 'two trials of the baseline and of a variant')}), "
        f"{_extent(spreads.image_errors)} from {counted(images, 'image')} "
        f"({_source(spreads.images_from, 'comparison', 'the baseline and a variant')})"
    ]
    if num_seeds > 1:
        planned = detectable_each(spreads, num_seeds, images, num_compared)
        depends = ", depending on the variant" if len({f"{x:.2f}" for x in planned}) > 1 else ""
        lines.append(
            f"To be found in four of five studies with {num_seeds} seeds, a true difference must "
            f"be at least {_extent(planned)}{depends}"
        )
    else:
        lines.append("1 seed cannot show a difference: its interval ignores the noise of training")
    for factor in IMAGE_FACTORS:
        needed = seeds_needed(wanted, spreads, images * factor, num_compared)
        tested = counted(images * factor, "image")
        lines.append(
            f"With {tested}, no practical number of seeds shows a difference of {wanted:g}"
            if needed is None
            else f"With {tested}, a difference of {wanted:g} needs {needed} seeds per variant"
        )
        if needed is not None:
            break
    return lines


def _extent(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _source(number: int, what: str, needed: str) -> str:
    if not number:
        return f"assumed until {needed} have finished"
    return f"measured on {counted(number, what)}"
