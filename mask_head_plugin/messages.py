"""The error for problems that users can fix, and helpers for wording and silencing messages."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence

NAMES_IN_ERROR = 6


class ConfigError(ValueError):
    """A config or file cannot be used. The message is one line and says what to do."""


def listed(names: Sequence[str], limit: int = NAMES_IN_ERROR) -> str:
    """Returns a text with the first ``limit`` names and the number of the remaining ones."""
    rest = len(names) - limit
    told = ", ".join(names[:limit]) or "none"
    return told + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: ``1 image``, ``1,000 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nearest_name(name: str, choices: Sequence[str], cutoff: float = 0.6) -> str | None:
    """Returns the choice that ``name`` most likely stands for, or None if no choice is similar.

    Case is ignored. Choices that have the same last part as ``name`` (the part after the last dot)
    are tried first.

    Args:
        name: the name to look for.
        choices: the existing names.
        cutoff: the required similarity, from 0 to 1. Use a lower value for names of two letters.
    """
    folded = {choice.casefold(): choice for choice in choices if choice}
    leaf = name.casefold().rpartition(".")[2]
    same_leaf = [choice for choice in folded if choice.rpartition(".")[2] == leaf]
    for candidates, least in ((same_leaf, 0.0), (list(folded), cutoff)):
        matches = difflib.get_close_matches(name.casefold(), candidates, n=1, cutoff=least)
        if matches:
            return folded[matches[0]]
    return None


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Returns the message of an error as one line, cut off after ``limit`` characters."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())[:limit]


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without details such as a stack trace."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def silenced(level: int) -> Iterator[None]:
    """Hides log messages up to and including a level, such as ``logging.INFO``."""
    before = logging.root.manager.disable
    logging.disable(max(level, before))
    try:
        yield
    finally:
        logging.disable(before)
