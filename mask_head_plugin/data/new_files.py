"""Files that are written whole or not at all, and never over another one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..config import ConfigError


def refuse_existing(paths: Iterable[Path], flag: str) -> None:
    """Raises ConfigError if a file that is to be written exists; ``flag`` is who names it."""
    for path in paths:
        if os.path.lexists(path):
            raise ConfigError(f"{flag}: {path} exists; name a new file")


def write_new_files(texts: Mapping[Path, str], flag: str) -> None:
    """Writes several new files; if one cannot be written, none is there.

    Args:
        texts: what each file is to hold, as UTF-8.
        flag: of the command line, for messages.

    Raises:
        ConfigError: if one exists or cannot be written.
    """
    refuse_existing(texts, flag)
    unfinished = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in texts}
    written: list[Path] = []
    path = Path()
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished[path].write_text(text, encoding="utf-8")
        for path in texts:
            unfinished[path].replace(path)
            written.append(path)
    except OSError as error:
        for done in written:
            done.unlink()
        reason = error.strerror or error
        raise ConfigError(f"{flag}: {path} cannot be written: {reason}") from error
    finally:
        for rest in unfinished.values():
            with contextlib.suppress(OSError):  # there is none, or no folder for it
                rest.unlink()
