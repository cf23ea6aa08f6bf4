"""Estimates of how many seeds and images an ablation needs."""

from __future__ import annotations

import statistics

import pytest
from made_ablation import write_ablation, write_dataset

from mask_head_plugin.ablation.power import (
    ASSUMED_IMAGES,
    Spreads,
    detectable,
    measured_spreads,
    power_lines,
    seeds_needed,
)

SPREADS = Spreads(seed_std=1.0, seeds_from=6, image_error=0.2, images_from=2, num_images=500)


@pytest.mark.parametrize("wanted", [0.7, 1.0, 3.0])
def test_the_number_of_seeds_needed_is_the_smallest_that_suffices(wanted):
    needed = seeds_needed(wanted, SPREADS, 500, num_compared=2)
    assert detectable(SPREADS, needed, 500, 2) <= wanted < detectable(SPREADS, needed - 1, 500, 2)


def test_more_seeds_cannot_make_up_for_too_few_images():
    assert seeds_needed(0.5, SPREADS, 500, num_compared=1) is None
    assert seeds_needed(0.5, SPREADS, 4 * 500, num_compared=1) is not None


def test_without_trials_the_assumptions_are_stated(tmp_path):
    spreads = measured_spreads(tmp_path / "missing")
    assert (spreads.seeds_from, spreads.images_from, spreads.num_images) == (0, 0, ASSUMED_IMAGES)
    spread, planned, *needed = power_lines(tmp_path / "missing", "segm/AP", 8.0, 3, 1)
    assert (
        spread.count("assumed") == 2 and "4 of 5 studies would show a true difference of" in planned
    )
    assert needed == ["A difference of 8 needs 3 seeds per variant with 200 images"]


def test_one_seed_detects_no_difference(tmp_path):
    assert "1 seed cannot show a difference" in power_lines(tmp_path, "segm/AP", 8.0, 1, 1)[1]


def test_spreads_are_measured_on_finished_trials(tmp_path):
    annotations = write_dataset(tmp_path / "data")
    folder = tmp_path / "out"
    records = write_ablation(folder, annotations, {"baseline": 0.9, "other": 0.5})
    spreads = measured_spreads(folder)
    values = [[x["results"]["segm"]["AP"] for x in of.values()] for of in records.values()]
    variances = [statistics.variance(of_variant) for of_variant in values]
    assert spreads.seed_std == pytest.approx(statistics.mean(variances) ** 0.5)
    assert spreads.seeds_from == 4 and spreads.images_from == 1
    assert 0 < spreads.image_error < 20
