"""Computes the interval of a difference between two models, covering both images and training.

AP changes if you train with another seed, and it also changes if you evaluate on other images. A
difference counts as real only if it is larger than both effects can explain. Its variance has two
parts:

- images: for each bootstrap draw of the images, take the mean of each model over its seeds, and the
  difference between the two means. This part is the variance of this difference over the draws.
- training: each model's variance over seeds, divided by its number of seeds, as in Welch's test.
  Some of this variance arises because models with different seeds get different images right. The
  variance over images already includes this effect, so the effect is estimated with the bootstrap
  and subtracted here.

A variance that is estimated from few seeds is uncertain. The interval therefore uses Student's t
with Satterthwaite's (1946) degrees of freedom for a sum of variances. With three seeds, there are 2
to 4 degrees of freedom if training dominates, and up to the number of images if images dominate.

benchmarks/interval_coverage.py checks the interval in simulated studies whose true difference is
known.

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
"""Probability that an interval contains the true difference.

If several variants are compared with a baseline, this is the probability that all intervals contain
the true differences.
"""

POWER_ERRORS = 0.84
"""How far a true difference must exceed half the interval's width, in standard errors, so that 80%
of studies find it.
"""


@dataclass(frozen=True)
class SeedSpread:
    """How much a model's metric varies over seeds, in percent.

    Attributes:
        std: standard deviation over seeds, with N - 1 in the denominator.
        beyond_images: the same without the part that resampling images already includes.
    """

    std: float
    beyond_images: float


@dataclass(frozen=True)
class Spread:
    """What makes a difference uncertain: the images and the seeds of both models.

    Attributes:
        of_images: standard error of the difference over draws of the images, in percent.
        variant: spread of the variant over seeds.
        baseline: spread of the baseline over seeds.
    """

    of_images: float
    variant: SeedSpread
    baseline: SeedSpread


@dataclass(frozen=True)
class PairedDifference:
    """A metric of a variant compared with a baseline, in percent.

    Values are nan if no object counts for the metric.

    Attributes:
        metric: one of METRICS.
        value: mean of the variant over its training seeds.
        baseline: mean of the baseline over its training seeds.
        difference: value - baseline.
        low: lower end of the interval of the difference. The interval covers images and training if
            ``has_training``, otherwise only images.
        high: upper end of the same interval.
        image_low: lower end of the 95% interval that covers only images, which is the 2.5th
            percentile of the draws.
        image_high: upper end of the same interval, which is the 97.5th percentile.
        seed_std: standard deviation of the variant over its seeds, with N - 1 in the denominator;
            nan with one seed.
        detectable: smallest true difference that 80% of studies like this one would find, which
            means that their interval excludes 0. It is more than half the interval's width, because
            studies miss a true difference of half the width in half of all cases.
        has_training: whether both models have at least two seeds.
        spread: what the interval was computed from; None unless ``has_training``.
        is_cut: whether an end of the interval was cut because the metric cannot lie beyond it.
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
    spread: Spread | None = None
    is_cut: bool = False


def difference_of(
    metric: str,
    variant: FloatArray,
    baseline: FloatArray,
    num_images: int,
    num_compared: int = 1,
    possible: tuple[float, float] = (-math.inf, math.inf),
) -> PairedDifference:
    """Computes the difference between two models and its interval.

    Args:
        metric: name of the metric.
        variant: (N, 1 + S) values for each seed: the first value is for the original images, the
            others are for the draws. The draws are the same for all seeds and both models.
        baseline: values of the baseline in the same form; N may differ.
        num_images: number of images that the draws are made from.
        num_compared: number of variants that are compared with the same baseline. All intervals
            together contain all true differences 95% of the time (Bonferroni). Each is therefore a
            100 - 5 / num_compared percent interval.
        possible: smallest and largest possible value of the metric. The interval is cut where the
            variant's value would lie outside.
    """
    value, base = variant.mean(axis=0), baseline.mean(axis=0)
    drawn = (value - base)[1:]
    drawn = drawn[~np.isnan(drawn)]
    difference = float(value[0] - base[0])
    tail = 100 * (1 - LEVEL) / 2
    image_low, image_high = (
        np.percentile(drawn, [tail, 100 - tail]) if len(drawn) else (np.nan, np.nan)
    )
    error = float(drawn.std(ddof=1)) if len(drawn) > 1 else math.nan
    spread = None
    if min(len(variant), len(baseline)) > 1:
        spread = Spread(error, _seed_spread(variant), _seed_spread(baseline))
        error, freedom = _error(spread, (len(variant), len(baseline)), num_images)
        reach = student_t(1 - (1 - LEVEL) / num_compared / 2, freedom)
        low, high = difference - reach * error, difference + reach * error
    else:
        reach = student_t(1 - (1 - LEVEL) / 2, math.inf)
        low, high = float(image_low), float(image_high)
    least, most = (float(end - base[0]) for end in possible)
    return PairedDifference(
        metric=metric,
        value=float(value[0]),
        baseline=float(base[0]),
        difference=difference,
        low=max(low, least),
        high=min(high, most),
        image_low=float(image_low),
        image_high=float(image_high),
        seed_std=float(variant[:, 0].std(ddof=1)) if len(variant) > 1 else math.nan,
        detectable=(reach + POWER_ERRORS) * error,
        has_training=spread is not None,
        spread=spread,
        is_cut=low < least or high > most,
    )


def detectable_difference(
    num_seeds: int, spread: Spread, num_images: int, num_compared: int = 1
) -> float:
    """Returns the smallest true difference that a study finds 80% of the time.

    For the number of seeds with which the spread was measured, this is
    ``PairedDifference.detectable``.

    Args:
        num_seeds: number of seeds of each of the two models; at least 2.
        spread: how much results vary.
        num_images: number of images that the draws are made from.
        num_compared: see difference_of.
    """
    error, freedom = _error(spread, (num_seeds, num_seeds), num_images)
    reach = student_t(1 - (1 - LEVEL) / num_compared / 2, freedom)
    return (reach + POWER_ERRORS) * error


def _seed_spread(values: FloatArray) -> SeedSpread:
    """Measures the spread over the N seeds of a model; see difference_of for the (N, 1 + S) values.

    N is at least 2.
    """
    num_seeds = len(values)
    variance = float(values[:, 0].var(ddof=1))
    draws = values[:, 1:][:, ~np.isnan(values[:, 1:]).any(axis=0)]
    # Variance of a seed's distance from the mean of all seeds. Dividing by N - 1 instead of N
    # turns it into the variance of a single seed.
    between = 0.0
    if draws.shape[1] > 1:
        between = float((draws - draws.mean(axis=0)).var(axis=1, ddof=1).mean())
        between *= num_seeds / (num_seeds - 1)
    return SeedSpread(math.sqrt(variance), math.sqrt(max(variance - between, 0.0)))


def _error(spread: Spread, nums_seeds: tuple[int, int], num_images: int) -> tuple[float, float]:
    """Returns the standard error of a difference and its degrees of freedom."""
    of_images = spread.of_images**2
    total, squares = of_images, of_images**2 / max(num_images - 1, 1)
    for of_seeds, num_seeds in zip((spread.variant, spread.baseline), nums_seeds, strict=True):
        total += of_seeds.beyond_images**2 / num_seeds
        squares += (of_seeds.std**2 / num_seeds) ** 2 / (num_seeds - 1)
    if not (math.isfinite(total) and squares > 0):
        return math.sqrt(total) if total >= 0 else math.nan, math.inf
    return math.sqrt(total), max(total**2 / squares, min(nums_seeds) - 1)


def student_t(probability: float, freedom: float) -> float:
    """Returns the quantile of Student's t distribution, for probabilities of 0.5 and above."""
    # The degrees of freedom are only an estimate. Rounding them makes most calls hit the cache.
    return _student_t(probability, round(freedom, 1) if freedom < MANY_DEGREES else math.inf)


MANY_DEGREES = 1000.0
"""Number of degrees of freedom from which the normal distribution is used instead. The error is
about 0.1%.
"""


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
