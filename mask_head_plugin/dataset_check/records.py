"""Checks the records of a COCO file: sections, categories, images and annotation fields."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Hashable, Mapping
from typing import Any

from PIL import Image

from .findings import SECTION_NAMES, Findings, Place, quote, quote_path
from .foreign_formats import foreign_json

SECTIONS = tuple(SECTION_NAMES)
ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd")
MAX_ID = 1 << 53
"""Limit for ids. Metrics store them as float64, which cannot represent all integers above this."""

MOST_AREA = 1.1
"""Largest area of an object relative to its image; polygons may extend a pixel beyond it."""

Sizes = dict[Hashable, tuple[int, int] | None]
"""(height, width) by image id; None if the record has no valid size."""


def max_pixels() -> float:
    """Returns the most pixels that Pillow, with which detectron2 reads images, accepts."""
    limit = Image.MAX_IMAGE_PIXELS
    return math.inf if limit is None else 2 * limit


def check_sections(content: Any, found: Findings) -> bool:
    """Returns whether the three sections are lists, and adds a finding for each that is not."""
    foreign = foreign_json(content)
    if foreign:
        found.add("not-a-coco-file", foreign)
        return False
    if not isinstance(content, dict):
        found.add("json-not-object", f"the file contains {quote(content)}")
        return False
    complete = True
    for section in SECTIONS:
        if not isinstance(content.get(section), list):
            there = f"is {quote(content[section])}, not a list" if section in content else "missing"
            found.add("missing-section", f"{section!r} {there}")
            complete = False
    return complete


def check_categories(
    categories: list[Any], found: Findings, *, num_classes: int | None = None, lvis: bool = False
) -> dict[Hashable, str]:
    """Checks the categories.

    Args:
        categories: the section.
        found: list to which findings are added.
        num_classes: number of classes of the model; None if unknown.
        lvis: whether the file is in LVIS format, for which detectron2 subtracts 1 from the ids to
            get class numbers.

    Returns:
        Names by id, for categories that have an id and a valid name.
    """
    names: dict[Hashable, str] = {}
    first_of_name: dict[str, Hashable] = {}
    for index, category in enumerate(categories):
        at = Place("categories", index)
        if not isinstance(category, dict):
            found.add(
                "category-not-object", f"the category is {quote(category)}, not an object", at
            )
            continue
        missing = [key for key in ("id", "name") if category.get(key) is None]
        if missing:
            what = quote(next((category[k] for k in ("name", "id") if category.get(k)), None))
            found.add(
                "category-missing-key", f"category {what} has no {' and no '.join(missing)}", at
            )
            continue
        i, name = category["id"], category["name"]
        check_id("category", i, found, at)
        if not isinstance(name, str) or not name.strip() or not _is_unicode(name):
            found.add("category-name", f"category {quote(i)} has the name {quote(name)}", at)
            continue
        if not isinstance(i, Hashable):
            continue
        if i in names:
            both = f"{quote(names[i])} and {quote(name)}"
            found.add("duplicate-category-id", f"the categories {both} have the id {quote(i)}", at)
            continue
        if name in first_of_name:
            both = f"{quote(first_of_name[name])} and {quote(i)}"
            found.add(
                "duplicate-category-name",
                f"the categories {both} are both called {quote(name)}",
                at,
            )
        names[i] = name
        first_of_name.setdefault(name, i)
        if lvis and type(i) is int and not 1 <= i <= len(categories):
            message = (
                f"category {quote(name)} has the id {i} in a file of {len(categories)} categories"
            )
            found.add("category-id-range", message, at)
    if not categories:
        found.add("no-categories", "the file lists no categories")
    elif num_classes is not None and len(names) != num_classes:
        found.add(
            "num-classes", f"the file has {len(names)} categories, but the model has {num_classes}"
        )
    return names


def _is_unicode(text: str) -> bool:
    """Returns whether a string can be encoded; JSON can contain half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_id(what: str, value: Any, found: Findings, at: Place) -> None:
    """Adds a finding for an id that is not an integer, or that float64 may have to round."""
    if type(value) is not int:
        message = f"the {what} id {quote(value)} is of type {type(value).__name__}"
        found.add("id-not-integer", message, at)
    elif abs(value) >= MAX_ID:
        found.add("id-too-large", f"the {what} id {quote(value)} is beyond 2^53", at)


def check_images(images: list[Any], found: Findings, *, lvis: bool = False) -> Sizes:
    """Checks the image records, but not the image files.

    Args:
        images: the section.
        found: list to which findings are added.
        lvis: whether files are named by ``coco_url``.

    Returns:
        Sizes by id, for all records that have an id.
    """
    sizes: Sizes = {}
    first_of_file: dict[str, Any] = {}
    for index, image in enumerate(images):
        if not isinstance(image, dict):
            found.add(
                "image-not-object",
                f"the image is {quote(image)}, not an object",
                Place("images", index),
            )
            continue
        i = image.get("id")
        at = Place("images", index, i)
        name_key = "coco_url" if lvis else "file_name"
        for key in ("id", name_key, "height", "width"):
            if image.get(key) is None:
                found.add("image-missing-key", f"it lacks {key}", at)
        size = _check_size(image, at, found)
        if image.get(name_key) is not None:
            _check_file_name(image, at, found, first_of_file, lvis)
        if i is None:
            continue
        check_id("image", i, found, at)
        if isinstance(i, Hashable):
            if i in sizes:
                message = (
                    f"another image also has this id; this image has the file "
                    f"{quote_path(image.get(name_key))}"
                )
                found.add("duplicate-image-id", message, at)
            sizes.setdefault(i, size)
    if not images:
        found.add("no-images", "the file lists no images")
    return sizes


def _check_size(image: Mapping[str, Any], at: Place, found: Findings) -> tuple[int, int] | None:
    sides = [image.get(key) for key in ("height", "width")]
    if None in sides:
        return None
    height, width = sides
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        message = f"height is {quote(height)} and width is {quote(width)}"
        found.add("image-size-invalid", message, at)
        return None
    if height * width > max_pixels():
        message = (
            f"{quote(width)} x {quote(height)} exceeds Pillow's limit of {max_pixels():.0f} pixels"
        )
        found.add("image-too-large", message, at)
        return None
    return height, width


def _check_file_name(
    image: Mapping[str, Any], at: Place, found: Findings, seen: dict[str, Any], lvis: bool
) -> None:
    name = file_name(image, lvis)
    if name is None:
        given = image["coco_url" if lvis else "file_name"]
        found.add("file-name-invalid", f"its file name is {quote(given)}", at)
        return
    if is_outside(name):
        message = f"its file {quote_path(name)} is not inside the image folder"
        found.add("file-name-outside", message, at)
    elif name in seen and seen[name] != at.image_id:
        message = f"its file {quote_path(name)} also belongs to image {quote(seen[name])}"
        found.add("duplicate-file-name", message, at)
    seen.setdefault(name, at.image_id)


def is_outside(name: str) -> bool:
    """Returns whether a normalised path leads out of the folder that it is relative to."""
    return name.startswith("/") or name.split("/")[0] == ".."


def file_name(image: Mapping[str, Any], lvis: bool) -> str | None:
    """Returns the normalised path in a record; None if it is not a valid path.

    For LVIS, the path consists of the last two parts of ``coco_url``, as in detectron2.
    """
    name = image.get("coco_url" if lvis else "file_name")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return None
    if lvis:
        parts = name.split("/")[-2:]
        return "/".join(parts) if len(parts) == 2 and all(parts) else None
    if not _is_unicode(name):
        return None
    normalised = posixpath.normpath(name)
    return None if normalised == "." else normalised


def check_annotation_fields(
    annotation: Mapping[str, Any],
    index: int,
    found: Findings,
    sizes: Sizes,
    categories: Mapping[Hashable, str],
    *,
    lvis: bool,
    masks: bool,
) -> None:
    """Checks the fields of an annotation, except its box and mask.

    Args:
        annotation: the record.
        index: index of the record in its section.
        found: list to which findings are added.
        sizes: sizes by image id.
        categories: names by category id.
        lvis: whether the file is in LVIS format, which has no ``iscrowd``.
        masks: whether each annotation must have a mask.
    """
    get, i, image_id = annotation.get, annotation.get("id"), annotation.get("image_id")
    at = Place("annotations", index, image_id, i)
    for key in ANNOTATION_KEYS:
        needless = (lvis and key == "iscrowd") or (not masks and key == "segmentation")
        if get(key) is None and not needless:
            found.add("annotation-missing-key", f"it lacks {key}", at)
    if i is not None:
        check_id("annotation", i, found, at)
        if type(i) is int and i < 1:
            found.add("annotation-id-not-positive", f"its id is {i}, which is below 1", at)
    for key, known, kind in (
        ("image_id", sizes, "unknown-image"),
        ("category_id", categories, "unknown-category"),
    ):
        value = get(key)
        if value is None:
            continue
        listed = listed_id(value, known)
        if listed is None:
            found.add(kind, f"its {key} {quote(value)} is not listed", at)
        elif isinstance(value, str) and type(listed) is int:
            message = (
                f"its {key} is the text {quote(value)}, but the file lists the number {listed}"
            )
            found.add("id-as-text", message, at, listed)
        elif type(value) is not int:
            check_id(key.removesuffix("_id"), value, found, at)
    crowd, area = get("iscrowd"), get("area")
    if crowd is not None and (type(crowd) is not int or crowd not in (0, 1)):
        found.add("iscrowd-invalid", f"iscrowd is {quote(crowd)}", at)
    if area is not None and not (is_finite(area) and area >= 0):
        found.add("area-invalid", f"area is {quote(area)}", at)
    elif area is not None:
        size = sizes.get(listed_id(image_id, sizes))
        if size is not None and area > MOST_AREA * math.prod(size):
            message = f"area is {area}, but the image has only {math.prod(size)} pixels"
            found.add("area-invalid", message, at)
    keypoints = get("keypoints")  # detectron2 reads them even if they are not used
    if keypoints and not (
        isinstance(keypoints, list) and len(keypoints) % 3 == 0 and all(map(is_finite, keypoints))
    ):
        found.add("keypoints-invalid", f"the keypoints are {quote(keypoints)}", at)
    if get("ignore", 0) != 0:
        found.add("ignore-flag", f"'ignore' is {quote(get('ignore'))}", at)


def listed_id(value: Any, known: Mapping[Hashable, Any]) -> Hashable:
    """Returns the listed id that an annotation refers to; None if there is none.

    The text "7" can refer to the listed number 7, because VIA lists images by number but writes
    text into annotations.
    """
    try:
        if value in known:
            return value
    except TypeError:  # not hashable
        return None
    if isinstance(value, str):
        text = value.removesuffix(".0")
        value = int(text) if text.isascii() and text.isdigit() and len(text) < 17 else value
        if str(value) != text:  # 007 is a different id
            return None
        return value if value in known else None
    return None


def is_finite(value: Any) -> bool:
    """Returns whether a value is a finite number (not a bool) within the range of a float64."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False
