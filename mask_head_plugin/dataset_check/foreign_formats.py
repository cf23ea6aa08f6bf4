"""Recognises files that are not COCO instances: what they are, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..image_files import LFS_POINTER
from .findings import Findings

_START = 4096
"""How many characters are enough to recognise a text."""

_ARCHIVES = {b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "a gzip archive"}
_BY_SUPERVISION = "convert the data set with supervision (docs/your_data.md)"
_BY_DATUMARO = "convert the data set with datumaro (docs/your_data.md)"
_NUMBER = r"[ \t]+[-+.\deE]+"
_TEXTS: tuple[tuple[str, str], ...] = (
    (rf"\s*\d+({_NUMBER}){{4,}}[ \t]*(\r?\n|$)", f"YOLO labels of one image; {_BY_SUPERVISION}"),
    (
        r"(?s)(?!\s*[\[{]).*^(names|nc)[ \t]*:",
        f"a YAML file, such as YOLO's description of a data set; {_BY_SUPERVISION}",
    ),
    (r"\s*(<\?xml[^>]*>\s*)?<annotations>", "CVAT's XML; export as COCO 1.0 there"),
    (r"\s*(<\?xml[^>]*>\s*)?<annotation\b", f"Pascal VOC's XML of one image; {_BY_DATUMARO}"),
    (
        r"(?i)\s*<(!doctype\s+html|html)",
        "a web page, such as that of a download that needs a login",
    ),
    (r"\s*#?filename,file_size,", "VIA's CSV; export annotations in COCO format there"),
)
"""Regular expressions of a file's start, with what it is."""


def foreign_bytes(data: bytes, found: Findings) -> bool:
    """Returns whether a file is not a text with annotations, and adds a finding that says what it
    is.

    Args:
        data: of the file.
        found: gets the finding.
    """
    if data.startswith(LFS_POINTER):
        found.add("git-lfs-pointer", "the file is a Git LFS pointer, not the annotations")
        return True
    for magic, what in _ARCHIVES.items():
        if data.startswith(magic):
            found.add("not-a-coco-file", f"the file is {what}; unpack it")
            return True
    return False


def foreign_text(text: str) -> str:
    """Returns what a text that is not JSON is; empty if unknown."""
    start = text[:_START]
    for pattern, what in _TEXTS:
        if re.match(pattern, start, re.MULTILINE):
            return f"the file is {what}"
    return ""


def foreign_json(content: Any) -> str:
    """Returns what parsed JSON is if it is not COCO instances; empty if unknown."""
    for what, matches in _CONTENTS.items():
        if matches(content):
            return f"the file is {what}"
    return ""


def _first(content: Any) -> dict[str, Any]:
    """Returns the first record of a list, or of a COCO file's annotations."""
    records = content.get("annotations") if isinstance(content, dict) else content
    first = records[0] if isinstance(records, list) and records else None
    return first if isinstance(first, dict) else {}


def _has(content: Any, *keys: str) -> bool:
    return isinstance(content, dict) and all(key in content for key in keys)


def _is_detections(content: Any) -> bool:
    first = _first(content)
    return _has(first, "image_id", "category_id", "score") and not _has(first, "area", "iscrowd")


def _is_via(content: Any) -> bool:
    if not isinstance(content, dict) or "_via_img_metadata" in content:
        return isinstance(content, dict)
    values = list(content.values())
    return bool(values) and all(_has(x, "filename", "regions") for x in values)


_CONTENTS: dict[str, Callable[[Any], bool]] = {
    "a list of detections with scores, written by a model; give the annotations": _is_detections,
    f"labelme's of one image; {_BY_SUPERVISION}": lambda x: (
        _has(x, "shapes") and (_has(x, "imagePath") or _has(x, "imageData"))
    ),
    "a project of VIA; export annotations in COCO format there": _is_via,
    "Datumaro's; convert it (datum convert -f coco_instances)": lambda x: _has(
        x, "items", "categories"
    ),
    "Supervisely's of one image; export as COCO there": lambda x: _has(x, "objects", "size"),
    f"Cityscapes' of one image; {_BY_DATUMARO}": lambda x: _has(
        x, "objects", "imgHeight", "imgWidth"
    ),
    "COCO panoptic segmentation; its instances are in another file": lambda x: (
        _has(_first(x), "segments_info") and not _has(_first(x), "bbox")
    ),
    "COCO captions; its instances are in another file": lambda x: (
        _has(_first(x), "caption") and not _has(_first(x), "bbox")
    ),
    "a list of Label Studio's tasks; export as COCO there": lambda x: (
        isinstance(x, list) and _has(_first(x), "data") and not _has(_first(x), "image_id")
    ),
    "CreateML's; convert the data set": lambda x: (
        isinstance(x, list) and _has(_first(x), "image", "annotations")
    ),
    "a list of annotations without images and categories; export all three": lambda x: (
        isinstance(x, list) and _has(_first(x), "image_id", "category_id")
    ),
}
"""What a file is, in words, and a test of its content."""
