"""Compares image files with their records: locates missing files, and decides which size is wrong.

images.py reports what is wrong with a file; this module finds the cause.
"""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import messages
from .findings import Findings, quote_path
from .image_places import ImagePlaces
from .images import ImageFacts, ListedImage, check_image_files
from .records import Sizes, file_name, is_outside, listed_id

FEW_SIZES = 3
"""Fewer records than this may have the same size by chance."""
MOST = 0.9
"""Share of masks that must fit their files to conclude that the recorded sizes are wrong."""

ImageSize = tuple[int, int]
"""height, width"""


def check_files(
    content: Mapping[str, list[Any]],
    image_root: str,
    found: Findings,
    sizes: Sizes,
    *,
    lvis: bool,
    decode: bool,
    known: dict[str, ImageFacts],
) -> None:
    """Adds findings about the image files, and fills in sizes that records lack.

    Args:
        content: the sections of an annotation file.
        image_root: the image folder.
        found: list to which findings are added. If a name seems to lead out of the folder but
            its file is inside, the finding is changed to another kind.
        sizes: sizes by image id. If a record has no size, or one that is plainly wrong, the file's
            size is used, so that masks can be checked.
        lvis: whether files are named by ``coco_url``.
        decode: whether to decode all files.
        known: facts by path. Its files are not read again; facts about other files are added.
    """
    images = content["images"]
    if not Path(image_root).is_dir():
        message = f"the image folder {quote_path(image_root)} does not exist"
        found.add("image-folder-missing", message)
        return
    listed = listed_images(images, image_root, lvis=lvis)
    of_files = Findings(found.file)
    check_image_files(listed, of_files, decode=decode, known=known)
    alike = _wrong_alike(listed, known, content["annotations"])
    by_number = {image.number: image for image in listed}
    for finding in of_files:
        image = by_number[finding.index]
        if finding.kind == "image-size-mismatch" and image.number in alike:
            message = f"{finding.message}, like all records; the masks fit the file"
            found.append(replace(finding, kind="image-size-alike", message=message))
        else:
            found.append(finding)
    if not lvis:  # LVIS names images by their URL
        _look_for_files(images, image_root, found)
    for image in listed:
        i, facts = listed_id(image.image_id, sizes), known[image.path]
        unknown = sizes.get(i, ()) is None and facts.problem is None and facts.orientation == 1
        if unknown or image.number in alike:
            sizes[i] = facts.image_hw


def listed_images(images: list[Any], image_root: str, *, lvis: bool = False) -> list[ListedImage]:
    """Returns the image records whose files are inside the folder; other files are not opened."""
    listed = []
    for index, image in enumerate(images):
        name = file_name(image, lvis) if isinstance(image, dict) else None
        if name is None or is_outside(name):
            continue
        sides = (image.get("height"), image.get("width"))
        valid = all(type(side) is int and side > 0 for side in sides)
        # As in detectron2, the name is not normalised.
        path = os.path.join(image_root, name if lvis else image["file_name"])  # noqa: PTH118  # as detectron2
        listed.append(ListedImage(index, image.get("id"), path, sides if valid else None))
    return listed


def _look_for_files(images: list[Any], image_root: str, found: Findings) -> None:
    """Adds the actual location to findings for files that are not where their records say."""
    lost = [k for k, x in enumerate(found) if x.kind in ("image-file-missing", "file-name-outside")]
    if not lost:
        return
    places = ImagePlaces(image_root)
    names = {k: images[found[k].index]["file_name"] for k in lost}
    found_at = {name: _place(name, image_root, places) for name in set(names.values())}
    # A file is ambiguous if several names lead to it, unless they differ only in the separator.
    others = {x["file_name"] for x in images if isinstance(x, dict) and file_name(x, lvis=False)}
    meaning = defaultdict(set)
    for name in others:
        meaning[found_at.get(name) or posixpath.normpath(name)].add(_with_slashes(name))
    for k, name in names.items():
        place = found_at[name]
        if place is not None and meaning[place] == {_with_slashes(name)}:
            message = f"its file {quote_path(name)} is in the image folder as {quote_path(place)}"
            found[k] = replace(
                found[k], kind="image-file-elsewhere", message=message, right_value=place
            )
        elif namesakes := places.namesakes(name):
            files = messages.listed([quote_path(path) for path in namesakes])
            has = "has" if len(namesakes) == 1 else "have"
            message = f"{found[k].message}; in the image folder, {files} {has} the same name"
            found[k] = replace(found[k], message=message)
        elif _is_absolute_file(name):
            message = (
                f"{found[k].message}, but such a file exists: use its folder as the image folder"
            )
            found[k] = replace(found[k], message=message)


def _place(name: str, image_root: str, places: ImagePlaces) -> str | None:
    """Returns the path, relative to the folder, of the file that a name refers to, or None."""
    if _is_absolute_file(name):
        for real in (os.path.abspath, os.path.realpath):  # as written, and with links resolved
            within = os.path.relpath(real(name), real(image_root))
            if not is_outside(within):
                return within
    return places.locate(name)


def _with_slashes(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/"))


def _is_absolute_file(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() and path.is_file()


def _wrong_alike(
    listed: list[ListedImage], known: Mapping[str, ImageFacts], annotations: Iterable[Any]
) -> set[int]:
    """Returns the indices of images with a wrong size if all records state the same size.

    Some tools write a fixed size without reading the files. If the masks fit the files but not that
    size, the sizes of the files are taken to be right.
    """
    stated = {image.image_hw for image in listed}
    if len(stated) != 1 or len(listed) < FEW_SIZES or None in stated:
        return set()
    wrong = {
        image.image_id: image
        for image in listed
        if isinstance(image.image_id, Hashable)
        and known[image.path].problem is None
        and known[image.path].image_hw != image.image_hw
    }
    total = fit_file = fit_record = 0
    for annotation in annotations if wrong else ():
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        image = wrong.get(listed_id(image_id, wrong))
        if image is not None and image.image_hw is not None and annotation.get("segmentation"):
            total += 1
            fit_file += _fits(annotation["segmentation"], known[image.path].image_hw)
            fit_record += _fits(annotation["segmentation"], image.image_hw)
    right = total and fit_file >= MOST * total and fit_record <= 0.5 * total
    return {image.number for image in wrong.values()} if right else set()


def _fits(segmentation: Any, image_hw: ImageSize) -> bool:
    """Returns whether a mask, which may be malformed, fits into an image of this size."""
    if isinstance(segmentation, dict):
        return bool(segmentation.get("size") == list(image_hw))
    try:
        numbers = np.hstack([np.ravel(np.asarray(x, float)) for x in segmentation])
        points = numbers.reshape(-1, 2)
    except (ValueError, TypeError, OverflowError):
        return False
    height, width = image_hw
    return bool((points.min(0) >= -1).all() and (points.max(0) <= (width + 1, height + 1)).all())
