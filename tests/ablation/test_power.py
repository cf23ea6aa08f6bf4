"""Estimates of how many seeds and images an ablation needs."""

from __future__ import annotations

import statistics

import pytest
from made_ablation import write_ablation, write_dataset

from mask_head_plugin.ablation.power import (
    ASSUMED_IMAGES,
    Spreads,
    detectable,
    detectable_each,
    measured_spreads,
    power_lines,
    seeds_needed,
)
from mask_head_plugin.ablation.report.study import read_study
from mask_head_plugin.evaluation.difference import SeedSpread, Spread

ONE = SeedSpread(1.0, 1.0)
SPREADS = Spreads((Spread(0.2, ONE, ONE),), seeds_from=6, images_from=1, num_images=500)
DRAWS = 40


@pytest.mark.parametrize("wanted", [0.7, 1.0, 3.0])
def test_the_number_of_seeds_needed_is_the_smallest_that_suffices(wanted):
    needed = seeds_needed(wanted, SPREADS, 500, num_compared=2)
    assert detectable(SPREADS, needed, 500, 2) <= wanted < detectable(SPREADS, needed - 1, 500, 2)


def test_more_seeds_cannot_make_up_for_too_few_images():
    assert seeds_needed(0.5, SPREADS, 500, num_compared=1) is None
    assert seeds_needed(0.5, SPREADS, 4 * 500, num_compared=1) is not None


def test_without_trials_the_assumptions_are_stated(tmp_path):
    spreads = measured_spreads(tmp_path / "missing", DRAWS)
    assert (spreads.seeds_from, spreads.images_from, spreads.num_images) == (0, 0, ASSUMED_IMAGES)
    spread, planned, *needed = power_lines(tmp_path / "missing", "segm/AP", 8.0, 3, 1, DRAWS)
    assert "assumed until two trials of the baseline and of a variant have finished" in spread
    assert "assumed until the baseline and a variant have finished" in spread
    assert planned.startswith("To be found in four of five studies with 3 seeds, a true difference")
    assert needed == ["With 200 images, a difference of 8 needs 3 seeds per variant"]
    impossible = power_lines(tmp_path / "missing", "segm/AP", 0.5, 3, 1, DRAWS)
    assert (
        impossible[2] == "With 200 images, no practical number of seeds shows a difference of 0.5"
    )


def test_one_seed_detects_no_difference(tmp_path):
    assert (
        "1 seed cannot show a difference" in power_lines(tmp_path, "segm/AP", 8.0, 1, 1, DRAWS)[1]
    )


def test_plan_and_report_agree_on_what_the_finished_trials_can_detect(tmp_path):
    annotations = write_dataset(tmp_path / "data")
    folder = tmp_path / "out"
    qualities = {"baseline": 0.9, "other": 0.5, "third": 0.2}
    records = write_ablation(folder, annotations, qualities)
    study = read_study(folder, DRAWS)
    reported = [c.detectable for v in study.variants if (c := study.comparison(v))]
    spreads = measured_spreads(folder, DRAWS)
    assert detectable_each(spreads, 2, spreads.num_images, 2) == pytest.approx(reported)
    extent = f"{min(reported):.2f} to {max(reported):.2f}, depending on the variant"
    lines = power_lines(folder, "segm/AP", 1, 2, 2, DRAWS)
    assert lines[1].endswith(f"must be at least {extent}")
    assert "measured on 6 trials" in lines[0] and "measured on 2 comparisons" in lines[0]
    values = [[x["results"]["segm"]["AP"] for x in of.values()] for of in records.values()]
    stds = [statistics.stdev(of_variant) for of_variant in values]
    assert f"{min(stds):.2f} to {max(stds):.2f} between seeds" in lines[0]
