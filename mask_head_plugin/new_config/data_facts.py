"""Reads facts about the objects in a COCO file: sizes, counts, classes and mask formats.

Shape alphabet: N images, R objects (no crowds), K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import ConfigError
from ..dataset_check.check import read_content
from ..dataset_check.findings import Findings

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataFacts:
    """Facts about a data set from which a config is derived.

    Attributes:
        image_hw: (N, 2) heights and widths of the images.
        object_hw: (R, 2) heights and widths of the boxes, in pixels.
        image_of: (R,) index of each object's image.
        class_of: (R,) index of each object's class.
        class_names: names in the order of the class numbers, which is that of the category ids.
        has_polygons: whether any mask is given as polygons.
        has_run_lengths: whether any mask is given as run lengths.
    """

    image_hw: IntArray
    object_hw: FloatArray
    image_of: IntArray
    class_of: IntArray
    class_names: list[str]
    has_polygons: bool
    has_run_lengths: bool

    @cached_property
    def short_sides(self) -> IntArray:
        """(N,) the shorter side of each image."""
        return self.image_hw.min(axis=1)

    @cached_property
    def elongations(self) -> FloatArray:
        """(N,) the ratio of the longer to the shorter side of each image."""
        elongations: FloatArray = self.image_hw.max(axis=1) / self.short_sides
        return elongations

    @cached_property
    def object_sides(self) -> FloatArray:
        """(R,) the side of a square with the same area as the box."""
        sides: FloatArray = np.sqrt(self.object_hw.prod(axis=1))
        return sides

    @cached_property
    def objects_per_image(self) -> IntArray:
        """(N,) the number of objects in each image."""
        return np.bincount(self.image_of, minlength=len(self.image_hw))

    @cached_property
    def objects_per_class(self) -> IntArray:
        """(K,) the number of objects in each class."""
        return np.bincount(self.class_of, minlength=len(self.class_names))

    @cached_property
    def image_shares(self) -> FloatArray:
        """(K,) the share of images that contain each class, among images with objects.

        detectron2's repeat-factor sampler computes shares in the same way.
        """
        pairs = np.unique(np.stack([self.image_of, self.class_of]), axis=1)
        shares: FloatArray = np.bincount(pairs[1], minlength=len(self.class_names)) / len(
            np.unique(self.image_of)
        )
        return shares


def read_facts(json_file: str) -> DataFacts:
    """Returns the facts about a file.

    Args:
        json_file: a file that has passed the data set check without errors.

    Raises:
        ConfigError: if the file cannot be read, or no object has a box with an area.
    """
    found = Findings(json_file)
    content = read_content(json_file, found)
    if found:
        raise ConfigError(str(found[0]))
    return facts_of(content, json_file)


def facts_of(content: dict[str, Any], json_file: str) -> DataFacts:
    """Returns the facts about a file's content."""
    images = {image["id"]: k for k, image in enumerate(content["images"])}
    categories = sorted(content["categories"], key=lambda category: category["id"])
    classes = {category["id"]: k for k, category in enumerate(categories)}
    # detectron2 does not train on boxes without area.
    objects = [x for x in content["annotations"] if not x.get("iscrowd") and min(x["bbox"][2:]) > 0]
    if not objects:
        raise ConfigError(
            f"{json_file}: no object has a box with an area, so no config can be derived"
        )
    return DataFacts(
        image_hw=np.array([(image["height"], image["width"]) for image in content["images"]]),
        object_hw=np.array([x["bbox"][3:1:-1] for x in objects], float),
        image_of=np.array([images[x["image_id"]] for x in objects]),
        class_of=np.array([classes[x["category_id"]] for x in objects]),
        class_names=[category["name"] for category in categories],
        has_polygons=any(isinstance(x["segmentation"], list) for x in objects),
        has_run_lengths=any(isinstance(x["segmentation"], dict) for x in objects),
    )
