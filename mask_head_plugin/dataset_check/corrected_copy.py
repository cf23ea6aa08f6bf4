"""Writes a corrected copy of a COCO file: repairs clear faults and drops other faulty records.

Each error that the check finds is repaired if there is only one right repair. Otherwise, or if the
check finds it again, the record is dropped. The copy therefore passes the check. Every change is
listed with its reason.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .check import CheckOptions, Facts, check_content, read_content
from .document import SECTION_ORDER, Change, Document
from .export_repairs import (
    AREA_KINDS,
    BOX_KINDS,
    refusal,
    refuse_losses,
    repair_areas,
    repair_boxes,
    repair_normalised_boxes,
)
from .findings import Finding, Findings, errors_of
from .image_folders import join_folders
from .new_files import refuse_existing, write_new_files
from .record_repairs import REPAIRS
from .records import check_sections


def fix_coco_file(
    json_file: str,
    image_root: str | Sequence[str],
    output: Path,
    options: CheckOptions | None = None,
    *,
    accepted: Collection[str] = (),
    crowds_are_objects: bool = False,
) -> list[Change]:
    """Writes a copy of a COCO file that passes the check, and a list of the changes.

    Args:
        json_file: the annotations.
        image_root: the image folder, or several folders. With several folders, file names in the
            copy are relative to their common parent.
        output: the copy; must not exist. The list of changes is ``<output>.changes.json``.
        options: options of the check.
        accepted: kinds of findings for which any number of records may be dropped. If findings of
            other kinds would cost too many records, no copy is written.
        crowds_are_objects: whether annotations with ``iscrowd`` 1 are single objects.

    Returns:
        The changes.

    Raises:
        ConfigError: if the output exists or cannot be written, or if the file has faults that have
            no single right repair.
    """
    refuse_existing((output, changes_path(output)), "--fix")
    content, changes = _read_leniently(json_file)
    found = Findings(json_file)
    if not check_sections(content, found):
        raise _unfixable(found[0])
    options = options or CheckOptions()
    root = join_folders(content, image_root)
    if not isinstance(image_root, str) and len(image_root) > 1:
        what = f"file_name is now relative to {root}: use this image folder for training"
        changes.append(Change("changed", "image-file-elsewhere", "", -1, None, None, what))
    # If a model has a different number of classes, that is not a fault of the file.
    document = Document(content, root, dataclasses.replace(options, num_classes=None))
    repair(document, json_file, accepted, crowds_are_objects=crowds_are_objects)
    changes += document.changes
    listed = json.dumps([dataclasses.asdict(change) for change in changes], indent=1)
    write_new_files({changes_path(output): listed + "\n", output: json.dumps(content)}, "--fix")
    return changes


def changes_path(output: Path) -> Path:
    """Returns the path of the list of changes."""
    return output.with_name(f"{output.name}.changes.json")


def _read_leniently(json_file: str) -> tuple[Any, list[Change]]:
    """Returns a file's content, even if it is not in UTF-8, and the change of encoding, if any."""
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
    return ConfigError(f"--fix cannot repair this: {finding}")


def repair(
    document: Document, json_file: str, accepted: Collection[str], *, crowds_are_objects: bool
) -> None:
    """Repairs and drops records until the check finds no errors, and then corrects areas.

    Args:
        document: changed in place.
        json_file: name of the file, for messages.
        accepted: kinds of findings for which any number of records may be dropped.
        crowds_are_objects: whether to change ``iscrowd`` from 1 to 0.

    Raises:
        ConfigError: if the file cannot be repaired.
    """
    if crowds_are_objects:
        _make_objects(document, json_file)
    tried: set[tuple[int, str]] = set()
    boxes_are_left = True
    while errors := errors_of((checked := _check(document, json_file))[0]):
        document.index()
        whole = [x for x in errors if x.index < 0]
        if whole:
            _repair_whole(document, whole)
            continue
        section = next(s for s in SECTION_ORDER if any(x.section == s for x in errors))
        faults = [x for x in errors if x.section == section]
        # Boxes come last, because judging them requires valid masks.
        others = [x for x in faults if x.kind not in BOX_KINDS]
        if not others and boxes_are_left:
            boxes_are_left = False
            if repair_boxes(document, faults, accepted):
                continue
        faults = others or faults
        # One finding per record at a time, because a repair can also resolve other findings, or
        # change ids.
        first_of_record = {x.index: x for x in reversed(faults)}
        for index in sorted(first_of_record):
            _treat(document, first_of_record[index], tried)
        document.remove_dropped()
    found, facts = checked
    for finding in found:
        if finding.kind in AREA_KINDS:
            repair_areas(document, finding, facts.wrong_areas[finding.kind])
    refuse_losses(document, accepted)


def _make_objects(document: Document, json_file: str) -> None:
    for index, annotation in enumerate(document.content["annotations"]):
        if annotation.get("iscrowd") == 1:
            message = "iscrowd was 1, and --crowds-are-objects is set"
            document.finding = Finding(
                "crowd-by-export", json_file, message, section="annotations", index=index
            )
            annotation["iscrowd"] = 0
            document.note_change(annotation, "iscrowd is now 0")


def _check(document: Document, json_file: str) -> tuple[Findings, Facts]:
    found = Findings(json_file)
    facts = check_content(document.content, document.image_root, found, document.options)
    return found, facts


def _repair_whole(document: Document, findings: list[Finding]) -> None:
    """Repairs a fault of the whole file.

    Raises:
        ConfigError: if there is no repair, or the fault results from dropped records.
    """
    for finding in findings:
        if finding.kind == "normalised-coordinates" and repair_normalised_boxes(document, finding):
            return
    losses = [x for section in SECTION_ORDER for x in document.losses[section].values()]
    if losses:
        raise refusal(document, losses, f"After that, {findings[0].message}.")
    raise _unfixable(findings[0])


def _treat(document: Document, finding: Finding, tried: set[tuple[int, str]]) -> None:
    record = document.content[finding.section][finding.index]
    if document.is_dropped(record):
        return
    document.finding = finding
    repair, attempt = REPAIRS.get((finding.section, finding.kind)), (id(record), finding.kind)
    done = None
    if repair is not None and attempt not in tried:
        tried.add(attempt)
        done = repair(document, record)
    if done:
        document.note_change(record, done)
    elif not document.is_dropped(record):
        if finding.section == "categories":
            raise _unfixable(finding)
        document.drop(record, finding.message)
