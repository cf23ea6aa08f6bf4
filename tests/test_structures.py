"""RLEMasks: what detectron2 does with pred_masks works as on the tensor that they stand for."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer
from pycocotools import mask as coco_mask

from mask_head_plugin.structures import RLEMasks

HW = (12, 17)


def make(num_masks=4, seed=0):
    """Returns a bool tensor and the same masks as run lengths."""
    bits = np.random.default_rng(seed).random((num_masks, *HW)) < 0.3
    rles = [coco_mask.encode(np.asfortranarray(m, dtype=np.uint8)) for m in bits]
    return torch.from_numpy(bits), RLEMasks(rles, HW)


def test_length_shape_and_iteration():
    tensor, masks = make()
    assert len(masks) == 4 and masks.shape == tensor.shape
    items = list(masks)
    assert all(isinstance(m, np.ndarray) and m.dtype == bool for m in items)
    assert np.array_equal(np.stack(items), tensor.numpy())


@pytest.mark.parametrize("index", [0, -1, np.int64(2), torch.tensor(1)])
def test_an_integer_gives_the_tensor_of_one_mask(index):
    tensor, masks = make()
    assert isinstance(masks[index], torch.Tensor) and torch.equal(masks[index], tensor[index])


@pytest.mark.parametrize(
    "index",
    [
        *(slice(1, 3), slice(None, None, -2), [True, False, True, False], [2, 0, 0], []),
        *(torch.tensor([False, True, True, False]), torch.tensor([3, 1]), np.array([1, 2])),
        torch.tensor([1, 0, 0, 1], dtype=torch.uint8),
    ],
    ids=str,
)
def test_other_indices_give_masks(index):
    tensor, masks = make()
    chosen = masks[index]
    assert isinstance(chosen, RLEMasks) and chosen.image_hw == HW
    if isinstance(index, torch.Tensor):
        expected = tensor[index].numpy()
    else:  # tensors take no negative steps
        expected = tensor.numpy()[index if isinstance(index, slice) or len(index) else slice(0)]
    assert np.array_equal(np.asarray(chosen), expected)


def test_indices_that_do_not_fit_are_refused():
    _, masks = make()
    wrong = [4, [True, False], torch.tensor([7]), (0, 2), 1.5, None, torch.zeros(2, 2).long()]
    for index in [*wrong, torch.zeros(0, dtype=torch.bool)]:
        with pytest.raises(IndexError):
            masks[index]


def test_numpy_takes_dtype_and_copy():
    tensor, masks = make()
    assert np.asarray(masks).dtype == bool and np.array_equal(masks.numpy(), tensor.numpy())
    assert np.asarray(masks, dtype=np.uint8).dtype == np.uint8
    assert np.array_equal(np.array(masks, dtype=float), tensor.numpy().astype(float))
    assert np.array_equal(np.array(masks, copy=True), tensor.numpy())
    with pytest.raises(ValueError, match="copy"):
        masks.__array__(copy=False)


def test_any_is_the_union():
    tensor, masks = make()
    assert torch.equal(masks.any(dim=0), tensor.any(dim=0))
    assert not make(0)[1].any(dim=0).any() and make(0)[1].any(dim=0).shape == HW
    with pytest.raises(ValueError, match="dim is 1"):
        masks.any(dim=1)


def test_devices_cat_and_pickle():
    tensor, masks = make()
    other_tensor, other = make(2, seed=1)
    instances = [Instances(HW, pred_masks=m) for m in (masks, other)]
    joined = Instances.cat([x.to("cpu") for x in instances]).pred_masks
    assert np.array_equal(joined.numpy(), torch.cat([tensor, other_tensor]).numpy())
    assert masks.cpu() is masks and masks.to("cuda") is masks
    assert np.array_equal(pickle.loads(pickle.dumps(masks)).numpy(), tensor.numpy())
    filtered = instances[0][torch.tensor([True, False, False, True])]
    assert np.array_equal(filtered.pred_masks.numpy(), tensor.numpy()[[0, 3]])


def test_masks_of_another_size_are_refused():
    rle = coco_mask.encode(np.zeros((3, 4), np.uint8, order="F"))
    with pytest.raises(ValueError, match=r"mask 0 has size \[3, 4\], the image \(12, 17\)"):
        RLEMasks([rle], HW)
    with pytest.raises(ValueError, match="no masks"):
        RLEMasks.cat([])


@pytest.mark.parametrize("mode", [ColorMode.IMAGE, ColorMode.IMAGE_BW])
@pytest.mark.parametrize("video", [False, True])
def test_visualizers_draw_the_same_picture(video, mode):
    pictures = []
    for masks in make():
        instances = Instances(HW)
        boxes = torch.tensor([[1.0, 1, 9, 8], [2, 2, 12, 9], [0, 0, 6, 6], [5, 3, 16, 11]])
        instances.pred_boxes, instances.pred_masks = Boxes(boxes), masks
        instances.scores, instances.pred_classes = torch.rand(4), torch.zeros(4).long()
        image = np.full((*HW, 3), 90, np.uint8)
        np.random.seed(0)  # the visualizers' colours
        if video:
            drawn = VideoVisualizer(
                MetadataCatalog.get("no_such_set"), mode
            ).draw_instance_predictions(image, instances)
        else:
            drawn = Visualizer(image, instance_mode=mode).draw_instance_predictions(instances)
        pictures.append(drawn.get_image())
        torch.manual_seed(0)
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != 90).any()
    assert np.array_equal(*pictures)
