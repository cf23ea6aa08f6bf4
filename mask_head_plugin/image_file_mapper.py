"""A DatasetMapper of detectron2 that uses ``image_files`` and supports large-scale jitter.

Shape alphabet: H, W image height and width in pixels; V vertices of a polygon.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from .image_files import read_image

FloatArray = npt.NDArray[np.float64]


class ImageFileMapper(DatasetMapper):
    """A DatasetMapper that reads images with ``read_image`` and supports INPUT.LSJ.

    Other differences from detectron2:

    - Cropped masks, and masks given as run lengths, become bit masks regardless of the mask format.
    - Bit masks do not extend into padding.
    - Crops do not need the package shapely.
    - A cropped image may have no objects.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        arguments: dict[str, Any] = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.LSJ.ENABLED:
            flips = [x for x in arguments["augmentations"] if isinstance(x, T.RandomFlip)]
            arguments["augmentations"] = [*large_scale_jitter(cfg), *flips]
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Converts a record to the input of detectron2's models.

        Args:
            dataset_dict: a record in detectron2's standard format; not changed.

        Raises:
            ImageFileError: if the image cannot be used.
        """
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        labels = record.pop("sem_seg_file_name", None)
        # The values of a label map are class numbers, so they are read unchanged.
        label_map = None if labels is None else utils.read_image(labels, "L").squeeze(2)
        seen = T.AugInput(image, sem_seg=label_map)
        transforms = self.augmentations(seen)
        image_hw = seen.image.shape[:2]
        record["image"] = torch.as_tensor(np.array(seen.image.transpose(2, 0, 1), order="C"))
        if label_map is not None:
            record["sem_seg"] = torch.as_tensor(seen.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            top = self.proposal_topk
            utils.transform_proposals(record, image_hw, transforms, proposal_topk=top)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, image_hw)
        return record

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: Any
    ) -> None:
        is_used = {"segmentation": self.use_instance_mask, "keypoints": self.use_keypoint}
        objects = [
            {key: value for key, value in x.items() if is_used.get(key, True)}
            for x in dataset_dict.pop("annotations")
            if not x.get("iscrowd", 0)
        ]
        mask_format = "bitmask" if _needs_pixels(objects, transforms) else self.instance_mask_format
        if mask_format == "bitmask":
            transforms = _of_bit_masks(transforms)
        flipped = {"keypoint_hflip_indices": self.keypoint_hflip_indices}
        objects = [
            utils.transform_instance_annotations(x, transforms, image_shape, **flipped)
            for x in objects
        ]
        instances = utils.annotations_to_instances(objects, image_shape, mask_format=mask_format)
        if self.recompute_boxes and objects:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)


def _needs_pixels(objects: list[dict[str, Any]], transforms: T.TransformList) -> bool:
    """Returns whether the masks of an image must be bit masks.

    This is the case for run lengths and for crops. A crop can cut a polygon into pieces, and boxes
    and areas must then be those of the pieces. detectron2 computes the pieces with shapely; bit
    masks are simpler.
    """
    is_cropped = any(isinstance(x, T.CropTransform) for x in transforms.transforms)
    return is_cropped or any(not isinstance(x.get("segmentation", []), list) for x in objects)


def large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Returns detectron2's augmentations for INPUT.LSJ, as in its new_baselines.

    An image is scaled to fit into a square whose sides are INPUT.LSJ.IMAGE_SIZE times a random
    factor between MIN_SCALE and MAX_SCALE. It then gets the size IMAGE_SIZE: a larger image is
    cropped at a random position, and a smaller one is padded at the right and the bottom. The
    padding is 128 in each channel. In label maps, it is the value that the loss ignores.
    """
    lsj, ignored = cfg.INPUT.LSJ, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    side = lsj.IMAGE_SIZE
    return [
        _ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, side, side),
        T.FixedSizeCrop((side, side), pad_value=128.0, seg_pad_value=ignored),
    ]


class _ResizeScale(T.ResizeScale):
    """A ResizeScale that never scales a side to 0 pixels, on which detectron2 would fail."""

    def _get_resize(self, image: npt.NDArray[Any], scale: float) -> T.Transform:
        shorter, longer = sorted(image.shape[:2])
        return super()._get_resize(image, max(scale, longer / shorter / self.target_height))


class _ShiftedPolygons(T.CropTransform):
    """A crop that only shifts polygons. They are cut when they are drawn as bit masks."""

    def apply_polygons(self, polygons: list[FloatArray]) -> list[FloatArray]:
        """Returns (V, 2) polygons, x and y in pixels, relative to the crop."""
        return [self.apply_coords(x) for x in polygons]


def _of_bit_masks(transforms: T.TransformList) -> T.TransformList:
    """Adapts an image's transforms for masks that become bit masks."""
    own: list[T.Transform] = []
    for x in transforms.transforms:
        if type(x) is T.CropTransform:
            x = _ShiftedPolygons(x.x0, x.y0, x.w, x.h, x.orig_w, x.orig_h)
        elif type(x) is T.PadTransform:  # drops its seg_pad_value, which is meant for label maps
            x = T.PadTransform(x.x0, x.y0, x.x1, x.y1, x.orig_w, x.orig_h)
        own.append(x)
    return T.TransformList(own)
