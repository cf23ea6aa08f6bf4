"""Compares the weights along one axis with hand-worked examples and exact fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_head_plugin.ops.axis_weights import (
    MAX_CELL,
    precise_roi_pool_weights,
    roi_align_weights,
    round_to_cells,
)


def dense(axis, num_cells: int) -> torch.Tensor:
    """Returns the weights of all cells, including those with weight 0, as (R, P, L)."""
    rows = axis.weight.new_zeros(*axis.cell.shape[:2], num_cells)
    return rows.scatter_add(2, axis.cell.long(), axis.weight)


def exact_mean_of_hat(low: Fraction, high: Fraction, cell: int, num_cells: int) -> Fraction:
    """Averages a cell's hat function, clamped at the borders, exactly over [low, high]."""

    def hat(t: Fraction) -> Fraction:
        return max(Fraction(0), 1 - abs(min(max(t, Fraction(0)), Fraction(num_cells - 1)) - cell))

    if low == high:
        return hat(low) if -1 <= low <= num_cells else Fraction(0)
    a, b = (min(max(edge, Fraction(-1)), Fraction(num_cells)) for edge in (low, high))
    kinks = [a, *(Fraction(k) for k in range(-1, num_cells + 1) if a < k < b), b]
    area = sum((v - u) * (hat(u) + hat(v)) / 2 for u, v in itertools.pairwise(kinks))
    return area / (high - low)


def test_roi_align_weights_match_the_docstrings_example():
    start, end = torch.tensor([1.5]), torch.tensor([3.5])  # 1.0 and 3.0 after the half-cell shift
    axis = roi_align_weights(start, end, 1, 10, 2, True)
    assert (axis.cell.tolist(), axis.weight.tolist()) == ([[[1, 2, 3]]], [[[0.25, 0.5, 0.25]]])
    assert axis.count.tolist() == [3]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(1.0, 3.0, [0, 0.25, 0.5, 0.25, 0]), (1.0, 2.0, [0, 0.5, 0.5, 0, 0])],
)
def test_precise_weights_match_the_docstrings_examples(start, end, expected):
    edges = torch.tensor([start]), torch.tensor([end])
    axis = precise_roi_pool_weights(*edges, 1, 5, aligned=False)
    assert dense(axis, 5).tolist() == [[expected]]


def test_distant_samples_store_only_the_cells_that_they_read():
    axis = roi_align_weights(torch.tensor([0.0]), torch.tensor([100.0]), 1, 100, 2, True)
    assert axis.cell.tolist() == [[[24, 25, 74, 75]]]  # samples at 24.5 and 74.5
    assert axis.weight.tolist() == [[[0.25] * 4]]


quarters = st.integers(-60, 60).map(lambda n: n / 4)
anywhere = st.floats(-30, 30, width=32)


@settings(deadline=None, max_examples=300)
@given(
    start=quarters | anywhere,
    end=quarters | anywhere,
    num_bins=st.integers(1, 4),
    num_cells=st.integers(1, 6),
)
def test_precise_weights_equal_exact_integrals(start, end, num_bins, num_cells):
    """Covers kinks, borders, inverted and empty bins, with edges that are exact in float64."""
    axis = precise_roi_pool_weights(
        torch.tensor([start], dtype=torch.float64),
        torch.tensor([end], dtype=torch.float64),
        num_bins,
        num_cells,
        aligned=True,
    )
    weights = dense(axis, num_cells)[0]
    a, b = Fraction(start) - Fraction(1, 2), Fraction(end) - Fraction(1, 2)
    for p in range(num_bins):
        low, high = sorted(a + (b - a) * k / num_bins for k in (p, p + 1))
        # The edges of a very short bin may be rounded to the same point. Near the jumps at -1 and
        # L, rounding may move this point to the other side of the jump.
        if low != high and high - low < 1e-9 and min(abs(low + 1), abs(low - num_cells)) < 1e-9:
            continue
        for cell in range(num_cells):
            expected = float(exact_mean_of_hat(low, high, cell, num_cells))
            assert abs(float(weights[p, cell]) - expected) <= 1e-9 + 1e-14 / max(
                float(high - low), 1e-5
            )


def test_gradients_of_precise_weights():
    start = torch.tensor([0.3, 2.2, -3.1, 4.7], dtype=torch.float64, requires_grad=True)
    end = torch.tensor([5.9, 2.4, 1.1, 9.3], dtype=torch.float64, requires_grad=True)
    for aligned in (True, False):
        assert torch.autograd.gradcheck(
            lambda a, b, aligned=aligned: precise_roi_pool_weights(a, b, 3, 6, aligned).weight,
            (start, end),
        )


def test_precise_weights_of_empty_bins_have_finite_gradients():
    start = torch.tensor([1.7, -4.0], requires_grad=True)
    precise_roi_pool_weights(start, start.clone(), 2, 5).weight.square().sum().backward()
    assert torch.isfinite(start.grad).all()


def test_half_coordinates_are_rounded_as_in_c():
    edges = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 8388607.0])
    start, end = round_to_cells(edges, edges)
    assert start.tolist() == [1, 2, 3, -1, -2, 0, MAX_CELL]
    assert (end - start).tolist() == [1] * 7


def test_an_inverted_roi_has_one_cell():
    assert [x.item() for x in round_to_cells(torch.tensor([5.2]), torch.tensor([1.0]))] == [5, 6]
