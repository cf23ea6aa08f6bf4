"""RLEMasks: operations on pred_masks give the same result as on the dense tensor."""

from __future__ import annotations

import copy
import operator
import pickle

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer
from pycocotools import mask as coco_mask
from torch.nn import functional

from mask_head_plugin.structures import RLEMasks

HW = (12, 17)


def make(num_masks=4, seed=0):
    """Returns the same masks as a bool tensor and as RLEMasks."""
    bits = np.random.default_rng(seed).random((num_masks, *HW)) < 0.3
    rles = [coco_mask.encode(np.asfortranarray(m, dtype=np.uint8)) for m in bits]
    return torch.from_numpy(bits), RLEMasks(rles, HW)


def same(actual, expected) -> bool:
    """Returns whether two results are equal in type, device and value."""
    if isinstance(expected, torch.Tensor):
        alike = (actual.dtype, actual.device, actual.shape) == (
            *(expected.dtype, expected.device, expected.shape),
        )
        return alike and np.array_equal(actual.numpy(), expected.numpy())
    if isinstance(expected, list | tuple):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(expected, np.ndarray):
        return actual.dtype == expected.dtype and np.array_equal(actual, expected)
    return type(actual) is type(expected) and actual == expected


ROW = torch.arange(4.0).view(4, 1, 1)
OPERATIONS = {
    "isinstance": lambda m: isinstance(m, torch.Tensor),
    "len": len,
    "shape": lambda m: m.shape,
    "size": lambda m: (m.size(), m.size(1), m.dim(), m.ndim, m.numel(), m.nelement()),
    "type": lambda m: (m.dtype, m.device, m.is_cuda, m.requires_grad, m.layout),
    "sum": lambda m: m.sum(),
    "sum of pixels": lambda m: m.sum(dim=(1, 2)),
    "torch.sum": lambda m: torch.sum(m, (1, 2)),
    "mean": lambda m: m.float().mean((1, 2)),
    "float": lambda m: m.float(),
    "int": lambda m: m.int(),
    "uint8": lambda m: m.to(torch.uint8),
    "type as": lambda m: m.type_as(ROW),
    "detach": lambda m: m.detach(),
    "as_tensor": torch.as_tensor,
    "as_tensor of a type": lambda m: torch.as_tensor(m, dtype=torch.float32),
    "stack of a loop": lambda m: torch.stack(list(m)),
    "numpy of a loop": lambda m: [x.cpu().numpy() for x in m],
    "cpu, numpy": lambda m: m.detach().cpu().numpy().astype("uint8"),
    "np.asarray": np.asarray,
    "np.array": lambda m: np.array(m, dtype=np.uint8, copy=True),
    "np.transpose": lambda m: np.transpose(m.numpy(), (1, 2, 0)),
    "tolist": lambda m: m.tolist(),
    "pixels": lambda m: m[:, 2:5, 3:9],
    "pixels of one": lambda m: m[1, 2:5, ::2],
    "pixel": lambda m: m[1, 2, 3].item(),
    "new axis": lambda m: m[:, None],
    "ellipsis": lambda m: m[..., 0],
    "ellipsis alone": lambda m: m[...],
    "two axes of indices": lambda m: m[torch.tensor([[0, 1], [2, 3]])],
    "mask of pixels": lambda m: m[torch.ones(4, *HW, dtype=torch.bool)],
    "as an index": lambda m: (ROW + torch.zeros(HW))[m],
    "select": lambda m: m.index_select(0, torch.tensor([2, 0])),
    "any": lambda m: m.any(dim=0),
    "any pixel": lambda m: bool(m.any()),
    "any along pixels": lambda m: m.flatten(1).any(1),
    "max": lambda m: m.max(),
    "argmax": lambda m: m.float().argmax(0),
    "nonzero": lambda m: m.nonzero(),
    "where": lambda m: torch.where(m, ROW, -ROW),
    "not": lambda m: ~m,
    "and": lambda m: m & m[0],
    "or from the left": lambda m: m[0] | m,
    "times": lambda m: m * ROW,
    "equals": lambda m: m == m[0],
    "permute": lambda m: m.permute(1, 2, 0),
    "unsqueeze": lambda m: m.unsqueeze(1),
    "view": lambda m: m.view(len(m), -1),
    "reshape": lambda m: m.reshape(-1),
    "IoUs": lambda m: m.flatten(1).float() @ m.flatten(1).float().T,
    "interpolate": lambda m: functional.interpolate(m[None].float(), scale_factor=2),
    "stack": lambda m: torch.stack([m, m]),
    "cat": lambda m: torch.cat([m, m[1:]]),
    "cat of types": lambda m: torch.cat([m, m.int()]),
    "cat along pixels": lambda m: torch.cat([m, m], dim=2),
    "cat of keywords": lambda m: torch.cat(tensors=[m, m], dim=0),
    "split": lambda m: m.split(2),
    "copied from": lambda m: torch.zeros(4, *HW).copy_(m),
    "zeros_like": torch.zeros_like,
    "BitMasks": lambda m: BitMasks(m).get_bounding_boxes().tensor,
    "dlpack": torch.from_dlpack,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_the_same_result_as_on_the_tensor(name):
    tensor, masks = make()
    assert same(OPERATIONS[name](masks), OPERATIONS[name](tensor))


@pytest.mark.parametrize("index", [0, -1, np.int64(2), torch.tensor(1)])
def test_an_integer_index_gives_one_mask_as_a_tensor(index):
    tensor, masks = make()
    assert type(masks[index]) is torch.Tensor and torch.equal(masks[index], tensor[index])


@pytest.mark.parametrize(
    "index",
    [
        *(slice(1, 3), slice(None, None, -2), [True, False, True, False], [2, 0, 0], []),
        *(torch.tensor([False, True, True, False]), torch.tensor([3, 1]), np.array([1, 2])),
        pytest.param(
            torch.tensor([1, 0, 0, 1], dtype=torch.uint8),
            marks=pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8"),
        ),
    ],
    ids=str,
)
def test_selected_rows_stay_run_lengths(index):
    tensor, masks = make()
    chosen = masks[index]
    assert isinstance(chosen, RLEMasks) and chosen.image_hw == HW
    if isinstance(index, torch.Tensor):
        expected = tensor[index].numpy()
    else:  # tensors do not support negative steps
        expected = tensor.numpy()[index if isinstance(index, slice) or len(index) else slice(0)]
    assert np.array_equal(np.asarray(chosen), expected)


@pytest.mark.parametrize(
    "keep",
    [
        *(lambda m: m.detach(), lambda m: m.clone(), lambda m: m.cpu(), lambda m: m.bool()),
        *(lambda m: m.contiguous(), lambda m: m.to("cpu", torch.bool), lambda m: m.data),
        *(torch.as_tensor, copy.copy, copy.deepcopy, lambda m: torch.cat([m[:1], m[1:]])),
        *(lambda m: pickle.loads(pickle.dumps(m)), lambda m: RLEMasks.cat([m[:2], m[2:]])),
    ],
)
def test_copies_stay_run_lengths(keep):
    tensor, masks = make()
    kept = keep(masks)
    assert isinstance(kept, RLEMasks) and torch.equal(kept.dense(), tensor)


def test_invalid_indices_are_refused():
    tensor, masks = make()
    for index in [4, [True, False], torch.tensor([7]), 1.5, torch.zeros(0, dtype=torch.bool)]:
        for given in (tensor, masks):
            with pytest.raises(IndexError):
                given[index]


@pytest.mark.parametrize(
    "change",
    [
        *(lambda m: m.__setitem__(0, True), lambda m: m.zero_(), lambda m: m.copy_(m.dense())),
        *(lambda m: operator.iand(m, m[0]), lambda m: m.data_ptr(), lambda m: m.untyped_storage()),
        lambda m: torch.logical_not(m, out=m),
        lambda m: torch.nn.init.constant_(m, 1),
    ],
)
def test_operations_that_need_dense_masks_are_refused_with_advice(change):
    tensor, masks = make()
    with pytest.raises(
        RuntimeError, match=r"pred_masks\.dense\(\).* MODEL\.MASK_OUTPUT to bitmask"
    ):
        change(masks)
    assert torch.equal(masks.dense(), tensor)


def test_decoded_masks_are_on_the_device_of_the_detections():
    """The device "meta" exists on every machine, because its tensors have no values."""
    masks = make()[1].to("meta")
    assert isinstance(masks, RLEMasks) and masks.device.type == "meta"
    for result in (
        masks[0],
        masks.float(),
        masks[1:],
        masks.sum((1, 2)),
        masks.area(),
        masks[:, 0],
    ):
        assert result.device.type == "meta"
    assert np.array_equal(masks.numpy(), make()[0].numpy()), "NumPy arrays must have the values"


def test_areas_are_pixel_counts():
    tensor, masks = make()
    assert same(masks.area(), tensor.sum(dim=(1, 2)))
    assert same(masks[:0].area(), tensor[:0].sum(dim=(1, 2)))


def test_zero_masks_behave_like_an_empty_tensor():
    tensor, masks = make(0)
    for name in ("sum of pixels", "float", "any along pixels", "np.asarray", "numpy of a loop"):
        assert same(OPERATIONS[name](masks), OPERATIONS[name](tensor))
    assert masks.shape == (0, *HW) and list(masks) == []


def test_numpy_conversion_supports_dtype_and_copy():
    tensor, masks = make()
    assert np.array_equal(np.array(masks, dtype=float), tensor.numpy().astype(float))
    with pytest.raises(ValueError, match="copy"):
        masks.__array__(copy=False)


def test_instances_can_select_join_and_move_masks():
    tensor, masks = make()
    other_tensor, other = make(2, seed=1)
    instances = [Instances(HW, pred_masks=m) for m in (masks, other)]
    joined = Instances.cat([x.to("cpu") for x in instances]).pred_masks
    assert isinstance(joined, RLEMasks)
    assert np.array_equal(joined.numpy(), torch.cat([tensor, other_tensor]).numpy())
    filtered = instances[0][torch.tensor([True, False, False, True])].pred_masks
    assert isinstance(filtered, RLEMasks)
    assert np.array_equal(filtered.numpy(), tensor.numpy()[[0, 3]])


def test_objects_lost_by_a_tracker_join_those_of_the_next_frame():
    """Imitates detectron2's trackers, because they need SciPy."""
    results = []
    for masks in make():
        previous = copy.deepcopy(Instances(HW, pred_masks=masks))
        lost = [list(previous.pred_masks)[k].numpy().astype(np.uint8) for k in (0, 2)]
        merged = Instances.cat(
            [
                Instances(HW, pred_masks=masks[1:2]),
                Instances(HW, pred_masks=torch.IntTensor(np.stack(lost))),
            ]
        )
        results.append(merged.pred_masks)
    assert same(*results)


def test_masks_of_another_size_are_refused():
    rle = coco_mask.encode(np.zeros((3, 4), np.uint8, order="F"))
    with pytest.raises(ValueError, match=r"mask 0 has the size \[3, 4\], but .* \(12, 17\)"):
        RLEMasks([rle], HW)
    with pytest.raises(ValueError, match="no masks"):
        RLEMasks.cat([])


@pytest.mark.parametrize("mode", [ColorMode.IMAGE, ColorMode.IMAGE_BW])
@pytest.mark.parametrize("video", [False, True])
def test_visualizers_draw_the_same_picture_as_for_dense_masks(video, mode):
    pictures = []
    for masks in make():
        instances = Instances(HW)
        boxes = torch.tensor([[1.0, 1, 9, 8], [2, 2, 12, 9], [0, 0, 6, 6], [5, 3, 16, 11]])
        instances.pred_boxes, instances.pred_masks = Boxes(boxes), masks
        instances.scores, instances.pred_classes = torch.rand(4), torch.zeros(4).long()
        image = np.full((*HW, 3), 90, np.uint8)
        np.random.seed(0)  # determines the visualizers' colours
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
