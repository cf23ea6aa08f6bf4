"""Progress with the time that is left: a bar in a terminal, some lines in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_IN_FILES = 10.0
"""Between two states of a bar that is written to a file or a pipe, the first one too."""


def progress(
    items: Iterable[T], what: str, unit: str = "it", total: int | None = None
) -> Iterator[T]:
    """Yields the items and shows how many are done; a bar goes away when all are.

    Args:
        items: what is worked on.
        what: is done with them.
        unit: what they are.
        total: how many, where ``items`` has no length.
    """
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_IN_FILES
    delay = 0.0 if sys.stderr.isatty() else SECONDS_IN_FILES
    bar = tqdm(
        items, what, total, unit=unit, leave=False, mininterval=seconds, delay=delay, miniters=1
    )
    yield from bar
