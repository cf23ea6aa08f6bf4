"""Copy-paste augmentation: pastes objects of one training image, with their masks, onto another.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation",
CVPR 2021. Objects are pasted without blending, which has no benefit in the paper's ablation.

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
"""An object that was not chosen is pasted as well if at least this share of it lies inside chosen
objects."""


def check_copy_paste(cfg: CfgNode) -> None:
    """Refuses INPUT.COPY_PASTE if training needs data that cannot be cut out and pasted.

    Raises:
        ConfigError: if another key conflicts with copy-paste; the message names that key.
    """
    if not cfg.INPUT.COPY_PASTE.PROBABILITY:
        return
    told = f"{KEY} {cfg.INPUT.COPY_PASTE.PROBABILITY}"
    if not cfg.MODEL.MASK_ON:
        raise ConfigError(
            f"{told} needs masks to cut objects out; set MODEL.MASK_ON True, or the probability "
            f"to 0"
        )
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise ConfigError(f"{told} does not work with MODEL.{key}; turn one of them off")


class CopyPasteMapper:
    """Maps a record and, with some probability, pastes objects of another record onto it.

    The other record is drawn uniformly from the data set, regardless of the sampler, and is
    augmented in the same way. A random number of its objects, from one to all, is chosen. Apart
    from the pasted pixels, samples are the same as without copy-paste.
    """

    def __init__(
        self,
        mapper: Callable[[Any], Sample | None],
        records: Sequence[Any],
        probability: float,
    ) -> None:
        """
        Args:
            mapper: converts a record to the model's input, or returns None to decline it.
            records: the records of the data set.
            probability: probability that objects are pasted onto a sample.
        """
        self._mapper, self._records, self._probability = mapper, records, probability

    def __call__(self, record: Any) -> Sample | None:
        """Maps a record, with random numbers from NumPy's global generator.

        Returns:
            The sample, or None if the mapper declines the record. If the mapper declines the other
            record, or that record has no objects, nothing is pasted.

        Raises:
            ConfigError: if the mapper returns objects without masks.
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

    The pixels of the chosen objects are copied from the source, in the image and in ``sem_seg`` if
    there is one. Objects underneath lose these pixels. Other objects of the source, if at least
    half of their pixels were copied, are pasted as well, cropped to the copied pixels. For example,
    a facade brings its windows, which would otherwise be visible but not annotated.

    Objects without remaining pixels are dropped, and boxes enclose the remaining pixels. Masks
    become bit masks, because polygons cannot represent the resulting holes. Overlaps between
    objects of the same image are kept. ``pasted_from`` is set to the source's file. If no chosen
    object lies within the image, nothing changes.

    Args:
        sample: contains ``image`` (C, H, W), and ``instances`` with ``gt_boxes``, ``gt_classes``
            and ``gt_masks``.
        source: like ``sample``; its size may differ.
        chosen: indices of the source's objects to paste.
        top_left: row and column of ``sample`` at which the source begins. They may be negative, but
            at least one pixel must overlap.

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
            f"{KEY} needs objects with masks, but the mapper returns none for "
            f"{sample.get('file_name')}; set this key to 0"
        )
    return objects


def bit_masks(sample: Sample) -> Tensor:
    """Returns the (N, H, W) bool masks of a sample's objects."""
    objects, (height, width) = _objects(sample), _image_hw(sample)
    if len(objects) == 0:  # then there is no gt_masks field
        return torch.zeros(0, height, width, dtype=torch.bool)
    if isinstance(objects.gt_masks, BitMasks):
        return objects.gt_masks.tensor
    # NumPy stacks bools several times as fast as BitMasks.from_polygon_masks.
    polygons = objects.gt_masks.polygons
    return torch.from_numpy(np.stack([polygons_to_bitmask(x, height, width) for x in polygons]))


def _moved(pixels: Tensor, image_hw: tuple[int, int], top_left: tuple[int, int]) -> Tensor:
    """Places (..., H, W) pixels on an image of another size, padded with 0."""
    (height, width), (top, left) = image_hw, top_left
    right, bottom = width - left - pixels.shape[-1], height - top - pixels.shape[-2]
    if not (top or left or right or bottom):
        return pixels
    return torch.nn.functional.pad(pixels, (left, right, top, bottom))


def _areas(masks: BoolArray) -> npt.NDArray[np.int64]:
    """Returns the (N,) areas of masks in pixels; NumPy counts 60 times as fast as PyTorch."""
    return np.array([np.count_nonzero(mask) for mask in masks], np.int64)


def _without_masks(objects: Instances, are_kept: BoolArray, image_hw: tuple[int, int]) -> Instances:
    """Returns the objects to keep, without masks and with the size of another image.

    ``are_kept`` is (N,).
    """
    fields: dict[str, Any] = objects[torch.from_numpy(are_kept)].get_fields()
    return Instances(image_hw, **{name: x for name, x in fields.items() if name != "gt_masks"})


def _tight_boxes(masks: BoolArray) -> npt.NDArray[np.int64]:
    """Returns the (N, 4) boxes of (N, H, W) masks, none of which may be empty."""
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    height, width = masks.shape[1:]
    right, bottom = columns[:, ::-1].argmax(axis=1), rows[:, ::-1].argmax(axis=1)
    sides = (columns.argmax(axis=1), rows.argmax(axis=1), width - right, height - bottom)
    return np.stack(sides, axis=1)
