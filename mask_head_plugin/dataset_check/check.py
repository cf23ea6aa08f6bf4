"""Checks a COCO instances file and its images before anything is trained with them.

It looks for whatever breaks detectron2's ``load_coco_json``, its DatasetMapper and masks,
pycocotools or this package's evaluation, and for whatever they would silently misread.
``findings.KINDS`` is the list.
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
    """How to check.

    Attributes:
        num_classes: of the model, None if not known.
        lvis: whether the file is LVIS's.
        masks: whether objects need masks, as MODEL.MASK_ON says.
        files: whether to check the image files.
        decode: whether to decode all image files.
        known_files: facts of files that need not be read again.
    """

    num_classes: int | None = None
    lvis: bool = False
    masks: bool = True
    files: bool = True
    decode: bool = False
    known_files: dict[str, ImageFacts] = field(default_factory=dict)


@dataclass
class Facts:
    """What a check learns about a file, apart from its faults.

    Attributes:
        categories: names by id.
        formats: how its masks are written.
    """

    categories: dict[int, str] = field(default_factory=dict)
    formats: MaskFormats = field(default_factory=MaskFormats)


def check_coco_file(
    json_file: str, image_root: str | Sequence[str], options: CheckOptions | None = None
) -> list[Finding]:
    """Checks one COCO instances file against its image folder.

    Args:
        json_file: path of the annotations.
        image_root: the folder that ``file_name`` starts from, or several.
        options: how to check; None for the defaults.

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
    """Returns the content of a JSON file; None, and adds a finding, if it cannot be read.

    Args:
        json_file: its path.
        found: gets the finding.
        compact: whether polygons may become arrays of numbers, which saves 1 GB for COCO.
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
    """Turns a parsed object's polygons into arrays if they are lists of numbers."""
    polygons = record.get("segmentation")
    if type(polygons) is list:
        for k, polygon in enumerate(polygons):
            if type(polygon) is list and polygon:
                with contextlib.suppress(TypeError, OverflowError):  # the check will report it
                    polygons[k] = array("d", polygon)
    return record


def _parse(text: str, found: Findings, object_hook: Callable[[dict[str, Any]], Any] | None) -> Any:
    # None of the millions of new objects is garbage; looking for it takes longer than parsing.
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
        truncated = not end.endswith("}") or error.pos >= len(end)
        kind = "json-truncated" if truncated else "json-syntax"
        found.add(kind, f"the file is not JSON at {place}: {error.msg}")
    except RecursionError:
        found.add("json-syntax", "the file is nested too deeply")
    except ValueError as error:  # a number with thousands of digits
        found.add("json-syntax", f"the file has {quote(str(error))}")
    finally:
        gc.enable()
    return None


def check_content(content: Any, image_root: str, found: Findings, options: CheckOptions) -> Facts:
    """Checks what a COCO file holds.

    Args:
        content: parsed from JSON.
        image_root: the folder of its images.
        found: gets the findings.
        options: how to check.
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
    """Checks each annotation, and then shares of them."""
    if not annotations:
        found.add("no-annotations", "the file has no annotations")
        return
    any_masks = any(isinstance(x, dict) and x.get("segmentation") for x in annotations)
    if options.masks and not any_masks:
        message = f"none of the {len(annotations)} annotations has a mask: these are boxes"
        found.add("no-masks", message)
    lvis, masks = options.lvis, options.masks and any_masks
    first_of_id: dict[Hashable, int] = {}
    shares = Shares(sizes)
    for index, annotation in enumerate(progress(annotations, "checking annotations")):
        if not isinstance(annotation, dict):
            message = f"an annotation is {quote(annotation)}"
            found.add("annotation-not-object", message, Place("annotations", index))
            continue
        _check_duplicate(annotation, index, found, first_of_id)
        check_annotation_fields(annotation, index, found, sizes, names, lvis=lvis, masks=masks)
        mask = check_box_and_mask(annotation, index, found, sizes, lvis=lvis, masks=masks)
        facts.formats.note(annotation)
        shares.note(annotation, index, mask)
    facts.formats.check(found)
    shares.check(annotations, found)


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
