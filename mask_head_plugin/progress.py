"""Shows progress and the remaining time: as a bar in a terminal, or as lines in a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
Advance = Callable[[int], object]
"""A function that takes the number of newly finished items."""

SECONDS_IN_FILES = 10.0
"""Minimum number of seconds before each line if stderr is a file or a pipe."""
SHARE_IN_FILES = 0.05
"""Minimum time before the next line, as a share of the elapsed time, so that logs stay short."""
SMOOTHING = 0.05
"""Weight of the latest speed in the estimate of the remaining time. With 0, only the mean speed
counts; with 1, only the latest speed.
"""


def progress(
    items: Iterable[T], what: str, unit: str = "it", total: int | None = None
) -> Iterator[T]:
    """Yields the items and shows how many are done. The bar disappears at the end.

    Args:
        items: the items to process.
        what: description of the work, shown before the bar.
        unit: name of one item.
        total: number of items. None uses the length of ``items``, if it has one.
    """
    known = len(items) if isinstance(items, Sized) and total is None else total
    with progress_bar(what, unit, known) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def progress_bar(
    what: str, unit: str = "it", total: int | None = None, done: int = 0
) -> Iterator[Advance]:
    """Shows progress that does not advance one item at a time; see ``progress``.

    Args:
        what: description of the work.
        unit: name of one item.
        total: number of items; None if unknown.
        done: number of items that were finished earlier. They do not affect the remaining time.

    Yields:
        A function to call with the number of newly finished items.
    """
    if not sys.stderr.isatty():
        yield _Lines(what, unit, total, done).advance
        return
    with tqdm(
        desc=what,
        total=total,
        leave=False,
        miniters=1,
        unit=unit,
        smoothing=SMOOTHING,
        initial=done,
    ) as bar:
        yield bar.update


def tell(text: str) -> None:
    """Prints a line to stdout. If a progress bar is shown, the line appears above it."""
    tqdm.write(text)


class _Lines:
    """Writes progress as lines to stderr, without tqdm's carriage returns and nested bars."""

    def __init__(self, what: str, unit: str, total: int | None, done: int) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._done = self._before = done
        self._start = time.monotonic()
        self._next = self._start + SECONDS_IN_FILES

    def advance(self, number: int) -> None:
        """Counts finished items, and writes a line if one is due."""
        self._done += number
        now = time.monotonic()
        if now < self._next:
            return
        elapsed = now - self._start
        self._next = now + max(SECONDS_IN_FILES, SHARE_IN_FILES * elapsed)
        line = tqdm.format_meter(
            self._done,
            self._total or 0,
            elapsed,
            ncols=0,  # no bar
            prefix=self._what,
            unit=self._unit,
            initial=self._before,
        )
        print(line, file=sys.stderr, flush=True)
