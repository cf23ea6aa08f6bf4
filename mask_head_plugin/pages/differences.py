"""Describes the difference between two models: better, worse, or within noise."""

from __future__ import annotations

import math

from ..evaluation.difference import PairedDifference
from .tables import number

BETTER, WORSE, NOISE = "better", "worse", "within noise"
ONE_SEED = "one seed: unknown"
MARKS = {BETTER: "▲ ", WORSE: "▼ ", NOISE: "≈ ", ONE_SEED: "? "}


def verdict(comparison: PairedDifference) -> str:
    """Returns the verdict of a comparison; empty if it has no interval.

    If the interval covers only the choice of images, the verdict is NOISE or ONE_SEED, but never
    BETTER or WORSE, because another training might reverse the difference.
    """
    found = verdict_of_images(comparison)
    return found if found in ("", NOISE) or comparison.has_training else ONE_SEED


def verdict_of_images(comparison: PairedDifference) -> str:
    """Returns the verdict for these two trained models; empty if there is no interval."""
    if not (math.isfinite(comparison.low) and math.isfinite(comparison.high)):
        return ""
    if comparison.low <= 0 <= comparison.high:
        return NOISE
    return BETTER if comparison.low > 0 else WORSE


def with_interval(comparison: PairedDifference, decimals: int = 2) -> str:
    """Formats a difference and its interval as ``+0.50 (-0.10 to +1.10)``."""
    values = comparison.difference, comparison.low, comparison.high
    difference, low, high = (number(x, f"+.{decimals}f") for x in values)
    return f"{difference} ({low} to {high})"
