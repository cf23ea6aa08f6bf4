"""The picture of RoI pooling shows exactly what the operators read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mask_head_plugin.analysis.explanation.pooling_reads import ROUNDED, WAYS, pooling_reads
from mask_head_plugin.ops import precise_roi_pool, roi_align, roi_pool, roi_warp

MAP_HW, BINS, RATIO = (20, 24), 3, 2
BOXES = [
    [3.3, 4.6, 14.9, 11.2],
    [0.0, 0.0, 24.0, 20.0],  # the whole map
    [17.4, 12.1, 24.9, 21.3],  # across the border of the map
    [5.1, 5.2, 5.9, 5.8],  # within one cell
]
OPERATORS = {
    "RoIPool": lambda x, rois: roi_pool(x, rois, BINS),
    "RoIWarp": lambda x, rois: roi_warp(x, rois, BINS, sampling_ratio=RATIO),
    "RoIAlign": lambda x, rois: roi_align(x, rois, BINS, sampling_ratio=RATIO),
    "PrROIPool": lambda x, rois: precise_roi_pool(x, rois, BINS),
}


def made_map(seed: int = 0) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(seed).random((1, 1, *MAP_HW)), dtype=torch.float32)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("way", ["RoIWarp", "RoIAlign", "PrROIPool"])
def test_the_cells_and_weights_of_a_bin_equal_the_operators_gradient(way, box):
    reads = pooling_reads(way, np.array(box), MAP_HW, BINS, RATIO)
    feature = made_map().requires_grad_()
    pooled = OPERATORS[way](feature, torch.tensor([[0.0, *box]]))[0, 0]
    for row, column in np.ndindex(BINS, BINS):
        (gradient,) = torch.autograd.grad(pooled[row, column], feature, retain_graph=True)
        np.testing.assert_allclose(reads.bin_cells(row, column), gradient[0, 0], atol=1e-5)


@pytest.mark.parametrize("box", BOXES)
def test_the_cells_of_a_roi_pool_bin_are_those_that_can_be_its_maximum(box):
    reads = pooling_reads("RoIPool", np.array(box), MAP_HW, BINS, RATIO)
    maps = torch.zeros(1, MAP_HW[0] * MAP_HW[1], *MAP_HW)
    maps.flatten(2)[0].fill_diagonal_(1)  # one map per cell
    pooled = OPERATORS["RoIPool"](maps, torch.tensor([[0.0, *box]]))[0]
    for row, column in np.ndindex(BINS, BINS):
        expected = pooled[:, row, column].unflatten(0, MAP_HW)
        np.testing.assert_array_equal(reads.bin_cells(row, column), expected)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("way", ["RoIWarp", "RoIAlign"])
def test_the_mean_over_the_sample_points_equals_the_operators_output(way, box):
    """The reference, grid_sample, measures from the edges of the map, as the picture does."""
    reads = pooling_reads(way, np.array(box), MAP_HW, BINS, RATIO)
    assert reads.y.samples.shape == (BINS, RATIO)
    feature = made_map()
    pooled = OPERATORS[way](feature, torch.tensor([[0.0, *box]]))[0, 0]
    for row, column in np.ndindex(BINS, BINS):
        ys, xs = np.meshgrid(reads.y.samples[row], reads.x.samples[column], indexing="ij")
        on_map = ~(np.isnan(xs) | np.isnan(ys))
        places = np.stack([xs * 2 / MAP_HW[1] - 1, ys * 2 / MAP_HW[0] - 1], axis=-1)
        grid = torch.as_tensor(np.nan_to_num(places), dtype=torch.float32)[None]
        options = {"padding_mode": "border", "align_corners": False}
        values = F.grid_sample(feature, grid, **options)[0, 0] * torch.as_tensor(on_map)
        assert values.mean().item() == pytest.approx(pooled[row, column].item(), abs=1e-5)


@pytest.mark.parametrize("way", ["RoIWarp", "RoIAlign"])
def test_each_sample_point_is_interpolated_from_the_cells_around_it(way):
    reads = pooling_reads(way, np.array(BOXES[0]), MAP_HW, BINS, RATIO)
    for axis in (reads.x, reads.y):
        low = np.floor(axis.samples - 0.5)
        np.testing.assert_array_equal(axis.neighbours[..., 0], low)
        np.testing.assert_array_equal(axis.neighbours[..., 1], low + 1)


def test_only_rounding_operators_move_the_box_and_by_less_than_two_cells():
    """3.3, 4.6, 14.9, 11.2 round to 3, 5, 15, 11; cells 15 and 11 still belong to the box."""
    box = np.array(BOXES[0])
    for way in WAYS:
        used = pooling_reads(way, box, MAP_HW, BINS, RATIO).box
        expected = [3, 5, 16, 12] if way in ROUNDED else box
        np.testing.assert_allclose(used, expected, atol=1e-5)


def test_a_bin_is_centred_on_its_cells():
    reads = pooling_reads("RoIPool", np.array([2.0, 4.0, 7.0, 9.0]), (20, 20), 3, 0)
    np.testing.assert_allclose(reads.bin_centre(0, 2), [7.0, 5.0])  # columns 6, 7 and rows 4, 5
