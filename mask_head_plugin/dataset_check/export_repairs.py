"""Decides which repairs apply to all records of an export, and when --fix must refuse.

Shape alphabet: H, W sides of an image.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import pycocotools.mask as mask_util

from ..config import ConfigError
from .document import Document, Record
from .findings import Finding
from .masks import LEAST_IOU, ONE_PIXEL, TWO_PIXELS, Box, box_iou
from .object_shares import area_fits
from .records import is_finite
from .whole_export import FEW, polygons_of, within_one

WHOLESALE_SHARE = 1 / 3
NEARLY_ALL = 0.95
BOX_KINDS = {"box-mismatch", "box-outside", "box-negative", "box-without-area"}
AREA_KINDS = {"area-of-box", "area-suspicious"}
BOTH_ARE_WRONG = {"mask-of-another-image"}
"""Kinds of faults that involve two records, either of which may be wrong. FEW or more such faults
indicate a faulty export."""


def is_wholesale(count: int, total: int) -> bool:
    """Returns whether this many faulty records suggest a faulty export rather than chance."""
    return count > total / 2 or (count >= FEW and count > WHOLESALE_SHARE * total)


def refuse_losses(document: Document, accepted: Collection[str]) -> None:
    """Refuses a copy that loses so much that it would hide a fault of the whole export.

    Args:
        document: the document after repairs.
        accepted: kinds of findings whose losses the user accepts.

    Raises:
        ConfigError: if too many records are lost. The message gives the kinds, the number of
            records lost, and the first finding.
    """
    for section in ("images", "annotations"):
        lost = [x for x in document.losses[section].values() if x.kind not in accepted]
        others = [x for x in lost if x.kind in BOTH_ARE_WRONG]
        if is_wholesale(len(lost), document.counts[section]) or len(others) >= FEW:
            kinds = " ".join(sorted({x.kind for x in lost}))
            way_out = f"Correct the export, or add --accept {kinds} if you want this copy anyway."
            raise refusal(document, lost, way_out)


def refusal(document: Document, lost: Collection[Finding], way_out: str) -> ConfigError:
    """Returns the error that states what would be lost."""
    first = next(iter(lost))
    kinds = Counter(finding.kind for finding in lost)
    of_each = ", ".join(f"{count} for {kind}" for kind, count in kinds.most_common())
    total = document.counts[first.section]
    return ConfigError(
        f"--fix: {len(lost)} of {total} {first.section} would be left out or cut ({of_each}), "
        f"which would hide a fault of the whole export. {way_out} The first finding: {first}"
    )


class _Boxes(NamedTuple):
    """An annotation, its box as written, its image's size, and the box and area of its mask."""

    annotation: Record
    numbers: Box
    image_hw: tuple[int, int]
    around_mask: Box | None
    mask_pixels: int

    @property
    def xyxy(self) -> Box:
        x, y, width, height = self.numbers
        return x, y, x + width, y + height


def repair_boxes(document: Document, errors: Iterable[Finding], accepted: Collection[str]) -> bool:
    """Repairs the boxes of all annotations if so many are wrong that the export must be faulty.

    Boxes written as corners are converted to COCO's form, but not tightened. Other boxes are
    replaced by the boxes around the masks.

    Args:
        document: a document whose images have sizes.
        errors: errors from the check.
        accepted: kinds of findings for which the user has confirmed that the masks are right.

    Returns:
        Whether anything was changed.

    Raises:
        ConfigError: if the masks might be wrong instead of the boxes.
    """
    wrong = [x for x in errors if x.kind in BOX_KINDS]
    annotations = document.content["annotations"]
    if not is_wholesale(len({x.index for x in wrong}), len(annotations)):
        return False
    by_index = {x.index: x for x in wrong}
    boxes = [x for annotation in annotations if (x := _boxes(document, annotation))]
    if _nearly_all(_is_corners(x) for x in boxes):
        right, what = _from_corners, "the box is now {}; it was written as [x0, y0, x1, y1]"
    else:
        if not {x.kind for x in wrong} <= set(accepted):
            _refuse_if_masks_may_be_wrong(document, boxes, wrong)
        right, what = _from_mask, "the box is now {}, around the mask"
    findings = {
        id(annotation): by_index.get(k, _as_most(wrong[0], k))
        for k, annotation in enumerate(annotations)
    }
    changed = False
    for x in boxes:
        box = right(x)
        if box is not None and max(abs(a - b) for a, b in zip(box, x.numbers, strict=True)) > 0:
            document.finding = findings[id(x.annotation)]
            x.annotation["bbox"] = box
            document.note_change(x.annotation, what.format(box))
            changed = True
    return changed


def repair_normalised_boxes(document: Document, finding: Finding) -> bool:
    """Replaces boxes given as shares of the image with the boxes around the masks, in pixels.

    Returns:
        Whether any box was replaced; False if the masks are also given as shares of the image.
    """
    annotations = document.content["annotations"]
    if within_one(polygons_of(annotations)):
        return False
    changed = False
    for k, annotation in enumerate(annotations):
        document.finding = dataclasses.replace(finding, section="annotations", index=k)
        boxes = _boxes(document, annotation)
        box = _from_mask(boxes) if boxes else None
        if box is None:
            document.drop(annotation, f"{finding.message}, and it has no valid mask")
        else:
            annotation["bbox"] = box
            document.note_change(annotation, f"the box is now {box}, around the mask")
        changed = True
    document.remove_dropped()
    return changed


def repair_areas(document: Document, finding: Finding, wrong: Mapping[int, float]) -> None:
    """Writes the mask's number of pixels into the areas that the check reports.

    Where polygons overlap or are finer than a pixel, the number of pixels may still differ so much
    from the area of the polygons that the check would report it again. The area of the polygons is
    then written instead.

    Args:
        document: a document without errors.
        finding: the finding about areas.
        wrong: the areas of the masks that the check computed, by index of the annotation.
    """
    document.index()
    for k, polygon_area in wrong.items():
        annotation = document.content["annotations"][k]
        found = document.mask(annotation)
        if found is None:  # the check compares only valid masks
            continue
        (x0, y0, x1, y1), runs = found
        area: float = int(mask_util.area(runs))
        if not area_fits(area, polygon_area, x1 - x0 + y1 - y0):
            area = round(polygon_area, 2)
        document.finding = dataclasses.replace(
            finding, section="annotations", index=k, message=f"it was {annotation['area']:.6g}"
        )
        annotation["area"] = area
        document.note_change(annotation, f"area is now {area}, the mask's")


def _as_most(finding: Finding, index: int) -> Finding:
    return dataclasses.replace(
        finding, index=index, message="most boxes in the file have this fault"
    )


def _boxes(document: Document, annotation: Record) -> _Boxes | None:
    box, image_hw = annotation.get("bbox"), document.image_hw(annotation)
    if type(box) is not list or len(box) != 4 or not all(map(is_finite, box)) or image_hw is None:
        return None
    mask = document.mask(annotation)
    a, b, c, d = box
    around, pixels = (mask[0], int(mask_util.area(mask[1]))) if mask else (None, 0)
    return _Boxes(annotation, (a, b, c, d), image_hw, around, pixels)


def _is_inside(box: Box, image_hw: tuple[int, int]) -> bool:
    height, width = image_hw
    return max(-box[0], -box[1], box[2] - width, box[3] - height) <= ONE_PIXEL


def _nearly_all(votes: Iterable[bool]) -> bool:
    given = list(votes)
    return bool(given) and sum(given) >= NEARLY_ALL * len(given)


def _is_corners(boxes: _Boxes) -> bool:
    """Returns whether the numbers, read as [x0, y0, x1, y1], fit the mask.

    If there is no mask, they only have to lie inside the image.
    """
    x0, y0, x1, y1 = corners = boxes.numbers
    if x0 >= x1 or y0 >= y1 or not _is_inside(corners, boxes.image_hw):
        return False
    mask = boxes.around_mask
    if mask is None:
        return True
    around = max(x0 - mask[0], y0 - mask[1], mask[2] - x1, mask[3] - y1) <= ONE_PIXEL
    iou = box_iou(corners, mask)
    return (around or iou >= LEAST_IOU) and iou >= box_iou(boxes.xyxy, mask)


def _from_corners(boxes: _Boxes) -> list[float] | None:
    return _xywh(boxes.numbers) if _is_corners(boxes) else None


def _from_mask(boxes: _Boxes) -> list[float] | None:
    return None if boxes.around_mask is None else _xywh(boxes.around_mask)


def _xywh(box: Box) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _refuse_if_masks_may_be_wrong(
    document: Document, boxes: list[_Boxes], wrong: list[Finding]
) -> None:
    """Raises ConfigError if the masks may be wrong instead of the boxes."""
    pairs = [x for x in boxes if x.around_mask is not None]
    unsound = len(document.losses["annotations"])
    doubt = ""
    if unsound > (1 - NEARLY_ALL) * len(boxes):
        doubt = f"{unsound} masks have other faults"
    elif _nearly_all(_is_inside(x.xyxy, x.image_hw) for x in pairs):
        if _nearly_all(map(_is_exchanged, pairs)):
            doubt = "they would fit with x and y swapped"
        elif _nearly_all(_is_scaled(x) and not _has_area_of_mask(x) for x in pairs):
            doubt = "they would fit at another scale"
    if doubt:
        kinds = " ".join(sorted({x.kind for x in wrong}))
        raise ConfigError(
            f"--fix: most boxes do not fit their masks, but {doubt}, so the masks may be wrong "
            "instead. Look at some images and correct the export, or add --accept "
            f"{kinds} if the masks are right. The first finding: {wrong[0]}"
        )


def _is_exchanged(boxes: _Boxes) -> bool:
    x0, y0, x1, y1 = boxes.around_mask or boxes.xyxy
    return _distance(boxes.xyxy, (y0, x0, y1, x1)) <= TWO_PIXELS


def _is_scaled(boxes: _Boxes) -> bool:
    x0, y0, x1, y1 = boxes.around_mask or boxes.xyxy
    right, bottom = boxes.xyxy[2:]
    if x1 <= 0 or y1 <= 0:
        return False
    return _distance(boxes.xyxy, (x0 * right / x1, y0 * bottom / y1, right, bottom)) <= TWO_PIXELS


def _has_area_of_mask(boxes: _Boxes) -> bool:
    """Returns whether area and mask agree; if they do, the box is probably wrong."""
    area: Any = boxes.annotation.get("area")
    return is_finite(area) and abs(area - boxes.mask_pixels) <= 0.1 * boxes.mask_pixels + 10


def _distance(a: Box, b: Box) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
