"""Class-wise non-maximum suppression, compared with a slow reference."""

from __future__ import annotations

import torch
from torchvision.ops import box_iou

from mask_head_plugin.deploy.class_nms import NO_CANDIDATE, class_nms

EDGE = torch.tensor([100.0, 80.0, 100.0, 80.0])


def slow(boxes, scores, threshold) -> set[int]:
    kept = []
    for group in range(len(boxes)):
        chosen: list[int] = []
        for k in scores[group].argsort(descending=True, stable=True).tolist():
            overlaps = box_iou(boxes[group, [k]], boxes[group, chosen])
            if scores[group, k] > NO_CANDIDATE and not (overlaps > threshold).any():
                chosen.append(k)
        kept += [group * boxes.shape[1] + k for k in chosen]
    return set(kept)


def test_a_better_box_suppresses_within_its_group():
    box, other = [0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 60.0, 10.0]
    boxes = torch.tensor([[box, box, other], [box, other, other]])
    scores = torch.tensor([[0.5, 0.9, 0.1], [0.2, NO_CANDIDATE, 0.3]])
    kept = class_nms(boxes, scores, 0.5, -1, EDGE)
    assert sorted(kept.tolist()) == [1, 2, 3, 5]


def test_random_boxes_give_the_result_of_the_slow_reference():
    corners = torch.rand(4, 40, 2) * 60
    boxes = torch.cat([corners, corners + torch.rand(4, 40, 2) * 20], dim=2)
    scores = torch.rand(4, 40).masked_fill(torch.rand(4, 40) < 0.2, NO_CANDIDATE)
    for threshold in (0.0, 0.3, 0.7, 1.0):
        kept = class_nms(boxes, scores, threshold, -1, EDGE)
        assert set(kept.tolist()) == slow(boxes, scores, threshold)
        assert len(kept) == len(set(kept.tolist()))


def test_boxes_without_area_suppress_nothing():
    boxes = torch.tensor([[[5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 9.0, 9.0]]])
    assert len(class_nms(boxes, torch.tensor([[0.9, 0.8, 0.7]]), 0.5, -1, EDGE)) == 3


def test_no_boxes_or_candidates_give_an_empty_result():
    assert class_nms(torch.zeros(3, 0, 4), torch.zeros(3, 0), 0.5, -1, EDGE).tolist() == []
    scores = torch.full((3, 2), NO_CANDIDATE)
    assert class_nms(torch.zeros(3, 2, 4), scores, 0.5, -1, EDGE).tolist() == []


def test_many_groups_do_not_lose_precision():
    """Offsetting groups in float32 would round the last group's boxes to a quarter of a pixel."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0001]])
    boxes = boxes.expand(2000, -1, -1)
    scores = torch.tensor([0.9, 0.8]).expand(2000, -1)
    edge = torch.tensor([1333.0, 800.0, 1333.0, 800.0])
    assert len(class_nms(boxes, scores, 0.50002, -1, edge)) == 4000
    assert len(class_nms(boxes, scores, 0.5, -1, edge)) == 2000
