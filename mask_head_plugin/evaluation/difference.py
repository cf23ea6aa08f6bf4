"""The interval of a difference between two models that holds images and training.

Train again with another seed and AP changes; draw other validation images and it changes again. A
difference is taken for real only if it is larger than both can explain. Two sources, two variances:

- images: the variance of the difference of the means over seeds, over draws of the images
  (bootstrap).
- training: the variance over seeds of each model divided by its number of seeds, as in Welch's
  test. What of it lies in how seeds differ from image to image is in the first already, and is
  subtracted: the bootstrap tells how much that is.

Few seeds estimate a variance badly, so the interval takes Student's t, with the degrees of freedom
of Satterthwaite (1946) for a sum of variances: from 2 to 4 where training dominates three seeds, up
to the number of images where images do.

benchmarks/interval_coverage.py simulates studies of which the truth is known.

Shape alphabet: N seeds, S draws.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import mpmath
import numpy as np

from .matching import FloatArray

LEVEL = 0.95
"""How often an interval holds the true difference; of several at once, all of theirs."""

POWER_ERRORS = 0.84
"""Standard errors above the limit of the interval from which 80% of studies find a difference."""


@dataclass(frozen=True)
class PairedDifference:
    """A metric of one model against a baseline's, in percent; nan where nothing counts.

    Attributes:
        metric: one of METRICS.
        value: of the variant, the mean over its training seeds.
        baseline: likewise.
        difference: value - baseline.
        low: of the interval of the difference. It holds images and training if ``has_training``,
            else images alone.
        high: likewise.
        image_low: of the 95% interval over images alone: the 2.5th percentile of the draws.
        image_high: the 97.5th.
        seed_std: standard deviation of the variant's value over its seeds (with N - 1 in the
            denominator); nan with one seed.
        detectable: how large the true difference would have to be for studies like this one to
            find it (its interval without 0) 80% of the time. Half the interval's width would be too
            little: a true difference of that size is missed every other time.
        has_training: whether both models have two seeds or more.
    """

    metric: str
    value: float
    baseline: float
    difference: float
    low: float
    high: float
    image_low: float
    image_high: float
    seed_std: float
    detectable: float
    has_training: bool


def difference_of(
    metric: str, variant: FloatArray, baseline: FloatArray, num_images: int, num_compared: int = 1
) -> PairedDifference:
    """Returns how two models differ.

    Args:
        metric: its name.
        variant: (N, 1 + S) values, of the images as they are and then of the draws, which are the
            same for all seeds and both models.
        baseline: likewise; N may differ.
        num_images: that were drawn from.
        num_compared: variants that are compared with one baseline. Their intervals hold all true
            differences at once 95% of the time (Bonferroni): each is as wide as one of
            100 - 5 / num_compared percent.
    """
    value, base = variant.mean(axis=0), baseline.mean(axis=0)
    drawn = (value - base)[1:]
    drawn = drawn[~np.isnan(drawn)]
    difference = float(value[0] - base[0])
    tail = 100 * (1 - LEVEL) / 2
    image_low, image_high = (
        np.percentile(drawn, [tail, 100 - tail]) if len(drawn) else (np.nan, np.nan)
    )
    has_training = min(len(variant), len(baseline)) > 1
    error = float(drawn.std(ddof=1)) if len(drawn) > 1 else math.nan
    if has_training:
        error, freedom = _error_of_both(variant, baseline, error**2, num_images)
        reach = student_t(1 - (1 - LEVEL) / num_compared / 2, freedom)
        low, high = difference - reach * error, difference + reach * error
    else:
        reach = student_t(1 - (1 - LEVEL) / 2, math.inf)
        low, high = float(image_low), float(image_high)
    return PairedDifference(
        metric=metric,
        value=float(value[0]),
        baseline=float(base[0]),
        difference=difference,
        low=low,
        high=high,
        image_low=float(image_low),
        image_high=float(image_high),
        seed_std=float(variant[:, 0].std(ddof=1)) if len(variant) > 1 else math.nan,
        detectable=(reach + POWER_ERRORS) * error,
        has_training=has_training,
    )


def detectable_difference(
    num_seeds: int, seed_std: float, image_error: float, num_images: int, num_compared: int = 1
) -> float:
    """Returns how large a true difference must be for a study to show it 80% of the time.

    Args:
        num_seeds: of each of the two models, 2 or more.
        seed_std: standard deviation of the metric over seeds.
        image_error: standard error of the difference over draws of the images.
        num_images: that were drawn from.
        num_compared: see difference_of.
    """
    of_seeds = seed_std**2 / num_seeds
    total = image_error**2 + 2 * of_seeds
    spread = image_error**4 / max(num_images - 1, 1) + 2 * of_seeds**2 / (num_seeds - 1)
    freedom = max(total**2 / spread, num_seeds - 1) if spread > 0 else math.inf
    reach = student_t(1 - (1 - LEVEL) / num_compared / 2, freedom)
    return (reach + POWER_ERRORS) * math.sqrt(total)


def _error_of_both(
    variant: FloatArray, baseline: FloatArray, of_images: float, num_images: int
) -> tuple[float, float]:
    """Returns the standard error of a difference and its degrees of freedom."""
    total, spread = of_images, of_images**2 / max(num_images - 1, 1)
    for values in (variant, baseline):
        num_seeds = len(values)
        of_seeds = float(values[:, 0].var(ddof=1)) / num_seeds
        draws = values[:, 1:][:, ~np.isnan(values[:, 1:]).any(axis=0)]
        # Of a seed's distance to the mean of all; the factor makes it that of a seed by itself.
        between = 0.0
        if draws.shape[1] > 1:
            between = (draws - draws.mean(axis=0)).var(axis=1, ddof=1).mean() / (num_seeds - 1)
        total += max(of_seeds - float(between), 0.0)
        spread += of_seeds**2 / (num_seeds - 1)
    if not (math.isfinite(total) and spread > 0):
        return math.sqrt(total) if total >= 0 else math.nan, math.inf
    least = min(len(variant), len(baseline)) - 1
    return math.sqrt(total), max(total**2 / spread, least)


def student_t(probability: float, freedom: float) -> float:
    """Returns the quantile of Student's t distribution, for probabilities of 0.5 and above."""
    # Of rounded degrees of freedom, which are an estimate: so most calls find an answer there.
    return _student_t(probability, round(freedom, 1) if freedom < MANY_DEGREES else math.inf)


MANY_DEGREES = 1000.0
"""From here on the normal distribution, which is 0.1% off."""


@functools.lru_cache(maxsize=4096)
def _student_t(probability: float, freedom: float) -> float:
    def above(t: float) -> float:
        if math.isinf(freedom):
            return 0.5 * math.erfc(t / math.sqrt(2))
        x = freedom / (freedom + t * t)
        return 0.5 * float(mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True))

    low, high = 0.0, 1.0
    while above(high) > 1 - probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) > 1 - probability else (low, middle)
    return high
