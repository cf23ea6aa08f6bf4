"""Checks a COCO instances file and its images before training.

The check finds everything that would make detectron2 (``load_coco_json``, DatasetMapper, masks),
pycocotools or this package's evaluation fail, and everything that they would silently misread.
``findings.KINDS`` lists all kinds of findings.
"""

from __future__ import annotations

import contextlib
import gc
import json
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..progress import progress
from .findings import Finding, Findings, Place, quote
from .foreign_formats import foreign_bytes, foreign_text
from .image_folders import join_folders
from .images import ImageFacts
from .masks import MaskFormats, check_box_and_mask
from .object_shares import Shares
from .records import Sizes, check_annotation_fields, check_categories, check_images, check_sections
from .records_and_files import check_files
from .whole_export import check_whole


@dataclass
class CheckOptions:
    """Options of the check.

    Attributes:
        num_classes: number of classes of the model; None if unknown.
        lvis: whether the file is in LVIS format.
        masks: whether objects need masks (MODEL.MASK_ON).
        files: whether to check the image files.
        decode: whether to decode all image files.
        known_files: facts by path about files that do not have to be read again.
    """

    num_classes: int | None = None
    lvis: bool = False
    masks: bool = True
    files: bool = True
    decode: bool = False
    known_files: dict[str, ImageFacts] = field(default_factory=dict)


@dataclass
class Facts:
    """Facts about a file that a check collects in addition to findings.

    Attributes:
        categories: category names by id.
        formats: formats of the masks.
        wrong_areas: see Shares.
    """

    categories: dict[int, str] = field(default_factory=dict)
    formats: MaskFormats = field(default_factory=MaskFormats)
    wrong_areas: dict[str, dict[int, float]] = field(default_factory=dict)


def check_coco_file(
    json_file: str, image_root: str | Sequence[str], options: CheckOptions | None = None
) -> list[Finding]:
    """Checks one COCO instances file against its image folder.

    Args:
        json_file: path of the annotations.
        image_root: the folder that ``file_name`` is relative to, or several folders.
        options: options of the check; None for the defaults.

    Returns:
        The findings, in the order of the file.
    """
    found = Findings(json_file)
    content = read_content(json_file, found)
    if not found:
        root = join_folders(content, image_root)
        check_content(content, root, found, options or CheckOptions())
    return found


def read_content(json_file: str, found: Findings, *, compact: bool = True) -> Any:
    """Returns the content of a JSON file; if it cannot be read, adds a finding and returns None.

    Args:
        json_file: path of the file.
        found: list to which the finding is added.
        compact: whether to store polygons as arrays of numbers, which saves 1 GB for COCO.
    """
    try:
        data = Path(json_file).read_bytes()
    except OSError as error:
        found.add("json-missing", f"the file cannot be read: {error.strerror}")
        return None
    if not data.strip():
        found.add("json-empty", f"the file has {len(data)} bytes and no content")
        return None
    if foreign_bytes(data, found):
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found.add("json-encoding", f"byte {error.start} is not UTF-8")
        return None
    if text.startswith("\ufeff"):
        found.add("json-encoding", "the file starts with a byte order mark")
        return None
    del data  # COCO's text alone is 450 MB
    return _parse(text, found, _compact if compact else None)


def _compact(record: dict[str, Any]) -> dict[str, Any]:
    """Converts the polygons of a parsed object to arrays if they are lists of numbers."""
    polygons = record.get("segmentation")
    if type(polygons) is list:
        for k, polygon in enumerate(polygons):
            if type(polygon) is list and polygon:
                with contextlib.suppress(TypeError, OverflowError):  # the check reports these
                    polygons[k] = array("d", polygon)
    return record


def _parse(text: str, found: Findings, object_hook: Callable[[dict[str, Any]], Any] | None) -> Any:
    # Garbage collection would take longer than parsing, and none of the new objects is garbage.
    gc.disable()
    try:
        return json.loads(text, object_hook=object_hook)
    except json.JSONDecodeError as error:
        foreign = foreign_text(text)
        if foreign:
            found.add("not-a-coco-file", foreign)
            return None
        place = f"line {error.lineno}, column {error.colno} (character {error.pos})"
        end = text.rstrip()
        if not end.lstrip().startswith(("{", "[")):
            found.add("not-a-coco-file", f"the file is not JSON: it starts with {quote(end[:40])}")
            return None
        truncated = not end.endswith("}") or error.pos >= len(end)
        kind = "json-truncated" if truncated else "json-syntax"
        found.add(kind, f"the file is not JSON at {place}: {error.msg}")
    except RecursionError:
        found.add("json-syntax", "the file is nested too deeply")
    except ValueError as error:  # a number with thousands of digits
        found.add("json-syntax", f"the file cannot be parsed: {quote(str(error))}")
    finally:
        gc.enable()
    return None


def check_content(content: Any, image_root: str, found: Findings, options: CheckOptions) -> Facts:
    """Checks the content of a COCO file.

    Args:
        content: the parsed JSON.
        image_root: the image folder.
        found: list to which findings are added.
        options: options of the check.
    """
    facts = Facts()
    if not check_sections(content, found):
        return facts
    lvis = options.lvis
    names = check_categories(
        content["categories"], found, num_classes=options.num_classes, lvis=lvis
    )
    facts.categories = {i: name for i, name in names.items() if isinstance(i, int)}
    sizes = check_images(content["images"], found, lvis=lvis)
    if options.files:
        check_files(
            content,
            image_root,
            found,
            sizes,
            lvis=lvis,
            decode=options.decode,
            known=options.known_files,
        )
    _check_annotations(content["annotations"], found, facts, names, sizes, options)
    check_whole(content, names, found)
    return facts


def _check_annotations(
    annotations: list[Any],
    found: Findings,
    facts: Facts,
    names: dict[Hashable, str],
    sizes: Sizes,
    options: CheckOptions,
) -> None:
    """Checks each annotation, and then the annotations as a whole."""
    if not annotations:
        found.add("no-annotations", "the file has no annotations")
        return
    any_masks = any(isinstance(x, dict) and x.get("segmentation") for x in annotations)
    if options.masks and not any_masks:
        message = f"none of the {len(annotations)} annotations has a mask; they have only boxes"
        found.add("no-masks", message)
    lvis, masks = options.lvis, options.masks and any_masks
    first_of_id: dict[Hashable, int] = {}
    shares = Shares(sizes)
    for index, annotation in enumerate(progress(annotations, "checking annotations")):
        if not isinstance(annotation, dict):
            message = f"the annotation is {quote(annotation)}, not an object"
            found.add("annotation-not-object", message, Place("annotations", index))
            continue
        _check_duplicate(annotation, index, found, first_of_id)
        check_annotation_fields(annotation, index, found, sizes, names, lvis=lvis, masks=masks)
        mask = check_box_and_mask(annotation, index, found, sizes, lvis=lvis, masks=masks)
        facts.formats.note(annotation)
        shares.note(annotation, index, mask)
    facts.formats.check(found)
    shares.check(annotations, found)
    facts.wrong_areas = shares.wrong_areas


def _check_duplicate(
    annotation: dict[str, Any], index: int, found: Findings, first_of_id: dict[Hashable, int]
) -> None:
    i = annotation.get("id")
    if i is None or not isinstance(i, Hashable):
        return
    first = first_of_id.setdefault(i, index)
    if first != index:
        message = f"annotations[{first}] and [{index}] have the same id"
        at = Place("annotations", index, annotation.get("image_id"), i)
        found.add("duplicate-annotation-id", message, at)
