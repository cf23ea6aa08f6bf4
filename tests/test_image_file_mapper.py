"""ImageFileMapper: images are transformed as in detectron2, and masks stay within the image."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from conftest import small_config
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, PolygonMasks
from made_data import encode
from pycocotools import mask as coco_mask

from mask_head_plugin.image_file_mapper import ImageFileMapper
from mask_head_plugin.lazy_config import use_plugin_mapper

SIDE = 64
JITTER = ("INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.IMAGE_SIZE", str(SIDE))
HW = (50, 70)
FORMATS = ("polygon", "bitmask")
POLYGONS = ("INPUT.MASK_FORMAT", "polygon")
SHAPES = [
    [[4.5, 3.0, 60.2, 5.5, 58.0, 14.0, 15.0, 12.0, 14.0, 44.0, 4.0, 45.0]],  # an L
    [[20.0, 18, 66, 18, 66, 46, 56, 46, 56, 28, 30, 28, 30, 46, 20, 46]],  # open at the bottom
    [[33.0, 32.0, 36.5, 32.0, 36.5, 36.0], [46.0, 32.0, 52.0, 32.0, 52.0, 44.0]],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (*HW, 3), np.uint8)
    cv2.imwrite(str(folder / "a.png"), cv2.GaussianBlur(pixels, (0, 0), 3))
    cv2.imwrite(str(folder / "labels.png"), np.full(HW, 7, np.uint8))
    cv2.imwrite(str(folder / "long.png"), np.full((6, 900, 3), 50, np.uint8))
    return folder


def record(folder, *, as_rle):
    annotations = []
    for k, polygons in enumerate(SHAPES):
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *HW))
        box = coco_mask.toBbox(rle).tolist()
        segmentation = encode(coco_mask.decode(rle)) if as_rle else polygons
        each = {"bbox": box, "bbox_mode": 1, "category_id": k, "segmentation": segmentation}
        annotations.append(each)
    place = {"file_name": str(folder / "a.png"), "image_id": 1, "height": HW[0], "width": HW[1]}
    return {**place, "annotations": annotations}


def mapper(*opts):
    return ImageFileMapper(small_config("Base-Small.yaml", *JITTER, "INPUT.FORMAT", "BGR", *opts))


def stock_augmentations():
    return T.AugmentationList(
        [
            T.ResizeScale(0.1, 2.0, SIDE, SIDE),
            T.FixedSizeCrop((SIDE, SIDE)),
            T.RandomFlip(horizontal=True),
        ]
    )


def test_images_and_label_maps_equal_detectron2s_transforms(folder):
    own = mapper()
    given = {**record(folder, as_rle=True), "sem_seg_file_name": str(folder / "labels.png")}
    sizes = set()
    for seed in range(20):
        np.random.seed(seed)
        sample = own(given)
        np.random.seed(seed)
        labels = np.full(HW, 7, np.uint8)
        seen = T.AugInput(cv2.imread(given["file_name"]), sem_seg=labels)
        stock_augmentations()(seen)
        assert np.array_equal(sample["image"], seen.image.transpose(2, 0, 1))
        assert np.array_equal(sample["sem_seg"], seen.sem_seg)
        assert sample["image"].shape == (3, SIDE, SIDE)
        padding = sample["sem_seg"] == 255
        sizes.add(int(padding.sum()))
        assert (sample["image"][:, padding] == 128).all()
        assert not sample["instances"].gt_masks.tensor[:, padding].any(), "a mask covers padding"
    assert len(sizes) > 5 and 0 in sizes


def test_polygons_and_bit_masks_give_the_same_pixels_and_tight_boxes(folder):
    own = {x: mapper("INPUT.MASK_FORMAT", x, "INPUT.LSJ.MIN_SCALE", "0.7") for x in FORMATS}
    for seed in range(30):
        samples = []
        for as_rle, mask_format in ((False, "polygon"), (False, "bitmask"), (True, "bitmask")):
            np.random.seed(seed)
            samples.append(own[mask_format](record(folder, as_rle=as_rle))["instances"])
        polygons, bits, rles = samples
        assert torch.equal(polygons.gt_masks.tensor, bits.gt_masks.tensor)
        for objects in (polygons, rles):
            tight = objects.gt_masks.get_bounding_boxes().tensor
            assert torch.equal(objects.gt_boxes.tensor, tight)
            assert (tight[:, 2:] > tight[:, :2]).all()
        for k in range(len(SHAPES)):
            one, two = (x.gt_masks.tensor[x.gt_classes == k].any(dim=0) for x in (polygons, rles))
            # Outlines may differ by 1.5 pixels of the file. Jitter enlarges these up to 1.8 times.
            assert not (core(one) & ~two).any() and not (core(two) & ~one).any()


def core(mask):
    outside = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}  # objects end at the border
    return torch.as_tensor(cv2.erode(mask.numpy().astype(np.uint8), np.ones((7, 7)), **outside)) > 0


def test_an_elongated_image_keeps_at_least_one_pixel_of_its_shorter_side(folder):
    own = mapper("INPUT.LSJ.MAX_SCALE", "0.11")
    place = {"file_name": str(folder / "long.png"), "image_id": 1, "height": 6, "width": 900}
    sample = own({**place, "annotations": []})
    assert (sample["image"] == 50).any() and len(sample["instances"]) == 0


def test_an_image_may_have_only_crowds(folder):
    given = record(folder, as_rle=False)
    for annotation in given["annotations"]:
        annotation["iscrowd"] = 1
    assert len(mapper()(given)["instances"]) == 0
    cropped = small_config("Base-Small.yaml", "INPUT.CROP.ENABLED", "True")
    assert len(ImageFileMapper(cropped)(given)["instances"]) == 0


def test_jitter_applies_only_to_training(folder):
    cfg = small_config("Base-Small.yaml", *JITTER)
    assert (
        ImageFileMapper(cfg, is_train=False)(record(folder, as_rle=False))["image"].shape[1] == 96
    )


def test_crops_turn_polygons_into_bit_masks_without_shapely(folder):
    crop = [
        "INPUT.CROP.ENABLED",
        "True",
        "INPUT.CROP.TYPE",
        "absolute",
        "INPUT.CROP.SIZE",
        "[30, 40]",
    ]
    cfg = small_config("Base-Small.yaml", *crop, *POLYGONS, "INPUT.MIN_SIZE_TRAIN", "(0,)")
    np.random.seed(3)
    polygons = ImageFileMapper(cfg)(record(folder, as_rle=False))["instances"].gt_masks.tensor
    np.random.seed(3)
    rles = ImageFileMapper(cfg)(record(folder, as_rle=True))["instances"].gt_masks.tensor
    assert polygons.shape == rles.shape == (len(rles), 30, 40)
    assert (polygons != rles).float().mean() < 0.01


def test_run_lengths_become_bit_masks_for_every_mask_format(folder):
    own = ImageFileMapper(small_config("Base-Small.yaml", *POLYGONS))
    polygons, rles = (own(record(folder, as_rle=x))["instances"].gt_masks for x in (False, True))
    assert isinstance(polygons, PolygonMasks) and isinstance(rles, BitMasks)


@pytest.mark.parametrize("as_rle", [False, True], ids=["polygons", "run lengths"])
def test_a_lazy_config_with_jitter_gives_the_samples_of_a_yaml_config(folder, as_rle):
    loader = use_plugin_mapper(
        model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py").dataloader
    )
    resize, crop, _ = loader.train.mapper.augmentations
    resize.target_height = resize.target_width = SIDE
    crop.crop_size = (SIDE, SIDE)
    lazy, yaml = instantiate(loader.train.mapper), mapper()
    given = record(folder, as_rle=as_rle)
    for seed in range(10):
        samples = []
        for each in (lazy, yaml):
            np.random.seed(seed)
            samples.append(each(given))
        one, two = samples
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["instances"].gt_masks.tensor, two["instances"].gt_masks.tensor)
        assert torch.equal(one["instances"].gt_boxes.tensor, two["instances"].gt_boxes.tensor)
    assert loader.test.mapper._target_ is ImageFileMapper
