"""Words of errors and warnings."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

NAMES_IN_ERROR = 6


def listed(names: Sequence[str], limit: int = NAMES_IN_ERROR) -> str:
    """Returns the first names, and how many there are besides."""
    rest = len(names) - limit
    told = ", ".join(names[:limit]) or "none"
    return told + (f" and {rest} more" if rest > 0 else "")


def nearest_name(name: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that ``name`` most likely meant, or None if none is near.

    A dotted name whose last part exists elsewhere is matched by that part first.
    """
    leaf = name.rpartition(".")[2]
    same_leaf = [choice for choice in choices if choice.rpartition(".")[2] == leaf]
    for candidates, cutoff in ((same_leaf, 0.0), (choices, 0.6)):
        matches = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
        if matches:
            return matches[0]
    return None


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Returns what an error says, in one line, cut behind ``limit`` characters."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())[:limit]


def first_line(error: BaseException) -> str:
    """Returns the first line of an error that may go on with where it happened."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
