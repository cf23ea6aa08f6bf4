"""Writes new files completely or not at all, without overwriting existing ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from ..config import ConfigError
from ..durable_files import write_durably


def refuse_existing(paths: Iterable[Path], flag: str) -> None:
    """Raises ConfigError if a file already exists; ``flag`` is used in the message."""
    for path in paths:
        if os.path.lexists(path):
            raise ConfigError(f"{flag}: {path} already exists; use the name of a new file")


def write_new_files(texts: Mapping[Path, str], flag: str) -> None:
    """Writes several new files; if one cannot be written, none is left behind.

    Args:
        texts: content of each file, written as UTF-8.
        flag: command-line flag for messages.

    Raises:
        ConfigError: if a file already exists or cannot be written.
    """
    refuse_existing(texts, flag)
    written: list[Path] = []
    path = Path()
    try:
        for path, text in texts.items():
            # Fails if another process has created the file in the meantime.
            write_durably(path, text, before_rename=partial(path.touch, exist_ok=False))
            written.append(path)
    except OSError as error:
        for done in written:
            done.unlink()
        reason = error.strerror or error
        raise ConfigError(f"{flag}: {path} cannot be written: {reason}") from error
