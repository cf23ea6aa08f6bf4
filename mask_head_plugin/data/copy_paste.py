"""Copy-paste: objects of one training image pasted onto another, with their masks.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation",
CVPR 2021. Objects are pasted without blending, which gains nothing in the paper's ablation.

Shape alphabet: N objects of an image, H and W height and width of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, polygons_to_bitmask
from torch import Tensor

from ..config import ConfigError

Sample = dict[str, Any]
BoolArray = npt.NDArray[np.bool_]

KEY = "INPUT.COPY_PASTE.PROBABILITY"
SHARE_COMING_ALONG = 0.5
"""An object comes along if at least this share of it lies in the pasted ones."""


def check_copy_paste(cfg: CfgNode) -> None:
    """Refuses INPUT.COPY_PASTE if training needs something that cannot be pasted or cut with an
    object.

    Raises:
        ConfigError: naming the other key.
    """
    if not cfg.INPUT.COPY_PASTE.PROBABILITY:
        return
    told = f"{KEY} {cfg.INPUT.COPY_PASTE.PROBABILITY}"
    if not cfg.MODEL.MASK_ON:
        raise ConfigError(f"{told} cuts objects out by their masks; set MODEL.MASK_ON True, or 0")
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise ConfigError(f"{told} does not work with MODEL.{key}; turn one off")


class CopyPasteMapper:
    """Maps a record and, with some probability, pastes objects of another record onto it.

    That record is any of the data set, with equal chances whatever the sampler, and goes through
    the same augmentations. A random number of its objects, from one to all, is chosen. Apart from
    the pasted pixels, samples are those that the mapper gives without copy-paste.
    """

    def __init__(
        self,
        mapper: Callable[[Any], Sample | None],
        records: Sequence[Any],
        probability: float,
    ) -> None:
        """
        Args:
            mapper: from a record to what the model takes, or None.
            records: those of the data set.
            probability: share of the samples onto which something is pasted.
        """
        self._mapper, self._records, self._probability = mapper, records, probability

    def __call__(self, record: Any) -> Sample | None:
        """Maps a record, with random numbers of NumPy's global generator.

        Returns:
            None if the mapper declines the record. If it declines the other, or that has no
            objects, nothing is pasted.

        Raises:
            ConfigError: if the mapper gives objects without masks.
        """
        sample = self._mapper(record)
        if sample is None or np.random.random() >= self._probability:
            return sample
        source = self._mapper(self._records[np.random.randint(len(self._records))])
        num_objects = 0 if source is None else len(_objects(source))
        if source is None or num_objects == 0:
            return sample
        chosen = np.random.permutation(num_objects)[: np.random.randint(1, num_objects + 1)]
        room = np.subtract(_image_hw(sample), _image_hw(source))
        # The smaller image may be anywhere in the larger one.
        top, left = np.random.randint(np.minimum(room, 0), np.maximum(room, 0) + 1).tolist()
        paste_objects(sample, source, chosen, (top, left))
        return sample


def paste_objects(
    sample: Sample, source: Sample, chosen: npt.NDArray[np.int64], top_left: tuple[int, int]
) -> None:
    """Pastes objects of one sample onto another, in place.

    The pixels of the chosen objects become the source's, in the image and in ``sem_seg`` if there
    is one. Objects below lose them. Other objects of the source that lie in those pixels by half or
    more come along, cut to them: with a facade come its windows, which would be visible otherwise.
    Objects without pixels are dropped, and boxes enclose the pixels that are left. Masks become bit
    masks, since a polygon cannot have the holes. Overlaps between objects of one image stay.
    ``pasted_from`` becomes the source's file. If no chosen object lies in the image, nothing
    changes.

    Args:
        sample: with ``image`` (C, H, W) and ``instances`` that have ``gt_boxes``, ``gt_classes``
            and ``gt_masks``.
        source: as ``sample``; its size may differ.
        chosen: indices of its objects.
        top_left: the row and column of ``sample`` where the source begins; may be negative, but at
            least one pixel must lie inside.

    Raises:
        ConfigError: if ``instances`` are missing, or objects have no masks.
    """
    image_hw = _image_hw(sample)
    theirs = _moved(bit_masks(source), image_hw, top_left).numpy()
    covered = theirs[chosen].any(axis=0)
    if not covered.any():
        return
    for key in ("image", "sem_seg"):
        if key in sample:
            pixels = _moved(source[key], image_hw, top_left)
            sample[key] = torch.where(torch.from_numpy(covered), pixels, sample[key])
    areas, theirs = _areas(theirs), theirs & covered
    shares = _areas(theirs) / np.maximum(areas, 1)
    come_along = (areas > 0) & (shares >= SHARE_COMING_ALONG)
    ours = bit_masks(sample).numpy() & ~covered
    remain = _areas(ours) > 0
    masks = np.concatenate([ours[remain], theirs[come_along]])
    objects = [(_objects(sample), remain), (_objects(source), come_along)]
    seen = Instances.cat([_without_masks(each, kept, image_hw) for each, kept in objects])
    seen.gt_boxes = Boxes(_tight_boxes(masks))
    seen.gt_masks = BitMasks(torch.from_numpy(masks))
    sample["instances"] = seen
    sample["pasted_from"] = source.get("file_name")


def _image_hw(sample: Sample) -> tuple[int, int]:
    height, width = sample["image"].shape[-2:]
    return height, width


def _objects(sample: Sample) -> Instances:
    objects = sample.get("instances")
    if objects is None or (len(objects) and not objects.has("gt_masks")):
        raise ConfigError(
            f"{KEY} needs objects with masks, but the mapper gives none for "
            f"{sample.get('file_name')}; set it to 0"
        )
    return objects


def bit_masks(sample: Sample) -> Tensor:
    """Returns the (N, H, W) bool masks of a sample's objects."""
    objects, (height, width) = _objects(sample), _image_hw(sample)
    if len(objects) == 0:  # which have no gt_masks
        return torch.zeros(0, height, width, dtype=torch.bool)
    if isinstance(objects.gt_masks, BitMasks):
        return objects.gt_masks.tensor
    # NumPy stacks bools several times as fast as BitMasks.from_polygon_masks.
    polygons = objects.gt_masks.polygons
    return torch.from_numpy(np.stack([polygons_to_bitmask(x, height, width) for x in polygons]))


def _moved(pixels: Tensor, image_hw: tuple[int, int], top_left: tuple[int, int]) -> Tensor:
    """Returns (..., H, W) pixels on an image of another size; 0 beyond."""
    (height, width), (top, left) = image_hw, top_left
    right, bottom = width - left - pixels.shape[-1], height - top - pixels.shape[-2]
    if not (top or left or right or bottom):
        return pixels
    return torch.nn.functional.pad(pixels, (left, right, top, bottom))


def _areas(masks: BoolArray) -> npt.NDArray[np.int64]:
    """Returns the (N,) pixels of each mask; NumPy's counting is 60 times as fast as PyTorch's."""
    return np.array([np.count_nonzero(mask) for mask in masks], np.int64)


def _without_masks(objects: Instances, are_kept: BoolArray, image_hw: tuple[int, int]) -> Instances:
    """Returns the (N,) objects that are kept, on an image of another size."""
    fields: dict[str, Any] = objects[torch.from_numpy(are_kept)].get_fields()
    return Instances(image_hw, **{name: x for name, x in fields.items() if name != "gt_masks"})


def _tight_boxes(masks: BoolArray) -> npt.NDArray[np.int64]:
    """Returns the (N, 4) boxes of (N, H, W) masks, none of which may be empty."""
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    height, width = masks.shape[1:]
    right, bottom = columns[:, ::-1].argmax(axis=1), rows[:, ::-1].argmax(axis=1)
    sides = (columns.argmax(axis=1), rows.argmax(axis=1), width - right, height - bottom)
    return np.stack(sides, axis=1)
