"""A corrected copy of a COCO file: what has one right answer is repaired, the rest is left out.

The check decides: what it calls an error is repaired once; if it is one still, the record is left
out. So the copy passes the check. Every change is listed with its reason.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .check import CheckOptions, check_content, read_content
from .check_records import MAX_ID, check_sections, file_name
from .check_whole import wholesale
from .findings import Finding, Findings, errors_of, plain_id, quote
from .fix_repairs import REPAIRS, Record, Repairs

# Categories first, then images: annotations hang on both.
SECTION_ORDER = ("categories", "images", "annotations")


@dataclass(frozen=True)
class Change:
    """A record that was changed or left out.

    Attributes:
        action: ``changed`` or ``left out``.
        kind: of the finding.
        section: of the record; empty for the whole file.
        index: of the record in the input.
        image_id: as in the input.
        annotation_id: as in the input.
        what: what was done, and why.
    """

    action: str
    kind: str
    section: str
    index: int
    image_id: Any
    annotation_id: Any
    what: str


def fix_coco_file(
    json_file: str, image_root: str, output: Path, options: CheckOptions | None = None
) -> list[Change]:
    """Writes a copy of a COCO file that the check finds no errors in, and a list of the changes.

    Args:
        json_file: the annotations.
        image_root: the folder of the images.
        output: the copy; must not exist. The list is ``<output>.changes.json``.
        options: as of the check.

    Returns:
        The changes.

    Raises:
        ConfigError: if the output exists or cannot be written, or the file has faults that no one
            right answer mends.
    """
    for path in (output, changes_path(output)):
        if path.exists():
            raise ConfigError(f"--fix: {path} exists; name a new file")
    content, changes = _read_leniently(json_file)
    fixer = _Fixer(content, json_file, image_root, options or CheckOptions())
    fixer.run()
    changes += fixer.changes
    listed = json.dumps([asdict(change) for change in changes], indent=1)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        changes_path(output).write_text(listed + "\n", encoding="utf-8")
        unfinished = output.with_name(f"{output.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(output)
    except OSError as error:
        raise ConfigError(f"--fix: {output} cannot be written: {error}") from error
    return changes


def changes_path(output: Path) -> Path:
    """Returns where the changes of a copy are listed."""
    return output.with_name(f"{output.name}.changes.json")


def _read_leniently(json_file: str) -> tuple[Any, list[Change]]:
    """Returns what a file holds, also if it is in another Unicode encoding."""
    found = Findings(json_file)
    content = read_content(json_file, found, compact=False)
    if not found:
        return content, []
    finding = found[0]
    if finding.kind != "json-encoding":
        raise _unfixable(finding)
    data = Path(json_file).read_bytes()
    encoding = json.detect_encoding(data)
    try:
        content = json.loads(data.decode(encoding))
    except (ValueError, RecursionError):
        raise _unfixable(finding) from None
    what = f"read as {encoding}, written as UTF-8: {finding.message}"
    return content, [Change("changed", finding.kind, "", -1, None, None, what)]


def _unfixable(finding: Finding) -> ConfigError:
    return ConfigError(f"--fix cannot mend this: {finding}")


class _Fixer(Repairs):
    """Repairs parsed content in place.

    Attributes:
        changes: what was done.
    """

    def __init__(
        self, content: Any, json_file: str, image_root: str, options: CheckOptions
    ) -> None:
        self.changes: list[Change] = []
        self._content, self._json_file = content, json_file
        self.image_root, self.known_files = image_root, options.known_files
        # How many classes a model has is no fault of the file.
        self._options = CheckOptions(
            None, options.lvis, decode=options.decode, known_files=options.known_files
        )
        self._places: dict[int, tuple[str, int, Any, Any]] = {}
        self._tried: set[tuple[int, str]] = set()
        self._dropped: set[int] = set()

    def run(self) -> None:
        """Repairs and leaves out until the check finds no errors.

        Raises:
            ConfigError: if that cannot be done.
        """
        found = Findings(self._json_file)
        if not check_sections(self._content, found):
            raise _unfixable(found[0])
        for section in SECTION_ORDER:
            self._keep_records(section)
        while errors := self._errors():
            whole = [finding for finding in errors if finding.index < 0]
            if whole:
                raise _unfixable(whole[0])
            if not self.changes and (fault := wholesale(errors, self._content)):
                finding, count = fault
                raise ConfigError(
                    f"--fix: {count} have such faults, so the whole export is wrong, and repairs "
                    f"would hide it: {finding}"
                )
            self._index()
            section = next(s for s in SECTION_ORDER if any(e.section == s for e in errors))
            # One finding of a record at a time: a repair may be of another's cause, or change ids.
            first_of_record = {e.index: e for e in reversed(errors) if e.section == section}
            for index in sorted(first_of_record):
                self._treat(first_of_record[index])
            for section in SECTION_ORDER:
                records = self._content[section]
                records[:] = [x for x in records if id(x) not in self._dropped]

    def _keep_records(self, section: str) -> None:
        """Notes where each record was, and leaves out what is none."""
        for index, record in enumerate(self._content[section]):
            if isinstance(record, dict):
                ids: tuple[Any, Any] = (None, None)
                if section == "images":
                    ids = (record.get("id"), None)
                elif section == "annotations":
                    ids = (record.get("image_id"), record.get("id"))
                self._places[id(record)] = (section, index, plain_id(ids[0]), plain_id(ids[1]))
            else:
                kind = f"{section.removesuffix('s').replace('categorie', 'category')}-not-object"
                what = f"it is {quote(record)}"
                self.changes.append(Change("left out", kind, section, index, None, None, what))
        self._content[section][:] = [x for x in self._content[section] if isinstance(x, dict)]

    def _errors(self) -> list[Finding]:
        found = Findings(self._json_file)
        check_content(self._content, self.image_root, found, self._options)
        return errors_of(found)

    def _index(self) -> None:
        """Notes which records belong together, for this round."""
        self.images = _by_key(self._content["images"], "id")
        self.files = defaultdict(list)
        for image in self._content["images"]:
            self.files[file_name(image, self._options.lvis) or ""].append(image)
        self.annotations = _by_key(self._content["annotations"], "image_id")
        self.members = _by_key(self._content["annotations"], "category_id")
        self.categories = _by_key(self._content["categories"], "id")
        self._taken = {
            section: {x["id"] for x in self._content[section] if type(x.get("id")) is int}
            for section in SECTION_ORDER
        }
        self._last = {
            section: max((i for i in taken if i < MAX_ID // 2), default=0)
            for section, taken in self._taken.items()
        }

    def _treat(self, finding: Finding) -> None:
        record = self._content[finding.section][finding.index]
        attempt = (id(record), finding.kind)
        if id(record) in self._dropped:
            return
        repair = REPAIRS.get((finding.section, finding.kind))
        done = None
        if repair is not None and attempt not in self._tried:
            self._tried.add(attempt)
            done = repair(self, record)
        if done:
            self._list("changed", finding.kind, record, f"{done}: {finding.message}")
        elif id(record) not in self._dropped:
            if finding.section == "categories":
                raise _unfixable(finding)
            self.drop(record, finding.kind, finding.message)

    def drop(self, record: Record, kind: str, reason: str, *, alone: bool = False) -> None:
        self._dropped.add(id(record))
        self._list("left out", kind, record, reason)
        if self._places[id(record)][0] == "images" and not alone:
            for annotation in self.annotations.get(_key(record.get("id")), []):
                if id(annotation) not in self._dropped:
                    self.drop(annotation, kind, f"its image was left out: {reason}")

    def is_dropped(self, record: Record) -> bool:
        return id(record) in self._dropped

    def _list(self, action: str, kind: str, record: Record, what: str) -> None:
        self.changes.append(Change(action, kind, *self._places[id(record)], what))

    def new_id(self, section: str, wanted: Any) -> int:
        taken = self._taken[section]
        number = _as_number(wanted)
        if number is None or number in taken:
            self._last[section] += 1
            while self._last[section] in taken:
                self._last[section] += 1
            number = self._last[section]
        taken.add(number)
        return number


def _as_number(value: Any) -> int | None:
    """Returns the positive number that a text or a float means."""
    text = f"{value:.0f}" if isinstance(value, float) and value.is_integer() else value
    if not isinstance(text, str) or not (text.isascii() and text.isdigit() and len(text) < 16):
        return None
    return int(text) or None


def _key(value: Any) -> Hashable:
    return value if isinstance(value, Hashable) else quote(value)


def _by_key(records: list[Record], key: str) -> dict[Hashable, list[Record]]:
    groups: dict[Hashable, list[Record]] = defaultdict(list)
    for record in records:
        groups[_key(record.get(key))].append(record)
    return dict(groups)
