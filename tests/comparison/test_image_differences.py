"""Comparison of two lists of detections, on synthetic lists with hand-worked results."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mask_head_plugin.comparison.image_differences import Cut, Found, compare_images

CUT = Cut(score=0.05, count=100)
SCORES = [0.9, 0.8, 0.7, 0.6]
SIDE = 20


def made(scores=SCORES, order=None) -> Found:
    """Returns detections side by side; each mask fills its box of 10 x 10 pixels."""
    count = len(scores)
    x0 = torch.arange(count) * 12.0
    boxes = torch.stack([x0, torch.full((count,), 4.0), x0 + 10, torch.full((count,), 14.0)], 1)
    masks = torch.zeros(count, SIDE, 60, dtype=torch.bool)
    for mask, start in zip(masks, x0.int().tolist(), strict=True):
        mask[4:14, start : start + 10] = True
    classes = torch.arange(count) % 2
    found = Found(boxes, torch.tensor(scores), classes, torch.ones(count, 4, 4), masks)
    return pick(found, range(count) if order is None else order)


def pick(found: Found, order) -> Found:
    order = torch.tensor(list(order), dtype=torch.long)
    return Found(*(getattr(found, field.name)[order] for field in dataclasses.fields(Found)))


def compare(stock, plugin, cut=CUT, min_score=0.5):
    return compare_images("image", stock, plugin, cut, min_score)


def test_equal_lists_have_no_difference():
    result = compare(made(), made())
    assert result.is_equal and result.same_set and not result.differs
    assert (result.box, result.score, result.mask_prob, result.mask_pixels) == (0, 0, 0, 0)
    assert result.num_detections == result.num_confident == 4


def test_a_detection_is_confident_only_if_both_scores_reach_the_minimum():
    assert compare(made(), made([0.9, 0.5, 0.49, 0.4]), min_score=0.5).num_confident == 1


@pytest.mark.parametrize(("scores", "same"), [([0.9, 0.80005, 0.8, 0.6], True), (SCORES, False)])
def test_only_tied_detections_may_change_their_order(scores, same):
    result = compare(made(scores), made(scores, order=[0, 2, 1, 3]))
    assert result.same_set == result.is_equal == same
    assert result.num_unmatched == 0 and result.score == 0


def test_an_extra_detection_makes_the_sets_different():
    for sides in ((made(), made(SCORES[:3])), (made(SCORES[:3]), made())):
        result = compare(*sides)
        assert not result.same_set and not result.is_equal and result.num_unmatched == 1


@pytest.mark.parametrize(
    ("last", "cut", "same"),
    [
        (0.05005, CUT, True),  # rounding may take it below the score threshold
        (0.0502, CUT, False),
        (0.6999, Cut(0.05, 3), True),  # tied with the last detection of a full list
        (0.6998, Cut(0.05, 3), True),
        (0.6998, Cut(0.05, 4), False),  # the other list is not full
    ],
)
def test_a_detection_at_the_cut_may_be_missing_from_one_list(last, cut, same):
    assert compare(made([0.9, 0.8, 0.7, last]), made(SCORES[:3]), cut).same_set == same


def test_detections_of_another_class_or_place_do_not_match():
    changed = made()
    changed.classes[0] = 1
    assert compare(made(), changed).num_unmatched == 2
    moved = made()
    moved.boxes[0] += 6  # IoU below 0.5
    assert compare(made(), moved).num_unmatched == 2


def test_overlapping_detections_are_matched_to_the_nearest():
    stock = pick(made([0.9, 0.9]), [0, 0])
    stock.boxes[1, 2] += 2
    result = compare(stock, pick(stock, [1, 0]))
    assert result.box == 0 and result.same_set


@pytest.mark.parametrize(("shift", "equal"), [(5e-4, True), (5e-3, False)])
def test_boxes_may_differ_by_at_most_a_thousandth_of_a_pixel(shift, equal):
    plugin = made()
    plugin.boxes[2, 3] += shift
    result = compare(made(), plugin)
    assert result.box == pytest.approx(shift, rel=1e-2)
    assert result.same_set and result.is_equal == equal


@pytest.mark.parametrize(("shift", "equal"), [(5e-5, True), (5e-4, False)])
def test_scores_may_differ_by_at_most_a_ten_thousandth(shift, equal):
    result = compare(made(), made([x - shift for x in SCORES]))
    assert result.score == pytest.approx(shift, rel=1e-2)
    assert result.same_set and result.is_equal == equal


@pytest.mark.parametrize(("value", "far"), [(0.50005, 0), (0.5002, 1), (0.49995, 0), (1.0, 1)])
def test_mask_pixels_may_differ_only_near_the_threshold(value, far):
    stock, plugin = made(), made()
    stock.mask_probs[1] = value
    plugin.mask_probs[1] = 0.5
    plugin.masks[1, 9, 17] = False  # the middle of the box, where the probability is exact
    result = compare(stock, plugin)
    assert (result.mask_pixels, result.far_mask_pixels) == (1, far)
    assert result.mask_prob == pytest.approx(abs(value - 0.5), rel=1e-2)
    assert result.is_equal == (far == 0) and result.differs


def test_nan_is_never_equal():
    plugin = made()
    plugin.scores[0] = torch.nan
    assert not compare(made(), plugin).is_equal


def test_two_empty_lists_are_equal():
    result = compare(made([]), made([]))
    assert result.is_equal and result.num_confident == 0
    assert compare(made(), made([])).num_unmatched == 4
