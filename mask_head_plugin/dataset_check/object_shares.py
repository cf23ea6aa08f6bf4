"""Finds cases that detectron2 silently handles in a way that the author may not have intended.

Crowds are used neither in training nor in evaluation. Polygons inside other polygons are filled.
The field ``area`` decides whether an object counts as small, medium or large, regardless of its
mask. Each case can be intended for some objects, so each finding states the share of objects that
it affects.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .findings import Findings, quote
from .masks import Mask
from .records import Sizes, is_finite, listed_id

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# In COCO 2017, 1.2% of the annotations are crowds, and hardly any image has only crowds.
MANY_CROWDS, MANY_LOST_IMAGES = 0.10, 0.05
FEW_CROWDS = 10
"""Fewer crowds than this are not reported if their images also contain other objects."""

MANY_WITHOUT_OBJECTS = 0.10
"""Images without objects are reported if their share is at least this; COCO 2017 has 0.9%."""

SOME = 0.001
"""Wrong areas are reported if their share is at least this; a smaller share may be chance."""
MUCH_OFF = 2.5
"""An area that is larger or smaller than the mask by this factor is certainly unintended."""
MEDIUM, LARGE = 32.0**2, 96.0**2
"""Smallest areas in pixels of medium and large objects in COCO's metric."""


class Shares:
    """Collects facts about the annotations of a file, and checks them as a whole.

    Args:
        sizes: sizes of the images.

    Attributes:
        wrong_areas: for each kind of finding about the field ``area``, the areas of the masks in
            pixels by index of the annotation.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self.wrong_areas: dict[str, dict[int, float]] = {}
        self._total = self._crowds = 0
        self._with_objects: set[Hashable] = set()
        self._with_crowds: set[Hashable] = set()
        # Stored as rows of numbers, because COCO's 860,000 annotations would take 300 MB as Python
        # objects.
        self._areas = array("d")
        self._masks = array("q")

    def note(self, annotation: Mapping[str, Any], index: int, mask: Mask | None) -> None:
        """Adds an annotation.

        Args:
            annotation: the record.
            index: index of the record in its section.
            mask: the mask, if it is valid.
        """
        self._total += 1
        image_id = listed_id(annotation.get("image_id"), self._sizes)
        crowd = annotation.get("iscrowd") == 1
        self._crowds += crowd
        if image_id is not None:
            (self._with_crowds if crowd else self._with_objects).add(image_id)
        if mask is None or mask.flat:
            return
        box = mask.box
        area: Any = annotation.get("area")
        width, height = box[2] - box[0], box[3] - box[1]
        if not crowd and mask.inside and is_finite(area) and area >= 0:
            self._areas.extend((index, area, mask.area, mask.hollow_area, width, height))
        image_hw = self._sizes.get(image_id)
        whole = image_hw is not None and height >= image_hw[0] and width >= image_hw[1]
        if image_id is not None and not whole:
            self._masks.extend((index, hash(image_id), _digest(annotation["segmentation"])))

    def check(self, annotations: list[Any], found: Findings) -> None:
        """Adds findings about the annotations as a whole.

        Args:
            annotations: the section; messages quote examples from it.
            found: list to which findings are added. If a mask extends beyond its image and the same
                mask is also on another image, its finding is changed to another kind.
        """
        self._check_crowds(found)
        self._check_images(found)
        self._check_areas(annotations, found)
        self._check_repeated_masks(annotations, found)

    def _check_crowds(self, found: Findings) -> None:
        lost = len(self._with_crowds - self._with_objects)
        images = len(self._with_crowds | self._with_objects)
        if not self._crowds or (self._crowds < FEW_CROWDS and not lost):
            return
        if self._crowds >= MANY_CROWDS * self._total or lost >= MANY_LOST_IMAGES * images:
            found.add(
                "crowd-by-export",
                f"{_share(self._crowds, self._total)} annotations have iscrowd 1, so training and "
                f"evaluation ignore them; {_share(lost, images)} annotated images have no other "
                f"annotations, so training ignores these images",
            )
        if self._crowds == self._total:
            message = (
                f"all {self._total} annotations have iscrowd 1, so nothing is left to train on"
            )
            found.add("only-crowds", message)

    def _check_images(self, found: Findings) -> None:
        images = len(self._sizes)
        empty = images - len(self._with_crowds | self._with_objects)
        if self._total and empty >= max(1, MANY_WITHOUT_OBJECTS * images):
            message = (
                f"{_share(empty, images)} images have no annotations, so training ignores them"
            )
            found.add("image-without-objects", message)

    def _check_areas(self, annotations: list[Any], found: Findings) -> None:
        """Compares the field ``area`` with the masks."""
        index, area, filled, hollow, width, height = np.reshape(self._areas, (-1, 6)).T
        if not len(index):
            return
        with np.errstate(all="ignore"):  # huge coordinates may overflow
            fits = area_fits(area, filled, width + height)
            fits_hollow = area_fits(area, hollow, width + height)
            ring = fits_hollow & (np.abs(area - hollow) < 0.5 * np.abs(area - filled))
            box = width * height
            of_box = ~ring & ~fits & (np.abs(area - box) <= 0.01 * box + 1) & (filled < 0.9 * box)
            other = ~ring & ~fits & ~of_box
            ratio = area / filled
        if other.mean() <= 0.5:  # otherwise the difference is systematic, even if it is small
            other &= (ratio < 1 / MUCH_OFF) | (ratio > MUCH_OFF)
        moved = _size_class(area) != _size_class(filled)
        for kind, which, what in (
            (
                "ring-as-hole",
                ring,
                "a polygon inside another, and an area that treats it as a hole",
            ),
            ("area-of-box", of_box, "the area of their box instead of the area of their mask"),
            (
                "area-suspicious",
                other,
                f"an area that differs from their mask's ({_factor(ratio[other])})",
            ),
        ):
            if not which.any() or (which.mean() < SOME and which is not ring):
                continue
            if which is not ring:
                rows = zip(index[which].astype(int).tolist(), filled[which].tolist(), strict=True)
                self.wrong_areas[kind] = dict(rows)
            k = np.flatnonzero(which)[0]
            example = quote(annotations[int(index[k])].get("id"))
            count = int((moved & which).sum())
            found.add(
                kind,
                f"{_share(int(which.sum()), len(which))} objects have {what}, so {count} "
                f"{'is' if count == 1 else 'are'} counted in the wrong size class (APs, APm, APl); "
                f"annotation {example} has area {area[k]:.6g}, but its mask has {filled[k]:.6g} "
                "pixels",
            )

    def _check_repeated_masks(self, annotations: list[Any], found: Findings) -> None:
        """Finds masks that are identical, point for point, on several images."""
        rows = np.reshape(self._masks, (-1, 3))
        rows = rows[np.lexsort(rows.T[1:])]  # by mask, then image
        first_of_image = np.r_[True, (rows[1:, 1:] != rows[:-1, 1:]).any(1)][: len(rows)]
        digests = rows[first_of_image, 2]
        repeated = rows[np.isin(rows[:, 2], digests[1:][digests[1:] == digests[:-1]])].tolist()
        if not repeated:
            return
        images_of: dict[int, list[Any]] = defaultdict(list)
        for index, _, digest in repeated:
            images_of[digest].append(annotations[index].get("image_id"))
        others = {
            index: next(i for i in images_of[digest] if i != annotations[index].get("image_id"))
            for index, _, digest in repeated
        }
        foreign = {x.index for x in found if x.kind == "polygon-outside" and x.index in others}
        # If a mask belongs to another image, so does its box.
        found[:] = [x for x in found if not (x.kind == "box-outside" and x.index in foreign)]
        for k, finding in enumerate(found):
            if finding.kind == "polygon-outside" and finding.index in foreign:
                message = f"{finding.message}; the same mask is on image {others[finding.index]}"
                found[k] = replace(finding, kind="mask-of-another-image", message=message)
        index, other = next(iter(others.items()))
        example = annotations[index]
        found.add(
            "mask-on-several-images",
            f"{_share(len(others), len(rows))} masks are identical, point for point, on several "
            f"images: the mask of annotation {quote(example.get('id'))} of image "
            f"{quote(example.get('image_id'))} is also on image {quote(other)}",
        )


def area_fits(area: Any, pixels: Any, sides: Any) -> Any:
    """Returns whether an area is that of a mask.

    Args:
        area: the field ``area``, a number or an array.
        pixels: the mask's area.
        sides: width plus height of the mask's box, in pixels. The area of a polygon and its number
            of pixels differ in proportion to its perimeter.
    """
    return np.abs(area - pixels) <= 0.1 * pixels + sides


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.1%})"


def _size_class(area: Floats) -> npt.NDArray[np.int64]:
    return np.digitize(area, (MEDIUM, LARGE))


def _factor(ratio: Floats) -> str:
    """Describes the median ratio of the field ``area`` to the area of the mask."""
    return f"median ratio {np.median(ratio):.3g}" if len(ratio) else ""


def _digest(segmentation: Any) -> int:
    """Returns a hash that is equal for equal masks and almost never for different ones."""
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        return hash((tuple(counts) if isinstance(counts, list) else counts, *segmentation["size"]))
    as_arrays = (x if isinstance(x, array) else array("d", x) for x in segmentation)
    return hash(tuple([x.tobytes() for x in as_arrays]))
