"""Repairs for a corrected copy, one for each kind of finding with a single right answer.

A repair is a function that changes a record and returns a description of the change. If it returns
None, the record is dropped.

Shape alphabet: H, W sides of an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from .document import Document, Record
from .records import file_name

Polygon = list[float]


Repair = Callable[[Document, Record], str | None]


def _move(records: list[Record], key: str, value: Any) -> None:
    for record in records:
        record[key] = value


def _renumber(section: str, groups: str, key: str, repeated: Repair) -> Repair:
    """Returns a repair that gives a record a new id and updates the records that refer to it.

    Args:
        section: section of the record.
        groups: attribute of Document that lists the referring records by id.
        key: field of the referring records that contains the id.
        repeated: repair to use if several records have the same id.
    """

    def repair(document: Document, record: Record) -> str | None:
        old = record["id"]
        if not isinstance(old, Hashable):
            return None
        if len(getattr(document, section)[old]) > 1:
            return repeated(document, record)
        record["id"] = document.new_id(section, old)
        _move(getattr(document, groups).get(old, []), key, record["id"])
        return f"its id is now {record['id']}"

    return repair


def _merge_category(document: Document, record: Record) -> str | None:
    """Merges two categories of the same name."""
    first = next(
        group[0] for group in document.categories.values() if group[0].get("name") == record["name"]
    )
    _move(document.members.get(record["id"], []), "category_id", first["id"])
    document.drop(record, f"its annotations now have category {first['id']!r}", merged=True)
    return None


def _repeated_category(document: Document, record: Record) -> str | None:
    first = document.categories[record["id"]][0]
    if first.get("name") == record["name"]:
        document.drop(record, "it is listed twice with the same name", merged=True)
    return None


def _size_from_file(document: Document, image: Record) -> str | None:
    facts = document.facts(image)
    if facts is None or facts.orientation != 1:  # the size is unknown, or its sides may be swapped
        return None
    image["height"], image["width"] = facts.image_hw
    return "height and width are now {} and {}, as in the file".format(*facts.image_hw)


def _repeated_image(document: Document, image: Record) -> str | None:
    same = document.images[image["id"]]
    if all(file_name(x, False) == file_name(image, False) for x in same):
        document.drop(image, "it is listed twice with the same file", merged=True)
        return None
    for other in same:
        if not document.is_dropped(other):
            document.drop(
                other, "several images have its id, so it is unclear which annotations belong to it"
            )
    return None


def _merge_image(document: Document, image: Record) -> str | None:
    """Merges image records of the same file, so that one record has all annotations of the file."""
    same = document.files.get(file_name(image, False) or "", [])
    first = next(x for x in same if not document.is_dropped(x))
    if first is image:
        return "it is now the only record of its file"
    if any(first.get(side) != image.get(side) for side in ("height", "width")):
        return None
    kept = document.annotations.setdefault(first.get("id"), [])
    moved = document.annotations.pop(image.get("id"), [])
    for annotation in moved:
        shape = [annotation.get(key) for key in ("category_id", "bbox", "segmentation")]
        if any([x.get(k) for k in ("category_id", "bbox", "segmentation")] == shape for x in kept):
            document.drop(
                annotation, "the other record of the file also has this annotation", merged=True
            )
        else:
            annotation["image_id"] = first.get("id")
            kept.append(annotation)
    reason = f"its annotations now belong to image {first.get('id')!r}, which has the same file"
    document.drop(image, reason, merged=True)
    return None


def _file_elsewhere(document: Document, image: Record) -> str | None:
    image["file_name"] = document.finding.right_value
    return f"file_name is now {image['file_name']!r}"


def _references(document: Document, annotation: Record) -> str | None:
    """Converts ids such as "7" and 7.0 to integers if the file lists these integers."""
    done = []
    for key, known in (("image_id", document.images), ("category_id", document.categories)):
        value = annotation.get(key)
        if isinstance(value, float | str):
            try:
                number = int(value)
            except (ValueError, OverflowError):
                continue
            if str(number) == str(value).removesuffix(".0") and number in known:
                annotation[key] = number
                done.append(f"{key} is now {number}")
    return ", ".join(done) or None


def _new_id(document: Document, annotation: Record) -> str | None:
    annotation["id"] = document.new_id("annotations", annotation.get("id"))
    return f"its id is now {annotation['id']}"


def _annotation_id(document: Document, annotation: Record) -> str | None:
    done = _references(document, annotation)
    own = annotation["id"]
    if type(own) is int and abs(own) < 1 << 53:
        return done
    return ", ".join(filter(None, [done, _new_id(document, annotation)]))


def _fill(document: Document, annotation: Record) -> str | None:
    """Adds fields that can be derived from the rest of the annotation."""
    done = []
    if annotation.get("id") is None:
        done.append(_new_id(document, annotation))
    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
        done.append("iscrowd is now 0")
    for key, repair in (("bbox", _box_from_mask), ("area", _area_from_mask)):
        if annotation.get(key) is None:
            done.append(repair(document, annotation))
    return ", ".join(filter(None, done)) or None


def _iscrowd(document: Document, annotation: Record) -> str | None:
    del document
    given = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "True": 1, "False": 0}
    value = given.get(str(annotation["iscrowd"]))
    if value is None:
        return None
    annotation["iscrowd"] = value
    return f"iscrowd is now {value}"


def _drop_keypoints(document: Document, annotation: Record) -> str | None:
    """Drops keypoints, which mask training does not need."""
    del document
    del annotation["keypoints"]
    annotation.pop("num_keypoints", None)
    return "its keypoints are left out"


def _box_from_mask(document: Document, annotation: Record) -> str | None:
    found = document.mask(annotation)
    if found is None:
        return None
    x0, y0, x1, y1 = found[0]
    annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    return f"the box is now {annotation['bbox']}, around the mask"


def _area_from_mask(document: Document, annotation: Record) -> str | None:
    found = document.mask(annotation)
    if found is None:
        return None
    annotation["area"] = int(mask_util.area(found[1]))
    return f"area is now {annotation['area']}"


def _crowd_runs(document: Document, annotation: Record) -> str | None:
    """Writes a crowd's polygons as run lengths of the same pixels; keeps ``iscrowd``."""
    found = document.mask(annotation)
    if found is None:
        return None
    counts, size = found[1]["counts"].decode(), list(found[1]["size"])
    annotation["segmentation"] = {"size": size, "counts": counts}
    return "the mask is now run lengths of the same pixels"


def _nest(document: Document, annotation: Record) -> str | None:
    del document
    annotation["segmentation"] = [annotation["segmentation"]]
    return "the mask is now a list of one polygon"


def _flatten(document: Document, annotation: Record) -> str | None:
    del document
    polygons = annotation["segmentation"]
    for k, polygon in enumerate(polygons):
        pairs = isinstance(polygon, list) and all(isinstance(x, list) for x in polygon)
        if pairs and all(len(point) == 2 for point in polygon):
            polygons[k] = list(itertools.chain(*polygon))
    return "the points of its polygons are now in flat lists"


def _drop_parts(document: Document, annotation: Record) -> str | None:
    """Drops polygons with fewer than three points or an odd number of values, as in detectron2."""
    del document
    given = annotation["segmentation"]
    kept = [x for x in given if not isinstance(x, list) or (len(x) >= 6 and len(x) % 2 == 0)]
    if not kept:
        return None
    annotation["segmentation"] = kept
    return f"{len(given) - len(kept)} of {len(given)} polygons are left out"


def _cut_polygons(document: Document, annotation: Record) -> str | None:
    image_hw = document.image_hw(annotation)
    if image_hw is None:
        return None
    cut = [clip_polygon(polygon, image_hw) for polygon in annotation["segmentation"]]
    kept = [polygon for polygon in cut if len(polygon) >= 6]
    if not kept:
        return None
    annotation["segmentation"] = kept
    area = _area_from_mask(document, annotation)
    return f"its polygons are cut at the image's edge, and {area}"


def clip_polygon(polygon: Polygon, image_hw: tuple[int, int]) -> Polygon:
    """Returns the part of a polygon inside the image (Sutherland-Hodgman algorithm).

    Args:
        polygon: x, y, x, y, ... in pixels.
        image_hw: H, W.

    Returns:
        A polygon in the same form; empty if nothing is inside.
    """
    height, width = image_hw
    points = np.asarray(polygon, float).reshape(-1, 2)
    for axis, sign, bound in ((0, 1, 0.0), (0, -1, -width), (1, 1, 0.0), (1, -1, -height)):
        kept = []
        for start, end in zip(np.roll(points, 1, axis=0), points, strict=True):
            a, b = sign * start[axis] - bound, sign * end[axis] - bound  # negative if outside
            if min(a, b) < 0 < max(a, b):
                inner, outer = (start, end) if a > 0 else (end, start)
                # Coordinates are halved, because differences of huge ones would overflow.
                share = max(a, b) / 2 / (max(a, b) / 2 - min(a, b) / 2)
                kept.append(inner + (outer * share - inner * share))
            if b >= 0:
                kept.append(end)
        points = np.array(kept).reshape(-1, 2)
    points = points.clip(0, [width, height])  # points that rounding left outside
    flat: Polygon = points.ravel().tolist()
    return flat


_CATEGORY_NUMBER = _renumber("categories", "members", "category_id", _repeated_category)
_IMAGE_NUMBER = _renumber("images", "annotations", "image_id", _repeated_image)

REPAIRS: dict[tuple[str, str], Repair] = {
    ("categories", "id-not-integer"): _CATEGORY_NUMBER,
    ("categories", "id-too-large"): _CATEGORY_NUMBER,
    ("categories", "duplicate-category-id"): _repeated_category,
    ("categories", "duplicate-category-name"): _merge_category,
    ("images", "id-not-integer"): _IMAGE_NUMBER,
    ("images", "id-too-large"): _IMAGE_NUMBER,
    ("images", "image-missing-key"): _size_from_file,
    ("images", "image-size-invalid"): _size_from_file,
    ("images", "duplicate-image-id"): _repeated_image,
    ("images", "duplicate-file-name"): _merge_image,
    ("images", "image-file-elsewhere"): _file_elsewhere,
    ("images", "image-size-alike"): _size_from_file,
    ("annotations", "id-not-integer"): _annotation_id,
    ("annotations", "id-as-text"): _references,
    ("annotations", "id-too-large"): _annotation_id,
    ("annotations", "annotation-missing-key"): _fill,
    ("annotations", "duplicate-annotation-id"): _new_id,
    ("annotations", "annotation-id-not-positive"): _new_id,
    ("annotations", "iscrowd-invalid"): _iscrowd,
    ("annotations", "area-invalid"): _area_from_mask,
    ("annotations", "keypoints-invalid"): _drop_keypoints,
    ("annotations", "crowd-polygon"): _crowd_runs,
    ("annotations", "polygons-not-nested"): _nest,
    ("annotations", "polygon-of-points"): _flatten,
    ("annotations", "polygon-empty"): _drop_parts,
    ("annotations", "polygon-odd"): _drop_parts,
    ("annotations", "polygon-short"): _drop_parts,
    ("annotations", "polygon-outside"): _cut_polygons,
    **{
        ("annotations", kind): _box_from_mask
        for kind in (
            *("box-malformed", "box-not-finite", "box-negative", "box-without-area"),
            *("box-outside", "box-mismatch"),
        )
    },
}
"""The repair for each section and kind of finding."""
