"""detectron2's DatasetMapper with the images of ``image_files``."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from .image_files import read_image


class ImageFileMapper(DatasetMapper):
    """detectron2's DatasetMapper with the images of ``read_image``."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns what detectron2's models take.

        Args:
            dataset_dict: a record in detectron2's standard format, which stays as it is.

        Raises:
            ImageFileError: if the image cannot be used.
        """
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        labels = record.pop("sem_seg_file_name", None)
        # Values of a label map are classes, which nothing may scale.
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
