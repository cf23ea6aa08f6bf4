"""Training of the mask branch alone: it learns, is reproducible, and selects the right class."""

from __future__ import annotations

import pytest
import torch
from conftest import load_script


@pytest.fixture(scope="module")
def alone():
    return load_script("benchmarks/branch_alone.py")


@pytest.fixture(scope="module")
def objects(alone):
    """Returns objects whose features contain the mask, the class, and noise."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.zeros(40, 8, 8, dtype=torch.bool)
    for k, target in enumerate(targets):
        target[:, : 2 + 2 * (k % 3)] = True
    shown = torch.nn.functional.avg_pool2d(targets[:, None].float(), 2)
    classes = torch.arange(40) % 2
    noise = torch.randn(shown.shape, generator=generator)
    features = torch.cat([shown, classes[:, None, None, None].expand_as(shown), noise], dim=1)
    return alone.Objects(features, targets, classes)


@pytest.fixture(scope="module")
def schedule(alone):
    return alone.Schedule(iterations=60, batch_size=16, learning_rate=0.02, conv_dims=(16, 16))


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "softmax_cross_entropy"])
def test_a_head_learns_masks_contained_in_its_features(alone, objects, schedule, loss):
    head = alone.train_head(objects, 2, 1, schedule, [[loss, 1.0]])
    logits = alone.predict(head, objects)
    assert alone.mask_iou(logits > 0, objects.targets).mean() > 0.9


def test_the_trained_head_depends_only_on_the_seed(alone, objects, schedule):
    short = alone.Schedule(**{**vars(schedule), "iterations": 3})
    first, again, other = (
        alone.predict(alone.train_head(objects, 2, s, short), objects) for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_own_class_logits_equal_those_selected_from_all_classes(alone, objects, schedule):
    head = alone.train_head(objects, 2, 1, alone.Schedule(**{**vars(schedule), "iterations": 1}))
    everything = alone.predict(head, objects, all_classes=True)
    own = everything[torch.arange(len(objects)), objects.classes]
    assert torch.allclose(alone.predict(head, objects), own, atol=1e-6)


def test_the_observer_is_called_before_the_first_update_and_after_each(alone, objects, schedule):
    seen = []
    short = alone.Schedule(**{**vars(schedule), "iterations": 2})
    alone.train_head(objects, 1, 1, short, on_iteration=lambda k, head, loss: seen.append(k))
    assert seen == [0, 1, 2]


def test_batches_contain_each_object_once_per_pass(alone):
    batches = alone._Batches(7, 3, seed=0)
    drawn = torch.cat([batches.draw() for _ in range(7)])
    for turn in drawn.split(7):
        assert sorted(turn.tolist()) == list(range(7))


def test_iou_of_two_empty_masks_is_1(alone):
    masks = torch.zeros(2, 2, 2, dtype=torch.bool)
    targets = masks.clone()
    targets[1, 0] = True
    masks[1, 0, 0] = True
    assert alone.mask_iou(masks, targets).tolist() == [1.0, 0.5]


def test_training_without_objects_is_refused(alone, objects):
    none = alone.Objects(objects.features[:0], objects.targets[:0], objects.classes[:0])
    with pytest.raises(ValueError, match="at least one object"):
        alone.train_head(none, 2, 1)
