"""Finds faults that are visible only in a file as a whole: units, class numbers, repetitions.

Most of these faults have no single right repair, so --fix refuses to write a corrected copy.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from ..messages import listed
from .findings import Findings, quote
from .records import listed_id

FEW = 10
"""If fewer records than this have a fault, it may be chance."""


def check_whole(
    content: dict[str, list[Any]], categories: Mapping[Hashable, str], found: Findings
) -> None:
    """Adds findings about the file as a whole, such as categories without annotations.

    Args:
        content: the sections of the file.
        categories: names by id.
        found: list to which findings are added.
    """
    annotations = [x for x in content["annotations"] if isinstance(x, dict)]
    for what, numbers in (("boxes", _boxes(annotations)), ("polygons", polygons_of(annotations))):
        if within_one(numbers):
            found.add("normalised-coordinates", f"the {what} all lie between 0 and 1")
    _check_shift(annotations, categories, found)
    _check_use(annotations, categories, found)
    _check_repetitions(annotations, found)


def _boxes(annotations: list[dict[str, Any]]) -> Iterator[Any]:
    return (x["bbox"] for x in annotations if x.get("bbox"))


def polygons_of(annotations: list[dict[str, Any]]) -> Iterator[Any]:
    """Yields the polygons of all masks."""
    for annotation in annotations:
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list):
            yield from polygons


def within_one(lists: Iterator[Any]) -> bool:
    """Returns whether all numbers are between 0 and 1, in at least FEW lists."""
    count = 0
    for numbers in lists:
        try:
            if not 0 <= min(numbers) <= max(numbers) <= 1:
                return False
        except (TypeError, ValueError):  # reported elsewhere
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
                f"annotations use category ids from {min(used)} to {max(used)}, but the file lists "
                f"ids from {min(known)} to {max(known)}",
            )


def _check_use(
    annotations: list[dict[str, Any]], categories: Mapping[Hashable, str], found: Findings
) -> None:
    """Reports categories without annotations, and annotations of a background category."""
    used = {listed_id(x.get("category_id"), categories) for x in annotations} - {None}
    unused = [name for i, name in categories.items() if i not in used]
    if used and unused:  # otherwise the ids are wrong
        found.add(
            "unused-category",
            f"{len(unused)} of {len(categories)} categories have no annotations: "
            f"{listed(list(map(quote, unused)))}",
        )
    for i, name in categories.items():
        if i in used and name.strip("_ ").lower() == "background":
            message = f"category {quote(i)} is {quote(name)}, a class that models already include"
            found.add("background-category", message)


def _check_repetitions(annotations: list[dict[str, Any]], found: Findings) -> None:
    first: dict[Hashable, Any] = {}
    repeated: list[tuple[Any, Any]] = []
    for x in annotations:
        box = x.get("bbox")
        key = (x.get("image_id"), x.get("category_id"), tuple(box) if type(box) is list else None)
        try:
            before = first.setdefault(key, x.get("id"))
        except TypeError:  # not hashable, which is reported elsewhere
            continue
        if before != x.get("id") and key[2]:
            repeated.append((before, x.get("id")))
    if repeated:
        found.add(
            "repeated-annotation",
            f"{len(repeated)} annotations have the same image, category and box as another "
            f"annotation, such as {repeated[0][1]} and {repeated[0][0]}",
        )
