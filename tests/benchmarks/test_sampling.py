"""The studies of RoIAlign's sampling: known answers, and one short run of each script."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, ROOT, load_script
from made_ablation import write_ablation, write_dataset

from mask_head_plugin.ops import precise_roi_pool, roi_align


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names = ("case", "error", "exchange", "equivariance", "training", "figures")
        yield {name: load_script(f"benchmarks/sampling_{name}.py") for name in names}


@pytest.fixture
def features():
    return torch.randn(
        1, 3, 20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


ROIS = torch.tensor([[0, 2.3, 1.7, 9.1, 12.4], [0, 3.0, 3.0, 3.9, 3.5]], dtype=torch.float64)


def test_two_points_a_quarter_bin_from_the_middle_equal_the_papers_four_samples(scripts, features):
    actual = scripts["case"].two_point_align(features, ROIS, 3)
    assert torch.allclose(actual, roi_align(features, ROIS, 3, sampling_ratio=2), atol=1e-12)


def test_two_points_equal_the_mean_of_grid_samples_at_their_places(scripts, features):
    """PyTorch's grid_sample is an independent reference."""
    offset, (x0, y0, x1, y1) = 0.2753, ROIS[0, 1:].tolist()
    places = np.array([(k + 0.5 + s * offset) / 3 for k in range(3) for s in (-1, 1)])
    x, y = torch.tensor(x0 + (x1 - x0) * places), torch.tensor(y0 + (y1 - y0) * places)
    grid = torch.stack([(2 * x / 24 - 1).expand(6, 6), (2 * y / 20 - 1)[:, None].expand(6, 6)], 2)
    sampled = torch.nn.functional.grid_sample(features, grid[None], align_corners=False)
    expected = torch.nn.functional.avg_pool2d(sampled, 2)
    actual = scripts["case"].two_point_align(features, ROIS[:1], 3, offset=offset)
    assert torch.allclose(actual, expected, atol=1e-12)


def test_gauss_points_integrate_cubics_but_midpoints_do_not(scripts):
    """Gauss points are optimal for polynomials, but a map is only piecewise bilinear."""
    case = scripts["case"]
    for offset, is_exact in ((case.GAUSS, True), (case.MIDPOINT, False)):
        mean = ((0.5 - offset) ** 3 + (0.5 + offset) ** 3) / 2
        assert math.isclose(mean, 1 / 4) == is_exact


def white(distance):
    return (distance == 0).astype(float)


@pytest.mark.parametrize("correlation", [white, lambda distance: 0.9**distance])
@pytest.mark.parametrize("width", [0.3, 0.7, 1.0])
def test_along_an_axis_the_best_offset_is_the_same_for_all_bins_up_to_one_cell(
    scripts, width, correlation
):
    error, case = scripts["error"], scripts["case"]
    grid = [case.BEST - 0.01, case.BEST, case.BEST + 0.01]
    errors = error.expected_errors(width, [*grid, case.MIDPOINT, case.GAUSS], correlation)
    assert errors[1] == min(errors)


def test_the_expected_error_equals_that_of_pooling_random_maps(scripts):
    """Compares the formula with pooling rows of random cells in bins of 1.5 cells."""
    rng = torch.Generator().manual_seed(0)
    row = torch.randn(1, 400, 1, 60, generator=rng, dtype=torch.float64).expand(-1, -1, 3, -1)
    x = 5 + 20 * torch.rand(200, generator=rng, dtype=torch.float64)
    rois = torch.stack([0 * x, x, 0 * x + 1, x + 1.5, 0 * x + 2], dim=1)
    exact = precise_roi_pool(row, rois, 1)
    measured = (roi_align(row, rois, 1, sampling_ratio=2) - exact).square().mean().sqrt()
    (expected,) = scripts["error"].expected_errors(1.5, [0.25], white)
    assert measured.item() == pytest.approx(expected, rel=0.05)


def test_the_expected_error_of_two_axes_equals_that_of_pooling_random_maps(scripts):
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 60, 30, 30, generator=rng, dtype=torch.float64)
    corner = 5 + 18 * torch.rand(200, 2, generator=rng, dtype=torch.float64)
    rois = torch.cat([0 * corner[:, :1], corner, corner + 0.8], dim=1)
    exact = precise_roi_pool(maps, rois, 1)
    measured = (roi_align(maps, rois, 1, sampling_ratio=2) - exact).square().mean().sqrt()
    (expected,) = scripts["error"].expected_errors(0.8, [0.25], white, num_axes=2)
    assert measured.item() == pytest.approx(expected, rel=0.05)


def test_the_correlation_of_a_map_with_itself_by_distance(scripts):
    row = torch.tensor([1.0, 1, -1, -1]).repeat(10)
    found = scripts["error"].correlation_of((row[:, None] * row)[None, None])
    assert found[:5] == pytest.approx([1, 0, -1, 0, 1], abs=0.06)


def test_rounded_align_is_roi_align_with_edges_at_whole_cells(scripts, features):
    """At half the resolution, the edges 4.6, 3.4, 18.2, 24.8 round to 2, 2, 9, 12."""
    rois = torch.tensor([[0, 4.6, 3.4, 18.2, 24.8], [0, 6.0, 6.0, 6.2, 6.2]], dtype=torch.float64)
    whole = torch.tensor([[0, 2.0, 2, 9, 12], [0, 3, 3, 4, 4]], dtype=torch.float64)
    actual = scripts["case"].rounded_align(features, rois, 3, 0.5)
    assert torch.allclose(actual, roi_align(features, whole, 3, sampling_ratio=2), atol=1e-12)


def test_the_interval_of_a_mean_over_images_uses_students_t(scripts):
    """The mean of 1, 2, 3 is 2, and its standard error is 1 / sqrt(3).

    Student's t for 2 degrees of freedom is 4.303.
    """
    values = np.array([1.0, 2.0, 3.0])
    found = scripts["case"].over_images(lambda w: (w @ values) / w.sum(1), 3)
    reach = 4.3027 / math.sqrt(3)
    assert found == pytest.approx((2, 2 - reach, 2 + reach), rel=1e-4)


def test_feature_errors_are_those_of_added_noise(scripts):
    exact = torch.randn(50, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    found = scripts["training"].feature_errors({"PrROIPool": exact, "noisy": exact + 0.2 * noise})
    assert found == {"PrROIPool": 0, "noisy": pytest.approx(20, rel=0.03)}


def test_hand_worked_fractions_of_unread_cells(scripts):
    """Four samples read every cell of a bin of 2 cells, but half of 8 cells along each axis."""
    unread = scripts["error"].unread_shares
    assert unread(2.0, (-0.25, 0.25)) == 0
    assert unread(8.0, (-0.25, 0.25)) == pytest.approx(1 - 0.5**2)
    assert unread(1.0, (0.0,)) == 0


def test_shifting_a_map_by_a_whole_cell_is_exact(scripts, features):
    moved = scripts["equivariance"].moved
    features = features.float()
    whole = moved(features, 1.0)
    assert torch.allclose(whole[:, :, 1:, 1:], features[:, :, :-1, :-1], atol=1e-5)
    assert torch.allclose(moved(moved(features, 0.5), 0.0), moved(features, 0.5), atol=1e-5)


def test_an_unchanged_object_has_not_moved(scripts):
    masks = torch.rand(2, 8, 8)
    out = {"features": masks[:, None], "boxes": torch.rand(2, 4), "masks": masks}
    found = scripts["equivariance"].changes(out, out, 0.0)
    assert found["box"].max() == found["change"].max() == 0
    assert found["IoU"].min() == 100


def test_statistics_weight_images_by_how_often_they_are_drawn(scripts):
    values = scripts["training"].statistics(np.array([[1.0, 0.0, 0.6]]), np.array([0, 0, 1]))
    assert values["mean IoU"][0, 0] == pytest.approx(100 * 1.6 / 3)
    # With two images, a draw contains the first twice, the second twice, or each of them once.
    assert set(values["mean IoU"][0].round(3)) == {50.0, 53.333, 60.0}


def test_whole_models_sum_up_an_ablation_and_leave_out_variants_with_few_seeds(
    scripts, monkeypatch, tmp_path
):
    """Better detections have a higher AP and a higher mask IoU; perfect ones have 100."""
    study = tmp_path / "ablation"
    qualities = {"perfect": 1.0, "bad": 0.5, "few": 0.9}
    records = write_ablation(study, write_dataset(tmp_path), qualities)
    (study / "variant_2" / "seed_2" / "trial.json").unlink()
    output = tmp_path / "output" / "whole_models.json"
    flags = ["--input", study, "--output", output, "--seeds", 2, "--draws", 20]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    run(load_script("benchmarks/whole_models.py"), monkeypatch, *flags)
    rows = {(x["way"], x["metric"]): x for x in json.loads(output.read_text())["rows"]}
    assert {way for way, _ in rows} == {"perfect", "bad"}
    assert rows["perfect", "mask IoU"]["by seed"] == [100, 100]
    assert rows["bad", "mask IoU"]["difference"] < -10
    found = [x["results"]["segm"]["AP"] for x in records["bad"].values()]
    assert rows["bad", "mask AP"]["by seed"] == pytest.approx(found, abs=0.01)
    flags = ["--take", output.parent, "--results", tmp_path / "results", "--output", tmp_path]
    run(scripts["figures"], monkeypatch, *flags)
    assert (tmp_path / "sampling_whole_models.png").exists()


def run(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    script.main()


def test_each_script_runs_on_two_images_and_draws_its_figure(scripts, monkeypatch, tmp_path):
    error = scripts["error"]
    monkeypatch.setattr(error, "WIDTHS", (0.5, 1.0))
    monkeypatch.setattr(error, "ROIS", 2)
    monkeypatch.setattr(error, "OFFSETS", (0.25, 0.2753))
    monkeypatch.setattr(scripts["equivariance"], "CELL_SHIFTS", (0.5,))
    monkeypatch.setattr(scripts["equivariance"], "PIXEL_SHIFTS", (2.0,))
    output = tmp_path / "output"
    model = ["--config-file", CONFIGS / "shapes" / "mask_rcnn_shapes.yaml"]
    for name in ("error", "equivariance", "exchange"):
        flags = ["--output", output / f"{name}_shapes.json", *model, "--weights", CHECKPOINT]
        run(scripts[name], monkeypatch, *flags, "--images", 2)
    flags = ["--output", output / "training_shapes.json", "--work", tmp_path / "work"]
    flags += [
        "--ways",
        "four samples",
        "PrROIPool",
        "noise 10%",
        "RoIPool",
        "--seeds",
        1,
        2,
        "--bins",
        4,
    ]
    run(
        scripts["training"],
        monkeypatch,
        *flags,
        "--train-images",
        4,
        "--images",
        2,
        "--iterations",
        2,
    )
    results = tmp_path / "results"
    run(
        scripts["figures"],
        monkeypatch,
        "--take",
        output,
        "--results",
        results,
        "--output",
        tmp_path,
    )
    assert {p.name for p in tmp_path.glob("*.png")} == {
        f"sampling_{name}.png"
        for name in ("error", "offsets", "exchange", "training", "equivariance")
    }
    rows = scripts["figures"].read_results(results)["training_shapes"]["rows"]
    assert rows == json.loads((output / "training_shapes.json").read_text())["rows"]
    assert {row["way"] for row in rows} == {"four samples", "PrROIPool", "noise 10%", "RoIPool"}
