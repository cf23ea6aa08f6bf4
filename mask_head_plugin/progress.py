"""Progress with the time that is left: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
Advance = Callable[[int], object]
"""Takes how many more are done."""

SECONDS_IN_FILES = 10.0
"""Before the first line, and between two of them at least."""
SHARE_IN_FILES = 0.05
"""Of the time that has passed: how long to wait for the next line, so that logs stay short."""
SMOOTHING = 0.05
"""How fast the time left follows the present speed: 0 for the mean speed, 1 for the last one."""


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
    known = len(items) if isinstance(items, Sized) and total is None else total
    with progress_bar(what, unit, known) as advance:
        for item in items:
            yield item
            advance(1)


@contextlib.contextmanager
def progress_bar(
    what: str, unit: str = "it", total: int | None = None, done: int = 0
) -> Iterator[Advance]:
    """Shows progress that is not one item at a time; see ``progress``.

    Args:
        what: is done.
        unit: what is counted.
        total: how many there are; None if that is not known.
        done: how many were done before, and do not count for the time left.

    Yields:
        A function to call with how many more are done.
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
        """Counts what is done, and writes a line if it is time for one."""
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
