"""Faults that only a file as a whole shows: its units, the numbering of its classes, repetitions.

They have no one right answer, so a corrected copy is refused.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from .findings import Finding, Findings

FEW = 10
"""Records with a fault that may be chance; more, and over WHOLESALE_SHARE of all, are none."""
WHOLESALE_SHARE = 1 / 3

WHOLESALE_KINDS = {
    *("box-mismatch", "box-outside", "box-negative", "polygon-outside", "polygon-not-finite"),
    *("rle-size", "rle-sum", "rle-corrupt", "image-file-missing", "image-size-mismatch"),
    *("unknown-image", "unknown-category"),
}
"""Repairs of these are right for one record, but hide what is wrong with an export."""


def check_whole(
    content: dict[str, list[Any]], category_ids: Iterable[Any], found: Findings
) -> None:
    """Looks for faults that are in all records of a file.

    Args:
        content: its sections.
        category_ids: of its categories.
        found: gets the findings.
    """
    annotations = [x for x in content["annotations"] if isinstance(x, dict)]
    for what, numbers in (("boxes", _boxes(annotations)), ("polygons", _polygons(annotations))):
        if _within_one(numbers):
            found.add("normalised-coordinates", f"the {what} all lie between 0 and 1")
    _check_shift(annotations, category_ids, found)
    _check_repetitions(annotations, found)


def wholesale(errors: list[Finding], content: dict[str, list[Any]]) -> tuple[Finding, str] | None:
    """Returns an error of a kind that too many records of a section have to repair them singly.

    Args:
        errors: of a check.
        content: the sections that were checked.

    Returns:
        The first one, and how many of how many records have such a one; None if they are few.
    """
    for section in ("images", "annotations"):
        faulty = [x for x in errors if x.section == section and x.kind in WHOLESALE_KINDS]
        count, total = len({x.index for x in faulty}), len(content[section])
        if count >= FEW and count > WHOLESALE_SHARE * total:
            return faulty[0], f"{count} of {total} {section}"
    return None


def _boxes(annotations: list[dict[str, Any]]) -> Iterator[Any]:
    return (x["bbox"] for x in annotations if x.get("bbox"))


def _polygons(annotations: list[dict[str, Any]]) -> Iterator[Any]:
    for annotation in annotations:
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list):
            yield from polygons


def _within_one(lists: Iterator[Any]) -> bool:
    """Whether there are many lists of numbers, all between 0 and 1. Most files end it at once."""
    count = 0
    for numbers in lists:
        try:
            if not 0 <= min(numbers) <= max(numbers) <= 1:
                return False
        except (TypeError, ValueError):  # faults of its own
            continue
        count += 1
    return count >= FEW


def _check_shift(
    annotations: list[dict[str, Any]], category_ids: Iterable[Any], found: Findings
) -> None:
    known = {i for i in category_ids if type(i) is int}
    used = {i for x in annotations if type(i := x.get("category_id")) is int}
    for shift in (1, -1):
        if len(used) > 1 and not used <= known and {i + shift for i in used} <= known:
            found.add(
                "category-ids-shifted",
                f"annotations use the categories {min(used)} to {max(used)}, the file lists "
                f"{min(known)} to {max(known)}",
            )


def _check_repetitions(annotations: list[dict[str, Any]], found: Findings) -> None:
    first: dict[Hashable, Any] = {}
    repeated: list[tuple[Any, Any]] = []
    for x in annotations:
        box = x.get("bbox")
        key = (x.get("image_id"), x.get("category_id"), tuple(box) if type(box) is list else None)
        try:
            before = first.setdefault(key, x.get("id"))
        except TypeError:  # not hashable: a fault of its own
            continue
        if before != x.get("id") and key[2]:
            repeated.append((before, x.get("id")))
    if repeated:
        found.add(
            "repeated-annotation",
            f"{len(repeated)} annotations have the image, category and box of another one, such as "
            f"{repeated[0][1]} of {repeated[0][0]}",
        )
