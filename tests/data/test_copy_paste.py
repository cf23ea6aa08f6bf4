"""Copy-paste: each pixel and its labels belong to the topmost object."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
import torch
from conftest import small_config
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_head_plugin import ConfigError
from mask_head_plugin.config_check import check_config
from mask_head_plugin.data import TrainLoader
from mask_head_plugin.data.copy_paste import (
    CopyPasteMapper,
    bit_masks,
    check_copy_paste,
    paste_objects,
)
from mask_head_plugin.data.training_sheet import write_training_sheet
from mask_head_plugin.engine.guards import describe_batch
from mask_head_plugin.modeling.mask_head import crop_gt_masks

PASTE = ("INPUT.COPY_PASTE.PROBABILITY", "1.0")
NAME = "test_copy_paste"


def made_sample(rng, hw, num_objects, value):
    """Returns a sample and its masks: rectangles with holes, some of them empty.

    All pixels of the image differ.
    """
    masks = np.zeros((num_objects, *hw), bool)
    for mask in masks:
        y, x = (rng.integers(0, n) for n in hw)
        mask[y : y + rng.integers(0, 7), x : x + rng.integers(0, 7)] = True
        mask &= rng.random(hw) < 0.9
    pixels = np.arange(hw[0] * hw[1]).reshape(1, *hw) % 100 + value
    objects = Instances(hw, gt_boxes=Boxes(rng.random((num_objects, 4))))
    objects.gt_classes = torch.as_tensor(rng.integers(0, 5, num_objects))
    if num_objects:
        objects.gt_masks = BitMasks(torch.as_tensor(masks))
    image = torch.as_tensor(pixels, dtype=torch.uint8)
    sample = {"image": image, "sem_seg": image[0].long(), "file_name": f"{value}.png"}
    return {**sample, "instances": objects}, masks


def pasted_pixel_by_pixel(ours, theirs, chosen, top, left):
    """Computes pixel by pixel where objects are pasted and what remains of all masks."""
    height, width = ours.shape[1:]
    pasted = np.zeros((height, width), bool)
    remaining = np.zeros((len(ours) + len(theirs), height, width), bool)
    sizes = np.zeros(len(theirs), int)
    for y, x in itertools.product(range(height), range(width)):
        v, u = y - top, x - left
        inside = 0 <= v < theirs.shape[1] and 0 <= u < theirs.shape[2]
        here = [k for k in range(len(theirs)) if inside and theirs[k, v, u]]
        sizes[here] += 1
        if set(here) & set(chosen):
            pasted[y, x] = True
            remaining[[len(ours) + k for k in here], y, x] = True
        else:
            remaining[: len(ours), y, x] = ours[:, y, x]
    for k, size in enumerate(sizes):
        if 2 * remaining[len(ours) + k].sum() < size:
            remaining[len(ours) + k] = False
    return pasted, remaining


sides = st.tuples(st.integers(1, 8), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), hw=sides, other_hw=sides, top=st.integers(-5, 5),
    left=st.integers(-5, 5), num_ours=st.integers(0, 4), num_theirs=st.integers(1, 4),
)  # fmt: skip
def test_pixels_and_labels_belong_to_the_topmost_object(
    seed, hw, other_hw, top, left, num_ours, num_theirs
):
    rng = np.random.default_rng(seed)
    top = int(np.clip(top, 1 - other_hw[0], hw[0] - 1))
    left = int(np.clip(left, 1 - other_hw[1], hw[1] - 1))
    sample, ours = made_sample(rng, hw, num_ours, 0)
    source, theirs = made_sample(rng, other_hw, num_theirs, 100)
    before, classes = sample["image"].clone(), sample["instances"].gt_classes
    chosen = rng.permutation(num_theirs)[: rng.integers(1, num_theirs + 1)]
    paste_objects(sample, source, chosen, (top, left))
    pasted, remaining = pasted_pixel_by_pixel(ours, theirs, chosen.tolist(), top, left)
    if not pasted.any():
        assert "pasted_from" not in sample and torch.equal(sample["image"], before)
        assert len(sample["instances"]) == num_ours
        return
    assert np.array_equal(sample["image"][0] >= 100, pasted), (
        "exactly the pasted pixels must come from the source"
    )
    rows, columns = np.nonzero(pasted)
    assert torch.equal(
        sample["image"][0, rows, columns], source["image"][0, rows - top, columns - left]
    )
    assert torch.equal(sample["image"][0, ~pasted], before[0, ~pasted])
    assert torch.equal(sample["sem_seg"], sample["image"][0].long())
    objects, seen = sample["instances"], remaining.any(axis=(1, 2))
    assert np.array_equal(objects.gt_masks.tensor.numpy(), remaining[seen])
    both = torch.cat([classes, source["instances"].gt_classes])
    assert torch.equal(objects.gt_classes, both[torch.as_tensor(seen)])
    for box, mask in zip(objects.gt_boxes.tensor.tolist(), remaining[seen], strict=True):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    union = (ours.any(axis=0) & ~pasted) | pasted
    assert np.array_equal(objects.gt_masks.tensor.any(dim=0), union), (
        "every labelled pixel must keep a label"
    )


def square(x, y, side):
    return np.array([x, y, x + side, y, x + side, y + side, x, y + side], float)


def made_polygons(squares, value):
    objects = Instances((40, 40), gt_boxes=Boxes(torch.zeros(len(squares), 4)))
    objects.gt_classes = torch.arange(len(squares))
    objects.gt_masks = PolygonMasks([[square(*each)] for each in squares])
    return {"image": torch.full((3, 40, 40), value, dtype=torch.uint8), "instances": objects}


def as_bits(sample):
    masks = BitMasks.from_polygon_masks(sample["instances"].gt_masks, 40, 40)
    objects = Instances((40, 40), **{**sample["instances"].get_fields(), "gt_masks": masks})
    return {**sample, "instances": objects}


def test_polygons_and_bit_masks_give_the_same_result_and_train_together():
    ours, theirs = [(2, 2, 20), (25, 25, 10), (6, 6, 4)], [(5, 5, 12), (24, 24, 12), (26, 26, 3)]
    chosen = np.array([0, 1])
    mixed = made_polygons(ours, 1)
    paste_objects(mixed, made_polygons(theirs, 2), chosen, (0, 0))
    bits = as_bits(made_polygons(ours, 1))
    paste_objects(bits, as_bits(made_polygons(theirs, 2)), chosen, (0, 0))
    masks = mixed["instances"].gt_masks.tensor
    assert torch.equal(masks, bits["instances"].gt_masks.tensor)
    # The two hidden squares are gone; the square within a pasted one was pasted with it.
    assert mixed["instances"].gt_classes.tolist() == [0, 0, 1, 2]
    assert masks.flatten(1).sum(1).tolist() == [400 - 144, 144, 144, 9]
    batch = [made_polygons(ours, 1)["instances"], mixed["instances"]]
    for x in batch:
        x.proposal_boxes = Boxes(torch.tensor([[2.0, 2, 22, 22]]).repeat(len(x), 1))
    targets = crop_gt_masks(batch, torch.zeros(7, 20, 20))
    assert targets.shape == (7, 20, 20) and targets[0].all()
    hole = torch.zeros(20, 20, dtype=torch.bool)
    hole[3:15, 3:15] = True
    assert torch.equal(targets[3], ~hole)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Registers images of two sizes, each with a small and a large square and a crowd."""
    folder = tmp_path_factory.mktemp("images")
    made = []
    for k, (height, width) in enumerate([(40, 60), (60, 40), (40, 60), (60, 40), (60, 60)]):
        pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
        cv2.imwrite(str(folder / f"{k}.png"), pixels)
        squares = [(3 + k, 5, 8), (10, 12 + k, 15), (0, 0, 38)]
        annotations = [
            {
                "bbox": [x, y, side, side],
                "bbox_mode": 1,
                "category_id": k,
                "segmentation": [square(x, y, side).tolist()],
                "iscrowd": int(side == 38),
            }
            for x, y, side in squares
        ]
        place = {"file_name": str(folder / f"{k}.png"), "image_id": k}
        made.append({**place, "height": height, "width": width, "annotations": annotations})
    DatasetCatalog.register(NAME, lambda: made)
    yield made
    DatasetCatalog.remove(NAME)


def loader(*opts):
    data = ["DATASETS.TRAIN", f"('{NAME}',)", "INPUT.MASK_FORMAT", "polygon"]
    return TrainLoader(
        small_config("Base-Small.yaml", *data, "INPUT.MIN_SIZE_TRAIN", "(48,)", *opts)
    )


def batches(source, iteration, count):
    source.go_to(5, iteration)
    return list(itertools.islice(source, count))


def as_plain(batch):
    """Returns the content of a batch in a form that can be compared."""
    return [
        (
            *(x["file_name"], x.get("pasted_from"), x["image"].tolist()),
            *(x["instances"].gt_classes.tolist(), x["instances"].gt_boxes.tensor.tolist()),
            x["instances"].gt_masks.tensor.tolist(),
        )
        for x in batch
    ]


def test_resumed_runs_and_workers_paste_the_same_objects(records):
    jitter = ("INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.IMAGE_SIZE", "48")
    whole = [as_plain(x) for x in batches(loader(*PASTE, *jitter), 0, 6)]
    resumed = batches(loader(*PASTE, *jitter, "DATALOADER.NUM_WORKERS", "2"), 3, 3)
    assert [as_plain(x) for x in resumed] == whole[3:]
    sources = {sample[1] for batch in whole for sample in batch} - {None}
    assert len(sources) > 2, "objects must come from several images"


def test_images_without_a_paste_are_unchanged(records):
    plain = batches(loader(), 0, 8)
    some = batches(loader("INPUT.COPY_PASTE.PROBABILITY", "0.5"), 0, 8)
    number_pasted = 0
    for before, after in zip(itertools.chain(*plain), itertools.chain(*some), strict=True):
        assert before["file_name"] == after["file_name"]
        if "pasted_from" in after:
            number_pasted += 1
            assert "some from " + after["pasted_from"] in describe_batch([after])
        else:
            assert torch.equal(before["image"], after["image"])
            assert isinstance(after["instances"].gt_masks, PolygonMasks)
    assert 3 <= number_pasted <= 13


def test_crowds_are_neither_pasted_nor_labelled(records):
    for sample in itertools.chain(*batches(loader(*PASTE), 0, 6)):
        areas = bit_masks(sample).flatten(1).sum(1)
        assert len(areas) <= 4 and areas.max() < 24 * 24  # the crowds are 38 x 38


def test_smaller_images_are_pasted_anywhere_in_larger_ones():
    def map_record(index):
        sample = made_polygons([(2, 2, 4)], index)
        if index:
            return sample
        objects = Instances((90, 60), gt_boxes=Boxes(torch.zeros(0, 4)))
        objects.gt_classes = torch.zeros(0, dtype=torch.int64)
        return {"image": torch.zeros(3, 90, 60, dtype=torch.uint8), "instances": objects}

    mapper = CopyPasteMapper(map_record, [1, 2, 3], 1.0)
    np.random.seed(0)
    boxes = torch.cat([mapper(0)["instances"].gt_boxes.tensor for _ in range(200)])
    assert (boxes[:, 2:] - boxes[:, :2] == 4).all()
    assert boxes.amin(0)[:2].tolist() == [2, 2] and boxes[:, 0].max() == 22
    assert boxes[:, 1].max() > 45


def test_declined_images_and_images_without_objects_are_not_pasted():
    empty = Instances((40, 40), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    for other in (None, {**made_polygons([(2, 2, 4)], 2), "instances": empty}):
        answers = {"own": made_polygons([(1, 1, 3)], 1), "other": other, "declined": None}
        mapper = CopyPasteMapper(answers.get, ["other"], 1.0)
        assert "pasted_from" not in mapper("own") and mapper("declined") is None


def test_the_error_for_objects_without_masks_names_the_image():
    sample = {**made_polygons([(2, 2, 4)], 1), "file_name": "a.png"}
    sample["instances"].remove("gt_masks")
    mapper = CopyPasteMapper(lambda _: sample, [0], 1.0)
    with pytest.raises(
        ConfigError, match=r"PROBABILITY needs objects with masks.* none for a\.png"
    ):
        mapper(0)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.KEYPOINT_ON", "True"], r"1\.0 does not work with MODEL\.KEYPOINT_ON"),
        (["MODEL.LOAD_PROPOSALS", "True"], r"does not work with MODEL\.LOAD_PROPOSALS"),
        (
            ["MODEL.MASK_ON", "False"],
            r"PROBABILITY 1\.0 needs masks to cut objects out.*MODEL\.MASK_ON True",
        ),
    ],
)
def test_models_that_need_other_annotations_are_refused(opts, message):
    cfg = small_config("Base-Small.yaml", *PASTE, *opts)
    with pytest.raises(ConfigError, match=message):
        check_copy_paste(cfg)
    with pytest.raises(ConfigError, match=message):
        TrainLoader(cfg)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["INPUT.COPY_PASTE.PROBABILITY", "1.5"], r"PROBABILITY is 1\.5; it must be between 0 and"),
        (["INPUT.LSJ.IMAGE_SIZE", "0"], r"INPUT\.LSJ\.IMAGE_SIZE is 0; it must be at least 1"),
        (["INPUT.LSJ.MIN_SCALE", "0.0"], r"INPUT\.LSJ\.MIN_SCALE is 0\.0; it must be above 0"),
        (["INPUT.LSJ.MIN_SCALE", "3.0"], r"MIN_SCALE 3\.0 is above INPUT\.LSJ\.MAX_SCALE 2\.0"),
        (
            ["INPUT.LSJ.ENABLED", "True", "INPUT.FORMAT", "YUV-BT.601"],
            r"pads images with 128.*YUV-BT\.601",
        ),
        ([*PASTE, "MODEL.KEYPOINT_ON", "True"], r"does not work with MODEL\.KEYPOINT_ON"),
    ],
)
def test_invalid_values_are_refused_before_anything_is_built(opts, message):
    with pytest.raises(ConfigError, match=message):
        check_config(small_config("Base-Small.yaml", *opts), train=True)


def test_the_sheet_shows_training_images_with_their_masks(records, tmp_path):
    source = loader(*PASTE)
    cfg = small_config("Base-Small.yaml", "DATASETS.TRAIN", f"('{NAME}',)")
    path = tmp_path / "new" / "sheet.png"
    write_training_sheet(cfg, batches(source, 0, 1)[0], path)
    picture = cv2.imread(str(path))
    assert picture.shape[1] > 1600, "the sheet must show two pairs of pictures in a row"
    left, right = picture[40:330, 10:400], picture[40:330, 410:800]
    assert (left != right).any() and (left != 255).any()
