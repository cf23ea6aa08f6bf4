"""Settings chosen for a data set: sizes, crops, anchors, limits, samplers and schedules."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from detectron2.data.samplers import RepeatFactorTrainingSampler

from mask_head_plugin.new_config.anchors import choose_anchors, covered_share
from mask_head_plugin.new_config.backbone import choose_backbone
from mask_head_plugin.new_config.commented_yaml import Setting, render
from mask_head_plugin.new_config.data_facts import DataFacts, facts_of
from mask_head_plugin.new_config.device import Device
from mask_head_plugin.new_config.input_size import choose_input_size
from mask_head_plugin.new_config.schedule import choose_schedule
from mask_head_plugin.new_config.settings import choose_settings

CPU, GPU = Device("cpu", True, 24e9, 2), Device("cuda", False, 12e9, 2)


def made_facts(image_hw, sides, *, per_image=None, classes=1) -> DataFacts:
    """Returns facts about square objects with the given sides.

    The first ``per_image`` objects (default: 1) are in the first image, the next in the second, and
    so on. After the last image, the first is next.
    """
    image_hw, sides = np.array(image_hw), np.asarray(sides, float)
    return DataFacts(
        image_hw=image_hw,
        object_hw=np.stack([sides, sides], axis=1),
        image_of=np.arange(len(sides)) // (per_image or 1) % len(image_hw),
        class_of=np.arange(len(sides)) % classes,
        class_names=[f"class {k}" for k in range(classes)],
        has_polygons=True,
        has_run_lengths=False,
    )


def values(facts: DataFacts, device: Device = CPU) -> dict:
    settings, _ = choose_settings(facts, None, choose_backbone(device), device)
    return {setting.key: setting.value for setting in settings}


def test_images_with_large_enough_objects_keep_their_size():
    size = choose_input_size(made_facts([(200, 300)] * 4, np.linspace(16, 150, 40)), CPU)
    assert (size.short_edge, size.train_sizes, size.crop) == (0, [0], None)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("hw", [(256, 256), (480, 640), (3000, 4000), (900, 300)])
@pytest.mark.parametrize("smallest", [2, 9, 40])
def test_the_smallest_tenth_of_objects_has_16_pixels_if_the_device_allows(hw, smallest, device):
    facts = made_facts([hw] * 3, np.linspace(smallest, 3 * smallest, 90))
    size = choose_input_size(facts, device)
    limit = size.short_edge + 32 if size.short_edge else max(hw)
    bound_by_pixels = (limit / min(hw)) ** 2 * hw[0] * hw[1] * (size.crop or 1) ** 2 >= (
        device.view_pixels if size.crop is None else device.image_pixels * size.crop**2
    )
    magnified_most = size.short_edge >= 4 * min(hw) - 16
    assert size.smallest >= 15.5 or bound_by_pixels or magnified_most
    if size.short_edge:
        assert size.view_pixels <= 1.15 * device.view_pixels
    if size.crop is not None:
        assert size.view_pixels < size.image_pixels


def test_crops_are_scaled_like_whole_images():
    facts = made_facts([(256, 256), (520, 696)], np.tile([9.0, 24, 40], 40))
    size = choose_input_size(facts, CPU)
    assert size.crop is not None and size.short_edge
    middle = size.train_sizes[2]
    assert middle == round(size.crop * size.short_edge)


def test_cropped_polygons_become_bit_masks():
    large = values(made_facts([(2000, 2000)], np.linspace(10, 30, 50)))
    assert large["INPUT.CROP.ENABLED"] and large["INPUT.MASK_FORMAT"] == "bitmask"
    small = values(made_facts([(400, 400)], np.linspace(20, 60, 50)))
    assert "INPUT.CROP.ENABLED" not in small and small["INPUT.MASK_FORMAT"] == "polygon"


def test_images_of_different_size_are_not_scaled_if_objects_have_the_same_pixel_size():
    """Simulates cells of the same size that a microscope photographs in fields of two sizes."""
    facts = made_facts([(300, 300), (900, 900)], np.tile([20.0, 22, 24, 26], 20))
    size = choose_input_size(facts, CPU)
    assert size.short_edge == 0 and isinstance(size.crop, int)
    # The objects have the same size relative to their images, as in photographs of two resolutions.
    photos = made_facts([(300, 300), (900, 900)], np.tile([20.0, 60], 40))
    assert choose_input_size(photos, CPU).short_edge > 0


def test_anchors_match_the_sizes_and_ratios_of_boxes():
    rng = np.random.default_rng(0)
    sides = np.repeat([10.0, 27, 80, 180, 15, 320, 40, 120], 200)
    ratio = np.tile([0.25, 1.0, 3.0], 1000)[: len(sides)] * np.exp(rng.normal(0, 0.03, len(sides)))
    hw = sides[:, None] * np.stack([ratio**0.5, ratio**-0.5], axis=1)
    anchors = choose_anchors(hw, np.zeros(len(hw), int))
    assert anchors.levels == ["p2", "p3", "p4", "p5"]
    found = sorted(size for level in anchors.sizes for size in level)
    np.testing.assert_allclose(found, sorted(set(sides)), rtol=0.05)
    np.testing.assert_allclose(anchors.ratios, [0.25, 1, 3], rtol=0.05)
    assert anchors.covered == 1 and anchors.covered_by_default < 1
    again = choose_anchors(hw[::-1], np.zeros(len(hw), int))
    assert (again.sizes, again.ratios) == (anchors.sizes, anchors.ratios)


def test_a_rare_class_of_large_objects_gets_anchors():
    sides = np.concatenate([np.linspace(10, 20, 5000), np.linspace(300, 400, 50)])
    classes = np.repeat([0, 1], [5000, 50])
    anchors = choose_anchors(np.stack([sides, sides], axis=1), classes)
    assert max(map(max, anchors.sizes)) > 280
    assert covered_share(np.array([[350.0, 350]]), anchors.sizes[-1], anchors.ratios) == 1


@pytest.mark.parametrize("side", [3.0, 30.0, 700.0])
def test_identical_boxes_still_give_different_anchors(side):
    anchors = choose_anchors(np.full((7, 2), side), np.zeros(7, int))
    flat = [size for level in anchors.sizes for size in level]
    assert len(set(flat)) == len(flat) == 2 * len(anchors.levels)
    assert len(set(anchors.ratios)) == 3 and anchors.covered == 1


def test_the_covered_fraction_is_computed_from_the_best_iou():
    rng = np.random.default_rng(1)
    boxes, sizes, ratios = np.exp(rng.uniform(1, 6, (200, 2))), (16, 64), (0.5, 2.0)

    def iou(box, size, ratio):
        a, b = size * ratio**0.5, size / ratio**0.5
        shared = min(box[0], a) * min(box[1], b)
        return shared / (box[0] * box[1] + a * b - shared)

    expected = [max(iou(box, s, r) for s in sizes for r in ratios) >= 0.5 for box in boxes]
    assert covered_share(boxes, sizes, ratios) == np.mean(expected)


def test_limits_allow_for_the_most_crowded_image():
    given = values(made_facts([(512, 512)] * 2, np.full(740, 20.0), per_image=370))
    assert given["TEST.DETECTIONS_PER_IMAGE"] >= 1.2 * 370
    assert given["MODEL.RPN.POST_NMS_TOPK_TEST"] >= 2 * 370
    assert values(made_facts([(512, 512)] * 3, [20.0] * 6))["TEST.DETECTIONS_PER_IMAGE"] == 100


@pytest.mark.parametrize("rare_images", [1, 4])
def test_rare_classes_are_repeated_moderately(rare_images):
    """Lets detectron2 compute the repeat factors from the chosen threshold."""
    num_images = 1000
    facts = made_facts([(512, 512)] * num_images, np.full(num_images + rare_images, 40.0))
    facts.class_of[num_images:] = 1
    facts.class_names.append("rare")
    given = values(facts)
    assert given["DATALOADER.SAMPLER_TRAIN"] == "RepeatFactorTrainingSampler"
    records = [{"annotations": []} for _ in range(num_images)]
    for image, k in zip(facts.image_of, facts.class_of, strict=True):
        records[image]["annotations"].append({"category_id": int(k)})
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records, given["DATALOADER.REPEAT_THRESHOLD"]
    )
    assert 2 < factors.max() < 4.1 and factors.min() == 1
    assert "DATALOADER.SAMPLER_TRAIN" not in values(made_facts([(512, 512)] * 9, [40.0] * 9))


def test_the_schedule_depends_on_the_images_and_the_device():
    few = choose_schedule(GPU, 50, 4e5, 0, 0)
    many = choose_schedule(GPU, 5000, 4e5, 0, 0)
    huge = choose_schedule(GPU, 10**6, 4e5, 0, 0)
    assert [x.iterations * x.batch_size for x in (few, many, huge)] == [24_000, 200_000, 1_440_000]
    assert not few.is_cut and few.batch_size == 4, "a batch of 8 would need 80% of the memory"
    slow, fast = (choose_schedule(Device("cpu", True, 24e9, k), 500, 2e5, 0, 1.5e5) for k in (2, 8))
    assert slow.is_cut and slow.iterations * 3 < fast.iterations
    assert slow.iterations * slow.batch_size * 2e5 / (2 * 1.5e5) == pytest.approx(2400, rel=0.05)
    small = Device("cuda", True, 2e9, 2)
    assert choose_schedule(small, 50, 4e5, 0, 0).batch_size * 4e5 * 3000 <= 0.6 * 2e9


def test_evaluations_take_a_small_part_of_the_time():
    for val_images in (0, 10, 1000, 10**6):
        schedule = choose_schedule(CPU, 100, 1e5, val_images * 1e5, 1.5e5)
        evaluations = -(-schedule.iterations // schedule.period)
        share = evaluations * val_images * 0.3 / (schedule.iterations * schedule.batch_size)
        assert evaluations == 1 or share <= 0.25


def test_crowds_and_flat_boxes_are_ignored_and_classes_sorted_by_id():
    square = {"bbox": [0, 0, 30, 20], "segmentation": [[0, 0, 30, 0, 30, 20]]}
    content = {
        "images": [{"id": 7, "height": 50, "width": 60}],
        "categories": [{"id": 9, "name": "b"}, {"id": 2, "name": "a"}],
        "annotations": [
            {**square, "image_id": 7, "category_id": 9},
            {**square, "image_id": 7, "category_id": 2, "bbox": [0, 0, 30, 0]},
            {**square, "image_id": 7, "category_id": 2, "iscrowd": 1},
        ],
    }
    facts = facts_of(content, "x.json")
    assert facts.class_names == ["a", "b"] and facts.class_of.tolist() == [1]
    assert facts.object_hw.tolist() == [[20, 30]] and not facts.has_run_lengths


def test_rendered_settings_are_yaml_with_values_and_reasons():
    settings = [
        Setting("A.B.TEXT", "no: #1", "why " * 60),
        Setting("A.LIST", [[1, 2], [3]]),
        Setting("FILES", [["a", "b c.json"], ["yes", "1"]], "Two."),
        Setting("A.B.NUMBER", 1e-05),
        Setting("NONE", []),
    ]
    text = render("Head\nand more", "../x.yaml", settings)
    assert yaml.safe_load(text) == {
        "_BASE_": "../x.yaml",
        "A": {"B": {"TEXT": "no: #1", "NUMBER": 1e-05}, "LIST": [[1, 2], [3]]},
        "FILES": [["a", "b c.json"], ["yes", "1"]],
        "NONE": [],
    }
    assert text.startswith("# Head\n# and more\n_BASE_") and text.count("why") == 60
    assert max(map(len, text.splitlines())) <= 100
