"""Words of errors and warnings."""

from __future__ import annotations

from collections.abc import Sequence

NAMES_IN_ERROR = 6


def listed(names: Sequence[str], limit: int = NAMES_IN_ERROR) -> str:
    """Returns the first names, and how many there are besides."""
    rest = len(names) - limit
    told = ", ".join(names[:limit]) or "none"
    return told + (f" and {rest} more" if rest > 0 else "")
