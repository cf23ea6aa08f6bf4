"""Findings of a data set check: one line per fault, with file, ids, description and fix."""

from __future__ import annotations

import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tabulate import tabulate

from ..image_files import WHAT_TO_DO

ERROR, WARNING, HINT = SEVERITIES = ("error", "warning", "hint")
"""An error stops training. A warning does not: detectron2 either handles the case correctly (COCO
2017, for example, has polygons that rounding puts outside the image), or it trains or measures
something that the author may not have intended. A hint needs no action.
"""


REPAIRS = "--fix repairs this"
TRIES = "--fix repairs this if possible"
REPAIRS_OR_LEAVES_OUT = "--fix repairs this if possible, or else leaves the record out"
LEAVES_OUT = "--fix leaves the record out"


class Kind(NamedTuple):
    """Properties of a kind of finding.

    Attributes:
        severity: one of SEVERITIES.
        fix: what to do.
        by_fix: what --fix does about the finding. A test compares this with
            ``record_repairs.REPAIRS`` and with corrected copies.
    """

    severity: str
    fix: str
    by_fix: str = ""


_SEE_MASK = "use the box around the mask: [x, y, width, height]"
_EXPORT = "export the file again"

KINDS: dict[str, Kind] = {
    # The file.
    "json-missing": Kind(ERROR, "give the path of a COCO instances file"),
    "json-empty": Kind(ERROR, f"{_EXPORT}; was the disk full?"),
    "json-encoding": Kind(ERROR, "save it as UTF-8 without a byte order mark", TRIES),
    "json-truncated": Kind(ERROR, "the file ends too early: copy or export it again"),
    "json-syntax": Kind(ERROR, "correct the file, or export it again"),
    "git-lfs-pointer": Kind(ERROR, WHAT_TO_DO["git-lfs-pointer"]),
    "not-a-coco-file": Kind(ERROR, "give a file in COCO instances format, or convert it"),
    "json-not-object": Kind(ERROR, "the file must be {'images': ..., 'annotations': ..., ...}"),
    "missing-section": Kind(ERROR, f"{_EXPORT} in COCO instances format"),
    "no-images": Kind(ERROR, "list the images of the data set"),
    "no-annotations": Kind(
        ERROR, "annotate the images, or name the file that contains the annotations"
    ),
    "only-crowds": Kind(
        ERROR,
        "set iscrowd to 0 if these are single objects (--fix --crowds-are-objects repairs this)",
    ),
    "no-masks": Kind(ERROR, "set MODEL.MASK_ON False to train boxes only, or export the masks"),
    "no-categories": Kind(ERROR, "list the categories"),
    "image-folder-missing": Kind(ERROR, "give the folder that file_name is relative to"),
    "normalised-coordinates": Kind(
        ERROR, "multiply them by the image's width and height in pixels", TRIES
    ),
    "category-ids-shifted": Kind(ERROR, "use the same numbering for categories and annotations"),
    "repeated-annotation": Kind(WARNING, "check whether objects were exported twice"),
    "crowd-by-export": Kind(
        WARNING,
        "set iscrowd to 0 if these are single objects, such as CVAT's brush masks (--fix "
        "--crowds-are-objects repairs this)",
    ),
    "area-suspicious": Kind(WARNING, "write the number of pixels of each mask into area", REPAIRS),
    "area-of-box": Kind(WARNING, "write the number of pixels of each mask into area", REPAIRS),
    "ring-as-hole": Kind(WARNING, "write masks with holes as run lengths"),
    "mask-on-several-images": Kind(
        WARNING,
        "delete the copies that do not fit their image; they may come from a CVAT track that was "
        "not ended",
    ),
    "image-without-objects": Kind(
        WARNING, "set DATALOADER.FILTER_EMPTY_ANNOTATIONS False to also train on these images"
    ),
    "image-over-detections": Kind(
        WARNING, "raise TEST.DETECTIONS_PER_IMAGE above the number of objects in any image"
    ),
    "image-in-both-splits": Kind(WARNING, "keep all parts of a photograph in the same split"),
    "unused-category": Kind(HINT, "remove it if the model does not need it"),
    # Ids of all records.
    "id-not-integer": Kind(
        ERROR, "write ids as whole numbers without quotes", REPAIRS_OR_LEAVES_OUT
    ),
    "id-as-text": Kind(ERROR, "write the id as a number, without quotes", REPAIRS),
    "id-too-large": Kind(ERROR, "use ids below 2^53, which metrics can represent", REPAIRS),
    # Categories.
    "category-not-object": Kind(ERROR, "write {'id': 1, 'name': 'cat'}", LEAVES_OUT),
    "category-missing-key": Kind(ERROR, "give each category an id and a name"),
    "category-name": Kind(ERROR, "give the category a name, as text"),
    "background-category": Kind(WARNING, "leave these annotations out unless they are objects"),
    "duplicate-category-id": Kind(ERROR, "give each category its own id", TRIES),
    "duplicate-category-name": Kind(
        ERROR, "merge them into one category, or rename one of them", REPAIRS
    ),
    "category-id-range": Kind(
        ERROR, "LVIS needs category ids that run from 1 to the number of categories"
    ),
    "num-classes": Kind(ERROR, "set MODEL.ROI_HEADS.NUM_CLASSES to the number of categories"),
    "categories-disagree": Kind(ERROR, "make category ids and names the same in both files"),
    "rle-needs-bitmask": Kind(ERROR, "set INPUT.MASK_FORMAT to bitmask"),
    # Image records.
    "image-not-object": Kind(ERROR, "write {'id': ..., 'file_name': ...}", LEAVES_OUT),
    "image-missing-key": Kind(
        ERROR, "add it; height and width must be those of the file", REPAIRS_OR_LEAVES_OUT
    ),
    "duplicate-image-id": Kind(
        ERROR, "give each image its own id, and use it in its annotations", REPAIRS_OR_LEAVES_OUT
    ),
    "image-size-invalid": Kind(
        ERROR, "write the file's height and width, as whole numbers above 0", REPAIRS_OR_LEAVES_OUT
    ),
    "image-too-large": Kind(ERROR, WHAT_TO_DO["image-too-large"], LEAVES_OUT),
    "file-name-invalid": Kind(
        ERROR, "write the path of the file within the image folder, as text", LEAVES_OUT
    ),
    "file-name-outside": Kind(
        ERROR, "write the path relative to the image folder, without '..'", LEAVES_OUT
    ),
    "duplicate-file-name": Kind(
        ERROR, "list each file once, with all of its annotations", REPAIRS_OR_LEAVES_OUT
    ),
    # Image files.
    "image-file-missing": Kind(ERROR, WHAT_TO_DO["image-file-missing"], LEAVES_OUT),
    "image-file-elsewhere": Kind(ERROR, "write that path into file_name", REPAIRS),
    "image-file-is-folder": Kind(ERROR, WHAT_TO_DO["image-file-is-folder"], LEAVES_OUT),
    "image-file-empty": Kind(ERROR, WHAT_TO_DO["image-file-empty"], LEAVES_OUT),
    "image-unreadable": Kind(ERROR, WHAT_TO_DO["image-unreadable"], LEAVES_OUT),
    "image-truncated": Kind(ERROR, WHAT_TO_DO["image-truncated"], LEAVES_OUT),
    "image-depth": Kind(ERROR, WHAT_TO_DO["image-depth"], LEAVES_OUT),
    "image-elongated": Kind(ERROR, WHAT_TO_DO["image-elongated"], LEAVES_OUT),
    "image-animated": Kind(WARNING, "make sure that the annotations are for the first frame"),
    "image-size-mismatch": Kind(
        ERROR, "annotate this file, or replace it with the file that was annotated", LEAVES_OUT
    ),
    "image-size-alike": Kind(ERROR, "use the file's height and width", REPAIRS),
    "image-transposed": Kind(
        ERROR, "swap width and height if the annotations fit the file", LEAVES_OUT
    ),
    "exif-size": Kind(
        ERROR,
        "if the annotations fit the stored pixels, remove the tag; otherwise rotate the pixels and "
        "annotate again",
        LEAVES_OUT,
    ),
    "exif-undecidable": Kind(
        ERROR,
        "check whether the annotations fit the stored or the rotated image, and save the pixels "
        "in that orientation, without the tag",
        LEAVES_OUT,
    ),
    # Annotation records.
    "annotation-not-object": Kind(ERROR, "write a COCO annotation", LEAVES_OUT),
    "annotation-missing-key": Kind(
        ERROR, "add it; evaluation and training need it", REPAIRS_OR_LEAVES_OUT
    ),
    "duplicate-annotation-id": Kind(ERROR, "give each annotation its own id", REPAIRS),
    "annotation-id-not-positive": Kind(
        ERROR, "number annotations from 1: in COCO's metric, 0 means 'unmatched'", REPAIRS
    ),
    "unknown-image": Kind(ERROR, "add the image, or leave the annotation out", LEAVES_OUT),
    "unknown-category": Kind(ERROR, "add the category, or leave the annotation out", LEAVES_OUT),
    "iscrowd-invalid": Kind(
        ERROR, "write 0 for an object, 1 for a crowd region", REPAIRS_OR_LEAVES_OUT
    ),
    "area-invalid": Kind(ERROR, "write the number of pixels of the mask", REPAIRS),
    "ignore-flag": Kind(ERROR, "leave the annotation out: detectron2 refuses it", LEAVES_OUT),
    "keypoints-invalid": Kind(
        ERROR,
        "write x, y and visibility of each point in one list, or leave the keypoints out",
        REPAIRS,
    ),
    # Boxes.
    "box-malformed": Kind(ERROR, _SEE_MASK, REPAIRS),
    "box-not-finite": Kind(ERROR, _SEE_MASK, REPAIRS),
    "box-negative": Kind(ERROR, _SEE_MASK, REPAIRS),
    "box-without-area": Kind(ERROR, _SEE_MASK, REPAIRS),
    "box-outside": Kind(ERROR, _SEE_MASK, REPAIRS),
    "box-mismatch": Kind(ERROR, _SEE_MASK, REPAIRS),
    "box-loose": Kind(WARNING, _SEE_MASK + " unless this is intended"),
    "flat-object": Kind(WARNING, "leave it out, as detectron2 does"),
    # Masks.
    "segmentation-type": Kind(ERROR, "write polygons or run lengths", LEAVES_OUT),
    "segmentation-empty": Kind(ERROR, "draw the mask, or leave the annotation out", LEAVES_OUT),
    "polygons-not-nested": Kind(ERROR, "write a list of polygons: [[x, y, x, y, ...]]", REPAIRS),
    "polygon-of-points": Kind(ERROR, "write [x, y, x, y, ...] without inner lists", REPAIRS),
    "polygon-empty": Kind(ERROR, "leave that polygon out", REPAIRS_OR_LEAVES_OUT),
    "polygon-odd": Kind(
        ERROR, "write x and y of each point, or leave that polygon out", REPAIRS_OR_LEAVES_OUT
    ),
    "polygon-short": Kind(
        ERROR, "write at least 3 points, or leave that polygon out", REPAIRS_OR_LEAVES_OUT
    ),
    "polygon-not-numbers": Kind(ERROR, "write numbers without quotes", LEAVES_OUT),
    "polygon-not-finite": Kind(ERROR, "draw it again", LEAVES_OUT),
    "polygon-outside": Kind(ERROR, "cut it at the image's edge", REPAIRS_OR_LEAVES_OUT),
    "mask-of-another-image": Kind(
        ERROR,
        "delete the copy that does not fit its image; cutting it would hide the fault",
        LEAVES_OUT,
    ),
    "polygon-over-edge": Kind(WARNING, "cut it at the image's edge, as detectron2 does"),
    "polygon-without-area": Kind(ERROR, "draw it again", LEAVES_OUT),
    "mask-below-a-pixel": Kind(WARNING, "leave it out unless it is an object"),
    "rle-malformed": Kind(
        ERROR, "write {'size': [height, width], 'counts': ...}, as in pycocotools", LEAVES_OUT
    ),
    "rle-size": Kind(ERROR, "encode the mask at the image's size [height, width]", LEAVES_OUT),
    "rle-counts": Kind(
        ERROR, "write whole numbers of 0 or more, starting with the background", LEAVES_OUT
    ),
    "rle-sum": Kind(ERROR, "encode the mask again: the runs must cover the image", LEAVES_OUT),
    "rle-corrupt": Kind(
        ERROR, "encode the mask again, e.g. with pycocotools.mask.encode", LEAVES_OUT
    ),
    "empty-mask": Kind(ERROR, "draw the mask, or leave the annotation out", LEAVES_OUT),
    "crowd-polygon": Kind(
        ERROR,
        "set iscrowd to 0 if it is a single object; otherwise write run lengths (training ignores "
        "crowds)",
        REPAIRS,
    ),
    "mixed-formats": Kind(WARNING, "set INPUT.MASK_FORMAT to bitmask, which reads both"),
}
"""All kinds of findings, by the name that each line of the check shows in brackets."""

KEPT = {
    *("annotation-id-not-positive", "area-invalid", "box-mismatch", "box-negative", "box-outside"),
    *("box-without-area", "crowd-polygon", "duplicate-file-name", "empty-mask", "exif-undecidable"),
    *("id-too-large", "mask-of-another-image", "polygon-outside", "polygon-without-area"),
    "segmentation-empty",
}
"""Kinds of errors in a record that training can use all the same, rightly or wrongly. Records with
other errors would end the run with an exception.
"""
WHOLE_FILE_KEPT = {"categories-disagree", "normalised-coordinates", "num-classes"}
"""Kinds of errors of a whole file that do not end a run."""

SECTION_NAMES = {"images": "image", "annotations": "annotation", "categories": "category"}


@dataclass(frozen=True, slots=True)
class Place:
    """The location of a record: its section, its index in the section, and its ids."""

    section: str = ""
    index: int = -1
    image_id: Any = None
    annotation_id: Any = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault in a data set.

    Attributes:
        kind: a key of KINDS.
        file: the annotation file.
        message: what is wrong.
        image_id: image id in the file; None if the fault does not concern a single image.
        annotation_id: annotation id in the file; None if the fault does not concern a single
            annotation.
        section: ``images``, ``annotations``, ``categories``, or empty for the whole file.
        index: index of the record in its section, from 0; -1 for the whole file.
        right_value: the correct value of the field, if the check knows it.
    """

    kind: str
    file: str
    message: str
    image_id: Any = None
    annotation_id: Any = None
    section: str = ""
    index: int = -1
    right_value: int | str | None = None

    @property
    def severity(self) -> str:
        """One of SEVERITIES."""
        return KINDS[self.kind].severity

    @property
    def is_unusable(self) -> bool:
        """Whether training would fail on the record or the file."""
        kept = KEPT if self.index >= 0 else WHOLE_FILE_KEPT
        return self.severity == ERROR and self.kind not in kept

    @property
    def fix(self) -> str:
        """What to do, and what --fix does about the finding."""
        kind = KINDS[self.kind]
        return f"{kind.fix} ({kind.by_fix})" if kind.by_fix else kind.fix

    @property
    def place(self) -> str:
        """A description of the record's location; empty for the whole file."""
        parts = []
        if self.image_id is not None:
            parts.append(f"image {self.image_id}")
        if self.annotation_id is not None:
            parts.append(f"annotation {self.annotation_id}")
        if not parts and self.section:
            parts.append(f"{self.section}[{self.index}]")
        return ", ".join(parts)

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        return f"{self.file}: {place}{self.message}; {self.fix} [{self.kind}]"

    def as_dict(self) -> dict[str, Any]:
        """Returns the finding as a dict for JSON."""
        names: tuple[str, ...] = ("severity", "kind", "file", "image_id", "annotation_id")
        names += ("message", "fix", "section", "index", "right_value")
        return {name: getattr(self, name) for name in names}


class Findings(list[Finding]):
    """The findings of one annotation file."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def add(
        self,
        kind: str,
        message: str,
        place: Place | None = None,
        right_value: int | str | None = None,
    ) -> None:
        """Adds a finding; without a place, it concerns the whole file."""
        at = place or Place()
        ids = (plain_id(at.image_id), plain_id(at.annotation_id))
        self.append(Finding(kind, self.file, message, *ids, at.section, at.index, right_value))


def quote(value: Any) -> str:
    """Returns the repr of a value as one line, abbreviated if it is long."""
    return _SHORT.repr(value)


def quote_path(path: Any) -> str:
    """Returns the repr of a path as one line, not abbreviated, so that users can find the file."""
    return repr(path) if isinstance(path, str) and len(path) <= LONGEST_PATH else quote(path)


LONGEST_PATH = 4096
"""PATH_MAX on Linux, in characters."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def plain_id(value: Any) -> int | str | None:
    """Returns an id unchanged if it is None or an integer of usual size, otherwise its repr."""
    if value is None or (type(value) is int and abs(value) < 10**30):
        return value
    return quote(value)


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the findings that stop training."""
    return [finding for finding in findings if finding.severity == ERROR]


def count_by_severity(findings: Iterable[Finding]) -> dict[str, int]:
    """Returns the numbers of findings under the keys "errors", "warnings" and "hints"."""
    counts = Counter(finding.severity for finding in findings)
    return {f"{severity}s": counts[severity] for severity in SEVERITIES}


def by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Groups findings by kind, sorted by severity (errors first) and then by frequency."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    order = sorted(groups, key=lambda k: (SEVERITIES.index(KINDS[k].severity), -len(groups[k]), k))
    return {kind: groups[kind] for kind in order}


def summary_table(findings: Iterable[Finding], examples: int = 3) -> str:
    """Returns a table of the kinds of findings, with the first records of each kind."""
    findings = list(findings)
    files = {finding.file for finding in findings}
    rows = []
    for kind, group in by_kind(findings).items():
        places = "; ".join(
            finding.place or (finding.file if len(files) > 1 else "the file")
            for finding in group[:examples]
        )
        more = "; ..." if len(group) > examples else ""
        rows.append([KINDS[kind].severity, kind, len(group), places + more])
    return tabulate(rows, ["severity", "kind", "count", "where"], tablefmt="simple")
