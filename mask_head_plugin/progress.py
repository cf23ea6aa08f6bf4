"""Shows progress and the remaining time: as a bar in a terminal, as occasional lines in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_IN_FILES = 10.0
"""Seconds before the first line and between lines if progress is written to a file or a pipe."""


def progress(
    items: Iterable[T], what: str, unit: str = "it", total: int | None = None
) -> Iterator[T]:
    """Yields the items and shows how many are done; the bar disappears at the end.

    Args:
        items: the items to process.
        what: description of the work, shown before the bar.
        unit: name of one item.
        total: number of items, if ``items`` has no length.
    """
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_IN_FILES
    delay = 0.0 if sys.stderr.isatty() else SECONDS_IN_FILES
    bar = tqdm(
        items, what, total, unit=unit, leave=False, mininterval=seconds, delay=delay, miniters=1
    )
    yield from bar
