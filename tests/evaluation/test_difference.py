"""Confidence intervals of differences, and how often they contain the true difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import ROOT, load_script

from mask_head_plugin.evaluation.difference import (
    detectable_difference,
    difference_of,
    student_t,
)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [  # from printed tables
        *((0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776), (0.995, 4, 4.604)),
        *((0.975, 10, 2.228), (0.95, 30, 1.697), (0.975, math.inf, 1.960), (0.5, 3, 0.0)),
    ],
)
def test_quantiles_match_tables_of_students_t(probability, freedom, expected):
    assert student_t(probability, freedom) == pytest.approx(expected, abs=6e-4)


def constant_over_images(values, num_draws=50):
    return np.repeat(np.array(values, float)[:, None], 1 + num_draws, axis=1)


def test_without_image_noise_the_interval_is_welchs():
    """Hand-worked example: the variances over 3 seeds are 1 and 4, so the standard error is
    (5/3)^0.5, with (5/3)^2 / (17/18) degrees of freedom."""
    variant, baseline = constant_over_images([10, 11, 12]), constant_over_images([4, 6, 8])
    found = difference_of("AP", variant, baseline, num_images=100)
    reach = student_t(0.975, 25 / 9 * 18 / 17) * math.sqrt(5 / 3)
    assert (found.value, found.baseline, found.difference) == (11, 6, 5)
    assert found.high - 5 == pytest.approx(reach) == 5 - found.low
    assert found.image_low == found.image_high == 5 and found.has_training
    assert found.seed_std == 1
    assert found.detectable == pytest.approx(reach + 0.84 * math.sqrt(5 / 3))
    several = difference_of("AP", variant, baseline, num_images=100, num_compared=5)
    wider = student_t(0.995, 25 / 9 * 18 / 17) * math.sqrt(5 / 3)
    assert several.high - 5 == pytest.approx(wider) and wider > reach


def test_without_seed_noise_the_interval_is_that_of_the_bootstrap():
    draws = np.random.default_rng(0).normal(3, 2, 4000)
    variant = np.stack([np.r_[3, draws]] * 3)
    found = difference_of("AP", variant, np.zeros_like(variant), num_images=10**6)
    np.testing.assert_allclose([found.low, found.high], [3 - 3.92, 3 + 3.92], rtol=0.05)
    np.testing.assert_allclose(
        [found.low, found.high], [found.image_low, found.image_high], rtol=0.1
    )


def test_with_one_seed_the_interval_includes_only_the_images():
    draws = np.random.default_rng(0).normal(3, 2, 400)
    variant = np.r_[3, draws][None]
    found = difference_of("AP", variant, np.zeros_like(variant), num_images=100)
    assert (found.low, found.high) == (found.image_low, found.image_high)
    assert not found.has_training and math.isnan(found.seed_std)


def test_the_plan_predicts_the_detectable_difference_of_the_study():
    """Seeds spread unequally, and partly because they get different images right."""
    rng = np.random.default_rng(0)
    baseline = constant_over_images([8, 10, 12], num_draws=400)
    variant = constant_over_images([13, 14, 14.5], num_draws=400)
    for values in (baseline, variant):
        values[:, 1:] += rng.normal(0, 0.3, (3, 400)) + rng.normal(0, 0.5, 400)
    found = difference_of("AP", variant, baseline, num_images=50, num_compared=2)
    planned = detectable_difference(3, found.spread, num_images=50, num_compared=2)
    assert planned == pytest.approx(found.detectable)
    assert planned > detectable_difference(3, found.spread, num_images=50)
    assert planned > detectable_difference(4, found.spread, num_images=50, num_compared=2)


def test_intervals_are_cut_at_impossible_values():
    baseline, variant = constant_over_images([3, 8]), constant_over_images([0, 0.2])
    free = difference_of("AP", variant, baseline, num_images=9)
    assert free.low < -5.5 and not free.is_cut
    found = difference_of("AP", variant, baseline, num_images=9, possible=(0, 100))
    assert (found.low, found.high, found.is_cut) == (-5.5, free.high, True)
    high = difference_of("AP", 100 - variant, 100 - baseline, num_images=9, possible=(0, 100))
    assert high.high == pytest.approx(5.5) and high.is_cut


def test_draws_in_which_nothing_counts_are_skipped():
    values = constant_over_images([1, 2])
    values[0, 3] = values[1, 7] = np.nan
    found = difference_of("AP", values, constant_over_images([1, 2]), num_images=9)
    assert found.difference == 0 and math.isfinite(found.low)
    nothing = difference_of("AP", values * np.nan, values, num_images=9)
    assert math.isnan(nothing.low) and math.isnan(nothing.difference)


def test_intervals_of_simulated_studies_contain_the_true_difference(monkeypatch):
    """Runs the benchmark with fewer studies than usual. Intervals that account only for the choice
    of images contain the true difference too rarely."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    coverage = load_script("benchmarks/interval_coverage.py")
    row = coverage.simulate(num_seeds=3, num_studies=60, num_images=60, true_difference=0.0)
    assert row["contains the truth"] >= 90
    assert row["images alone"] <= 85
