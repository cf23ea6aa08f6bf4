"""Writes files completely or not at all, and never over another one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from ..config import ConfigError
from ..durable_files import write_durably


def refuse_existing(paths: Iterable[Path], flag: str) -> None:
    """Raises ConfigError if a file to write exists already; ``flag`` names it."""
    for path in paths:
        if os.path.lexists(path):
            raise ConfigError(f"{flag}: {path} exists; name a new file")


def write_new_files(texts: Mapping[Path, str], flag: str) -> None:
    """Writes several new files; if one cannot be written, none is left.

    Args:
        texts: content of each file, written as UTF-8.
        flag: of the command line, for messages.

    Raises:
        ConfigError: if one exists or cannot be written.
    """
    refuse_existing(texts, flag)
    written: list[Path] = []
    path = Path()
    try:
        for path, text in texts.items():
            # Fails if another process has created the file since.
            write_durably(path, text, before_rename=partial(path.touch, exist_ok=False))
            written.append(path)
    except OSError as error:
        for done in written:
            done.unlink()
        reason = error.strerror or error
        raise ConfigError(f"{flag}: {path} cannot be written: {reason}") from error
