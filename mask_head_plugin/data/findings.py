"""What a data set check finds: one line a fault, with the file, the ids, the fault and the fix."""

from __future__ import annotations

import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tabulate import tabulate

ERROR, WARNING, HINT = SEVERITIES = ("error", "warning", "hint")
"""An error stops training. A warning does not: either detectron2 handles it rightly (COCO 2017 has
a box without height and polygons that leave the image by a rounding), or it trains or measures
something that the author may not have meant. A hint is worth knowing and needs no action."""


class Kind(NamedTuple):
    severity: str
    fix: str


_SEE_MASK = "take the box around the mask: [x, y, width, height] (--fix does)"
_REMOVE_IMAGE = "put the right file there, or leave the image out (--fix does)"
_EXPORT = "export the file again"

KINDS: dict[str, Kind] = {
    # The file.
    "json-missing": Kind(ERROR, "give the path of a COCO instances file"),
    "json-empty": Kind(ERROR, f"{_EXPORT}; was the disk full?"),
    "json-encoding": Kind(ERROR, "save it as UTF-8 without a byte order mark (--fix does)"),
    "json-truncated": Kind(ERROR, "copy or export it again; it ends too early"),
    "json-syntax": Kind(ERROR, "correct it there, or export the file again"),
    "git-lfs-pointer": Kind(ERROR, "run `git lfs pull` where you cloned the data set"),
    "not-a-coco-file": Kind(ERROR, "convert it to COCO instances format"),
    "json-not-object": Kind(ERROR, "the file must be {'images': ..., 'annotations': ..., ...}"),
    "missing-section": Kind(ERROR, f"{_EXPORT} in COCO instances format"),
    "no-images": Kind(ERROR, "list the images of the data set"),
    "no-annotations": Kind(ERROR, "annotate, or name the file that has the annotations"),
    "only-crowds": Kind(ERROR, "set iscrowd to 0 if these are single objects"),
    "no-masks": Kind(ERROR, "set MODEL.MASK_ON False to train boxes alone, or export the masks"),
    "no-categories": Kind(ERROR, "list the categories"),
    "image-folder-missing": Kind(ERROR, "give the folder that file_name starts from"),
    "normalised-coordinates": Kind(ERROR, "multiply by the image's width and height, in pixels"),
    "category-ids-shifted": Kind(ERROR, "number categories and annotations alike"),
    "repeated-annotation": Kind(WARNING, "see whether objects were exported twice"),
    "crowd-by-export": Kind(
        WARNING, "set iscrowd to 0 if these are single objects: CVAT writes brush masks so"
    ),
    "area-suspicious": Kind(WARNING, "write the number of pixels of each mask into area"),
    "area-of-box": Kind(WARNING, "write the number of pixels of each mask into area"),
    "ring-as-hole": Kind(WARNING, "write masks with holes as run lengths"),
    "mask-on-several-images": Kind(
        WARNING, "delete the copies that do not fit their image, as of a track left on in CVAT"
    ),
    "image-without-objects": Kind(
        WARNING, "set DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on these images, too"
    ),
    "image-in-both-splits": Kind(WARNING, "keep all of a photograph in one of the two"),
    "unused-category": Kind(HINT, "leave it out if the model needs no row for it"),
    # Ids, of all records.
    "id-not-integer": Kind(ERROR, "ids are whole numbers without quotes (--fix renumbers)"),
    "id-as-text": Kind(ERROR, "write the id as a number, without quotes (--fix does)"),
    "id-too-large": Kind(ERROR, "use ids below 2^53, which metrics can hold (--fix renumbers)"),
    # Categories.
    "category-not-object": Kind(ERROR, "write {'id': 1, 'name': 'cat'} (--fix leaves it out)"),
    "category-missing-key": Kind(ERROR, "give each category an id and a name"),
    "category-name": Kind(ERROR, "give the category a name, as text"),
    "background-category": Kind(WARNING, "leave these annotations out unless they are objects"),
    "duplicate-category-id": Kind(ERROR, "give each category an id of its own"),
    "duplicate-category-name": Kind(ERROR, "make them one category (--fix does), or rename one"),
    "category-id-range": Kind(ERROR, "LVIS needs the category ids 1 to the number of categories"),
    "num-classes": Kind(ERROR, "set MODEL.ROI_HEADS.NUM_CLASSES to the number of categories"),
    "categories-disagree": Kind(ERROR, "make category ids and names the same in both files"),
    "rle-needs-bitmask": Kind(ERROR, "set INPUT.MASK_FORMAT to bitmask"),
    # Image records.
    "image-not-object": Kind(ERROR, "write {'id': ..., 'file_name': ...} (--fix leaves it out)"),
    "image-missing-key": Kind(ERROR, "add it (--fix reads height and width from the file)"),
    "duplicate-image-id": Kind(ERROR, "give each image an id of its own, also in its annotations"),
    "image-size-invalid": Kind(ERROR, "write whole numbers above 0 (--fix reads the file's)"),
    "image-too-large": Kind(ERROR, "cut the image into tiles, or make it smaller"),
    "file-name-invalid": Kind(ERROR, "write the path of the file within the image folder, as text"),
    "file-name-outside": Kind(ERROR, "write it relative to the image folder, without '..'"),
    "duplicate-file-name": Kind(ERROR, "list each file once, with all annotations (--fix does)"),
    # Image files.
    "image-file-missing": Kind(ERROR, _REMOVE_IMAGE),
    "image-file-elsewhere": Kind(ERROR, "write that name into file_name (--fix does)"),
    "image-file-is-folder": Kind(ERROR, _REMOVE_IMAGE),
    "image-file-empty": Kind(ERROR, _REMOVE_IMAGE),
    "image-unreadable": Kind(ERROR, _REMOVE_IMAGE),
    "image-truncated": Kind(ERROR, _REMOVE_IMAGE),
    "image-depth": Kind(ERROR, "scale it to 8 bits: detectron2 would cut all above 255 to white"),
    "image-animated": Kind(WARNING, "see that the annotations are of the first frame"),
    "image-size-mismatch": Kind(ERROR, "annotate the file in use, or put the annotated file there"),
    "image-size-alike": Kind(ERROR, "take height and width from the file (--fix does)"),
    "image-transposed": Kind(ERROR, "exchange width and height if the annotations fit the file"),
    "exif-size": Kind(
        ERROR, "turn the pixels by the tag and annotate them so, or remove the tag from the file"
    ),
    "exif-undecidable": Kind(
        ERROR, "look whether the annotations fit; then write the pixels as they fit, without tag"
    ),
    # Annotation records.
    "annotation-not-object": Kind(ERROR, "write a COCO annotation (--fix leaves it out)"),
    "annotation-missing-key": Kind(ERROR, "add it; evaluation and training need it"),
    "duplicate-annotation-id": Kind(ERROR, "give each annotation an id of its own (--fix does)"),
    "annotation-id-not-positive": Kind(
        ERROR, "number annotations from 1 (--fix does): COCO's metric takes 0 for 'unmatched'"
    ),
    "unknown-image": Kind(ERROR, "add the image, or leave the annotation out (--fix does)"),
    "unknown-category": Kind(ERROR, "add the category, or leave the annotation out (--fix does)"),
    "iscrowd-invalid": Kind(ERROR, "write 0 for an object, 1 for a crowd region"),
    "area-invalid": Kind(ERROR, "write the mask's number of pixels (--fix does)"),
    "ignore-flag": Kind(ERROR, "detectron2 refuses it: leave the annotation out (--fix does)"),
    "keypoints-invalid": Kind(
        ERROR, "write x, y and visibility of each point in one list (--fix leaves them out)"
    ),
    # Boxes.
    "box-malformed": Kind(ERROR, _SEE_MASK),
    "box-not-finite": Kind(ERROR, _SEE_MASK),
    "box-negative": Kind(ERROR, _SEE_MASK),
    "box-without-area": Kind(ERROR, _SEE_MASK),
    "box-outside": Kind(ERROR, _SEE_MASK),
    "box-mismatch": Kind(ERROR, _SEE_MASK),
    "box-loose": Kind(WARNING, _SEE_MASK + " if that is not meant"),
    "flat-object": Kind(WARNING, "leave it out; detectron2 does"),
    # Masks.
    "segmentation-type": Kind(ERROR, "write polygons or run lengths (--fix leaves it out)"),
    "segmentation-empty": Kind(ERROR, "draw the mask, or leave the annotation out (--fix does)"),
    "polygons-not-nested": Kind(
        ERROR, "write a list of polygons: [[x, y, x, y, ...]] (--fix does)"
    ),
    "polygon-of-points": Kind(ERROR, "write [x, y, x, y, ...] without inner lists (--fix does)"),
    "polygon-empty": Kind(ERROR, "leave that part out (--fix does)"),
    "polygon-odd": Kind(ERROR, "write x and y of each point (--fix leaves the part out)"),
    "polygon-short": Kind(ERROR, "write at least 3 points (--fix leaves the part out)"),
    "polygon-not-numbers": Kind(ERROR, "write numbers without quotes (--fix leaves it out)"),
    "polygon-not-finite": Kind(ERROR, "draw it again (--fix leaves it out)"),
    "polygon-outside": Kind(ERROR, "cut it at the image's edge (--fix does)"),
    "mask-of-another-image": Kind(
        ERROR, "delete the copy that does not fit its image; cutting it would hide the fault"
    ),
    "polygon-over-edge": Kind(WARNING, "cut it at the image's edge, where detectron2 cuts it"),
    "polygon-without-area": Kind(ERROR, "draw it again (--fix leaves it out)"),
    "mask-below-a-pixel": Kind(WARNING, "leave it out if it is no object"),
    "rle-malformed": Kind(ERROR, "write {'size': [height, width], 'counts': ...}, as pycocotools"),
    "rle-size": Kind(ERROR, "encode the mask at the image's size [height, width]"),
    "rle-counts": Kind(ERROR, "write whole numbers from 0, background first"),
    "rle-sum": Kind(ERROR, "encode the mask again: the runs must cover the image"),
    "rle-corrupt": Kind(ERROR, "encode the mask again, e.g. with pycocotools.mask.encode"),
    "empty-mask": Kind(ERROR, "draw the mask, or leave the annotation out (--fix does)"),
    "crowd-polygon": Kind(
        ERROR, "iscrowd 0 if it is one object, else run lengths (--fix): crowds are not trained on"
    ),
    "mixed-formats": Kind(WARNING, "set INPUT.MASK_FORMAT to bitmask, which reads both"),
}
"""All kinds of fault, each with its severity and what to do."""

SECTION_NAMES = {"images": "image", "annotations": "annotation", "categories": "category"}


@dataclass(frozen=True, slots=True)
class Place:
    """A record: its section, where it is in it, and the ids that it has."""

    section: str = ""
    index: int = -1
    image_id: Any = None
    annotation_id: Any = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault of a data set.

    Attributes:
        kind: of KINDS.
        file: the annotation file.
        message: what is wrong.
        image_id: as in the file, None if it is of no single image.
        annotation_id: likewise.
        section: ``images``, ``annotations``, ``categories``, or empty for the whole file.
        index: of the record in its section, from 0; -1 for the whole file.
        right_value: what the field should hold, where the check knows it.
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
    def fix(self) -> str:
        """What to do."""
        return KINDS[self.kind].fix

    @property
    def place(self) -> str:
        """Which record, in words."""
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
        """Returns all of it, for JSON."""
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
        """Notes a finding of a kind of KINDS, of the whole file if no place is given."""
        at = place or Place()
        ids = (plain_id(at.image_id), plain_id(at.annotation_id))
        self.append(Finding(kind, self.file, message, *ids, at.section, at.index, right_value))


def quote(value: Any) -> str:
    """Returns a value as in code, in one line and cut if it is long."""
    return _SHORT.repr(value)


def quote_path(path: Any) -> str:
    """Returns a path as in code, in one line and whole: a cut one cannot be looked up."""
    return repr(path) if isinstance(path, str) and len(path) <= LONGEST_PATH else quote(path)


LONGEST_PATH = 4096
"""Characters: PATH_MAX of Linux."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def plain_id(value: Any) -> int | str | None:
    """Returns an id as it is, or quoted if it is neither a number nor None."""
    if value is None or (type(value) is int and abs(value) < 10**30):
        return value
    return quote(value)


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    """Returns those that stop training."""
    return [finding for finding in findings if finding.severity == ERROR]


def count_by_severity(findings: Iterable[Finding]) -> dict[str, int]:
    """Returns how many errors, warnings and hints there are, under these plurals."""
    counts = Counter(finding.severity for finding in findings)
    return {f"{severity}s": counts[severity] for severity in SEVERITIES}


def by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Returns findings by kind: errors first, hints last, then by falling number."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    order = sorted(groups, key=lambda k: (SEVERITIES.index(KINDS[k].severity), -len(groups[k]), k))
    return {kind: groups[kind] for kind in order}


def summary_table(findings: Iterable[Finding], examples: int = 3) -> str:
    """Returns a table of the kinds that were found, with the first records of each."""
    rows = []
    for kind, group in by_kind(findings).items():
        places = "; ".join(finding.place or "the file" for finding in group[:examples])
        more = "; ..." if len(group) > examples else ""
        rows.append([KINDS[kind].severity, kind, len(group), places + more])
    return tabulate(rows, ["severity", "kind", "count", "where"], tablefmt="simple")
