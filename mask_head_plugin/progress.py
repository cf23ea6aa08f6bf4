"""Shows progress and the remaining time: as a bar in a terminal, as occasional lines in a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
Advance = Callable[[int], object]
"""Takes the number of newly finished items."""

SECONDS_IN_FILES = 10.0
"""Minimum seconds before the first line and between lines if stderr is a file or a pipe."""
SHARE_IN_FILES = 0.05
"""Share of the elapsed time to wait before the next line, so that logs stay short."""
SMOOTHING = 0.05
"""Weight of the latest speed when estimating the remaining time: 0 uses only the mean speed, 1 only
the latest.
"""


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
    known = len(items) if isinstance(items, Sized) and total is None else total
    with progress_bar(what, unit, known) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def progress_bar(
    what: str, unit: str = "it", total: int | None = None, done: int = 0
) -> Iterator[Advance]:
    """Shows progress that does not advance item by item; see ``progress``.

    Args:
        what: description of the work.
        unit: name of one item.
        total: number of items; None if unknown.
        done: number of items finished earlier, which do not count for the remaining time.

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
    """Prints a line to stdout, above a bar if there is one."""
    tqdm.write(text)


class _Lines:
    """Lines on stderr, without the carriage returns and nested bars of tqdm."""

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
