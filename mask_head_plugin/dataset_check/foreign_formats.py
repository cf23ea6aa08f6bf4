"""Recognises files that are not in the COCO instances format, and advises what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..image_files import LFS_POINTER
from .findings import Findings

_START = 4096
"""Number of characters that are enough to recognise a format."""

_ARCHIVES = {b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "a gzip archive"}
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_BY_SUPERVISION = "convert the data set with supervision (docs/your_data.md)"
_BY_DATUMARO = "convert the data set with datumaro (docs/your_data.md)"
_NUMBER = r"[ \t]+[-+.\deE]+"
_TEXTS: tuple[tuple[str, str], ...] = (
    (rf"\s*\d+({_NUMBER}){{4,}}[ \t]*(\r?\n|$)", f"YOLO labels of one image; {_BY_SUPERVISION}"),
    (
        r"(?s)(?!\s*[\[{]).*^(names|nc)[ \t]*:",
        f"a YAML file, such as YOLO's description of a data set; {_BY_SUPERVISION}",
    ),
    (r"\s*(<\?xml[^>]*>\s*)?<annotations>", "CVAT's XML; export from CVAT as COCO 1.0"),
    (r"\s*(<\?xml[^>]*>\s*)?<annotation\b", f"Pascal VOC's XML of one image; {_BY_DATUMARO}"),
    (
        r"(?i)\s*<(!doctype\s+html|html)",
        "a web page, perhaps because the download needs a login",
    ),
    (r"\s*#?filename,file_size,", "VIA's CSV; export annotations from VIA in COCO format"),
)
"""Regular expressions for the start of a file, with a description of the format."""


def foreign_bytes(data: bytes, found: Findings) -> bool:
    """Returns whether a file is an archive, an image or a Git LFS pointer, and adds a finding.

    Args:
        data: content of the file.
        found: list to which the finding is added.
    """
    if data.startswith(LFS_POINTER):
        found.add("git-lfs-pointer", "the file is a Git LFS pointer, not the annotations")
        return True
    for magic, what in _ARCHIVES.items():
        if data.startswith(magic):
            found.add("not-a-coco-file", f"the file is {what}; unpack it")
            return True
    if data.startswith(_IMAGES):
        found.add("not-a-coco-file", "the file is an image or a video, not annotations")
        return True
    return False


def foreign_text(text: str) -> str:
    """Describes text that is not JSON; returns "" if its format is unknown."""
    start = text[:_START]
    for pattern, what in _TEXTS:
        if re.match(pattern, start, re.MULTILINE):
            return f"the file is {what}"
    return ""


def foreign_json(content: Any) -> str:
    """Describes JSON in a format other than COCO instances; returns "" if the format is unknown."""
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
    "a list of a model's detections with scores; use the annotation file": _is_detections,
    f"labelme's JSON of one image; {_BY_SUPERVISION}": lambda x: (
        _has(x, "shapes") and (_has(x, "imagePath") or _has(x, "imageData"))
    ),
    "a VIA project; export annotations from VIA in COCO format": _is_via,
    "in Datumaro's format; convert it (datum convert -f coco_instances)": lambda x: _has(
        x, "items", "categories"
    ),
    "Supervisely's JSON of one image; export from Supervisely as COCO": lambda x: _has(
        x, "objects", "size"
    ),
    f"Cityscapes' JSON of one image; {_BY_DATUMARO}": lambda x: _has(
        x, "objects", "imgHeight", "imgWidth"
    ),
    "COCO panoptic segmentation; its instances are in another file": lambda x: (
        _has(_first(x), "segments_info") and not _has(_first(x), "bbox")
    ),
    "COCO captions; its instances are in another file": lambda x: (
        _has(_first(x), "caption") and not _has(_first(x), "bbox")
    ),
    "a list of Label Studio tasks; export from Label Studio as COCO": lambda x: (
        isinstance(x, list) and _has(_first(x), "data") and not _has(_first(x), "image_id")
    ),
    "in CreateML's format; convert the data set": lambda x: (
        isinstance(x, list) and _has(_first(x), "image", "annotations")
    ),
    "a list of annotations without images and categories; export all three sections": lambda x: (
        isinstance(x, list) and _has(_first(x), "image_id", "category_id")
    ),
}
"""Descriptions of formats, each with a function that recognises the format."""
