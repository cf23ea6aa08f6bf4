"""The studies of RoIAlign's sampling: their parts against known answers, and each script once."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, ROOT, load_script

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


def test_two_points_a_quarter_bin_from_the_middle_are_the_papers_four_samples(scripts, features):
    actual = scripts["case"].two_point_align(features, ROIS, 3)
    assert torch.allclose(actual, roi_align(features, ROIS, 3, sampling_ratio=2), atol=1e-12)


def test_two_points_are_the_mean_of_grid_samples_at_their_places(scripts, features):
    """An independent way: PyTorch's grid_sample."""
    offset, (x0, y0, x1, y1) = 0.2753, ROIS[0, 1:].tolist()
    places = np.array([(k + 0.5 + s * offset) / 3 for k in range(3) for s in (-1, 1)])
    x, y = torch.tensor(x0 + (x1 - x0) * places), torch.tensor(y0 + (y1 - y0) * places)
    grid = torch.stack([(2 * x / 24 - 1).expand(6, 6), (2 * y / 20 - 1)[:, None].expand(6, 6)], 2)
    sampled = torch.nn.functional.grid_sample(features, grid[None], align_corners=False)
    expected = torch.nn.functional.avg_pool2d(sampled, 2)
    actual = scripts["case"].two_point_align(features, ROIS[:1], 3, offset=offset)
    assert torch.allclose(actual, expected, atol=1e-12)


def test_gauss_points_integrate_cubics_that_midpoints_do_not(scripts):
    """What Gauss's points are for; a bilinear surface is no cubic."""
    case = scripts["case"]
    for offset, is_exact in ((case.GAUSS, True), (case.MIDPOINT, False)):
        mean = ((0.5 - offset) ** 3 + (0.5 + offset) ** 3) / 2
        assert math.isclose(mean, 1 / 4) == is_exact


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("width", [0.3, 0.7, 1.0])
def test_the_best_offset_does_not_depend_on_bins_up_to_a_cell(scripts, width, correlation):
    error, case = scripts["error"], scripts["case"]
    grid = [case.BEST - 0.01, case.BEST, case.BEST + 0.01]
    errors = error.expected_errors(width, [*grid, case.MIDPOINT, case.GAUSS], correlation)
    assert errors[1] == min(errors)


def test_the_expected_error_is_that_of_the_operators_on_random_maps(scripts):
    """The formula against pooling itself: rows of random cells, bins of a cell and a half."""
    rng = torch.Generator().manual_seed(0)
    row = torch.randn(1, 400, 1, 60, generator=rng, dtype=torch.float64).expand(-1, -1, 3, -1)
    x = 5 + 20 * torch.rand(200, generator=rng, dtype=torch.float64)
    rois = torch.stack([0 * x, x, 0 * x + 1, x + 1.5, 0 * x + 2], dim=1)
    exact = precise_roi_pool(row, rois, 1)
    measured = (roi_align(row, rois, 1, sampling_ratio=2) - exact).square().mean().sqrt()
    (expected,) = scripts["error"].expected_errors(1.5, [0.25], 0.0)
    assert measured.item() == pytest.approx(expected, rel=0.05)


def test_unread_cells_by_hand(scripts):
    """Four samples: at 2 cells all are read; at 8, points 4 apart read 2 of 4 cells on an axis."""
    unread = scripts["error"].unread_shares
    assert unread(2.0, (-0.25, 0.25)) == 0
    assert unread(8.0, (-0.25, 0.25)) == pytest.approx(1 - 0.5**2)
    assert unread(1.0, (0.0,)) == 0


def test_a_whole_shift_of_a_map_is_exact_and_two_halves_make_it(scripts, features):
    moved = scripts["equivariance"].moved
    features = features.float()
    whole = moved(features, 1.0)
    assert torch.allclose(whole[:, :, 1:, 1:], features[:, :, :-1, :-1], atol=1e-5)
    assert torch.allclose(moved(moved(features, 0.5), 0.0), moved(features, 0.5), atol=1e-5)


def test_an_object_that_nothing_changed_has_not_moved(scripts):
    masks = torch.rand(2, 8, 8)
    out = {"features": masks[:, None], "boxes": torch.rand(2, 4), "masks": masks}
    found = scripts["equivariance"].changes(out, out, torch.tensor([[0.0, 0, 4, 4]] * 2), 0.0)
    assert found["box"].max() == found["mask"].max() == found["change"].max() == 0
    assert found["IoU"].min() == 100


def test_statistics_weigh_images_by_how_often_they_are_drawn(scripts):
    values = scripts["training"].statistics(np.array([[1.0, 0.0, 0.6]]), np.array([0, 0, 1]))
    assert values["mean IoU"][0, 0] == pytest.approx(100 * 1.6 / 3)
    # Two images: a draw has the first twice, both, or the second twice.
    assert set(values["mean IoU"][0].round(3)) == {50.0, 53.333, 60.0}


def run(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    script.main()


def test_each_script_runs_on_two_images_and_its_figure_is_drawn(scripts, monkeypatch, tmp_path):
    error = scripts["error"]
    monkeypatch.setattr(error, "WIDTHS", (0.5, 1.0))
    monkeypatch.setattr(error, "ROIS", 2)
    monkeypatch.setattr(error, "OFFSETS", (0.25, 0.2753))
    monkeypatch.setattr(scripts["equivariance"], "CELL_SHIFTS", (0.5,))
    monkeypatch.setattr(scripts["equivariance"], "PIXEL_SHIFTS", (1.0,))
    output = tmp_path / "output"
    model = ["--config-file", CONFIGS / "shapes" / "mask_rcnn_shapes.yaml"]
    for name in ("error", "equivariance", "exchange"):
        flags = ["--output", output / f"{name}_shapes.json", *model, "--weights", CHECKPOINT]
        run(scripts[name], monkeypatch, *flags, "--images", 2)
    flags = ["--output", output / "training_shapes.json", "--work", tmp_path / "work"]
    flags += ["--ways", "four samples", "RoIPool", "--seeds", 1, 2, "--bins", 4]
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
    assert {row["way"] for row in rows} == {"four samples", "RoIPool"}
