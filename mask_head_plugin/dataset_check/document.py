"""A parsed COCO file under repair: its records, indexes of related records, and the changes.

Shape alphabet: H, W sides of an image.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from .check import CheckOptions
from .findings import Finding, plain_id, quote
from .images import ImageFacts
from .masks import Box, checked_mask
from .records import MAX_ID, file_name

Record = dict[str, Any]

# Categories first, then images, because annotations refer to both.
SECTION_ORDER = ("categories", "images", "annotations")

DISTORTING = {"polygon-outside", "polygon-odd", "crowd-polygon"}
"""Kinds of findings whose repair loses pixels of a mask, or guesses what only the author knows."""


@dataclass(frozen=True)
class Change:
    """A record that was changed or left out.

    Attributes:
        action: ``changed`` or ``left out``.
        kind: kind of the finding.
        section: section of the record; empty for the whole file.
        index: index of the record in the input.
        image_id: image id in the input.
        annotation_id: annotation id in the input.
        what: what was done and why.
    """

    action: str
    kind: str
    section: str
    index: int
    image_id: Any
    annotation_id: Any
    what: str


class Document:
    """The data that repairs read and change.

    Args:
        content: the sections, which are lists of objects; changed in place.
        image_root: the image folder.
        options: options of the check.

    Attributes:
        counts: number of records in each section of the input.
        changes: list of changes.
        losses: findings for which a record was dropped or lost pixels of its mask, by section and
            index in the input. Records that are merged into another, and annotations of a lost
            image, do not count as losses.
        images: image records by id.
        files: image records by normalised file name.
        annotations: annotations by image id.
        members: annotations by category id.
        categories: categories by id.
        finding: the finding that is being repaired.
    """

    finding: Finding

    def __init__(self, content: dict[str, Any], image_root: str, options: CheckOptions) -> None:
        self.content, self.image_root, self.options = content, image_root, options
        self.counts = {section: len(content[section]) for section in SECTION_ORDER}
        self.changes: list[Change] = []
        self.losses: dict[str, dict[int, Finding]] = {section: {} for section in SECTION_ORDER}
        self._places: dict[int, tuple[str, int, Any, Any]] = {}
        self._dropped: set[int] = set()
        for section in SECTION_ORDER:
            self._keep_objects(section)
        self.index()

    def _keep_objects(self, section: str) -> None:
        """Stores the place of each record, and drops entries that are not objects."""
        singular = {"categories": "category", "images": "image", "annotations": "annotation"}
        for index, record in enumerate(self.content[section]):
            if isinstance(record, dict):
                ids: tuple[Any, Any] = (None, None)
                if section == "images":
                    ids = (record.get("id"), None)
                elif section == "annotations":
                    ids = (record.get("image_id"), record.get("id"))
                self._places[id(record)] = (section, index, plain_id(ids[0]), plain_id(ids[1]))
            else:
                kind, what = f"{singular[section]}-not-object", f"it is {quote(record)}"
                self.changes.append(Change("left out", kind, section, index, None, None, what))
        self.content[section][:] = [x for x in self.content[section] if isinstance(x, dict)]

    def index(self) -> None:
        """Updates the indexes of related records."""
        content, lvis = self.content, self.options.lvis
        self.images = _by_key(content["images"], "id")
        self.files: dict[str, list[Record]] = defaultdict(list)
        for image in content["images"]:
            self.files[file_name(image, lvis) or ""].append(image)
        self.annotations = _by_key(content["annotations"], "image_id")
        self.members = _by_key(content["annotations"], "category_id")
        self.categories = _by_key(content["categories"], "id")
        self._taken = {
            section: {x["id"] for x in content[section] if type(x.get("id")) is int}
            for section in SECTION_ORDER
        }
        self._last = {
            section: max((i for i in taken if i < MAX_ID // 2), default=0)
            for section, taken in self._taken.items()
        }

    def remove_dropped(self) -> None:
        """Removes dropped records from the content."""
        for section in SECTION_ORDER:
            records = self.content[section]
            records[:] = [x for x in records if id(x) not in self._dropped]

    def facts(self, image: Record) -> ImageFacts | None:
        """Returns the facts about an image's file; None if the file cannot be used."""
        # The keys are paths as built by records_and_files.listed_images.
        path = os.path.join(self.image_root, str(image.get("file_name")))  # noqa: PTH118  # as there
        facts = self.options.known_files.get(path)
        return None if facts is None or facts.problem else facts

    def image_hw(self, annotation: Record) -> tuple[int, int] | None:
        """Returns the size of an annotation's image; None if the image is not listed."""
        image_id = annotation.get("image_id")
        images = self.images.get(image_id) if isinstance(image_id, Hashable) else None
        return (images[0]["height"], images[0]["width"]) if images else None

    def mask(self, annotation: Record) -> tuple[Box, Any] | None:
        """Returns the box around a valid mask, clipped to the image, and the mask's run lengths."""
        image_hw = self.image_hw(annotation)
        return None if image_hw is None else checked_mask(annotation, image_hw)

    def drop(self, record: Record, reason: str, *, merged: bool = False) -> None:
        """Leaves out a record.

        Args:
            record: the record. If it is an image that is not merged, its annotations are left out
                as well.
            reason: text for the list of changes.
            merged: whether another record keeps the content of this one, so that nothing is lost.
        """
        section, index, *_ = self._places[id(record)]
        self._dropped.add(id(record))
        self._list("left out", record, reason)
        if merged:
            return
        self.losses[section][index] = self.finding
        if section == "images":
            for annotation in self.annotations.get(_key(record.get("id")), []):
                if id(annotation) not in self._dropped:
                    self._dropped.add(id(annotation))
                    self._list("left out", annotation, f"its image was left out: {reason}")

    def is_dropped(self, record: Record) -> bool:
        """Returns whether a record was left out."""
        return id(record) in self._dropped

    def note_change(self, record: Record, what: str) -> None:
        """Adds a changed record to the list of changes."""
        self._list("changed", record, f"{what}: {self.finding.message}")
        if self.finding.kind in DISTORTING:
            section, index, *_ = self._places[id(record)]
            self.losses[section].setdefault(index, self.finding)

    def _list(self, action: str, record: Record, what: str) -> None:
        self.changes.append(Change(action, self.finding.kind, *self._places[id(record)], what))

    def new_id(self, section: str, wanted: Any) -> int:
        """Returns an unused id: the number that ``wanted`` represents, or else the next number."""
        taken = self._taken[section]
        number = _as_number(wanted)
        if number is None or number in taken or (number == 0 and section == "annotations"):
            self._last[section] += 1
            while self._last[section] in taken:
                self._last[section] += 1
            number = self._last[section]
        taken.add(number)
        return number


def _as_number(value: Any) -> int | None:
    """Returns the non-negative integer that a string or a float represents, or None."""
    text = f"{value:.0f}" if isinstance(value, float) and value.is_integer() else value
    if not isinstance(text, str) or not (text.isascii() and text.isdigit() and len(text) < 16):
        return None
    return int(text)


def _key(value: Any) -> Hashable:
    return value if isinstance(value, Hashable) else quote(value)


def _by_key(records: list[Record], key: str) -> dict[Hashable, list[Record]]:
    groups: dict[Hashable, list[Record]] = defaultdict(list)
    for record in records:
        groups[_key(record.get(key))].append(record)
    return dict(groups)
