"""Writes files so that they are complete or absent; locks that end with their process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from .messages import ConfigError

UNFINISHED = ".unfinished"
"""Ending of the names of files that are being written, or that a kill left incomplete."""


def make_output_folder(folder: Path) -> None:
    """Makes the folder that --output names, so that one that cannot be used is told before work.

    Raises:
        ConfigError: if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"--output {folder} is not a folder that can be written to: {error.strerror}"
        ) from error


def write_durably(
    path: Path,
    content: str | Callable[[IO[bytes]], object],
    before_rename: Callable[[], object] = lambda: None,
) -> None:
    """Writes a file under another name in its folder, syncs it to disk and renames it.

    So its name never means half a file, even after a kill or with other writers.

    Args:
        path: the file; its folder is created if missing.
        content: a text, written as UTF-8, or a function that is given a binary file.
        before_rename: called when the new file is complete.

    Raises:
        OSError: if it cannot be written; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of other machines, or containers, may have this one's number.
    unfinished = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with unfinished.open("xb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        before_rename()
        unfinished.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # none on a full disk
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not all file systems can sync a name
            os.fsync(folder)
    finally:
        os.close(folder)


_lock_files: set[IO[str]] = set()


def _close_lock_files() -> None:
    while _lock_files:
        _lock_files.pop().close()


# A loader's worker may outlive the run for seconds: it must not keep the run's locks.
os.register_at_fork(after_in_child=_close_lock_files)


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends.

    Args:
        path: a file, which is made.
        how: see fcntl.flock.

    Raises:
        BlockingIOError: if another process holds it, with LOCK_NB.
    """
    with path.open("w") as file:
        fcntl.flock(file, how)
        _lock_files.add(file)
        try:
            yield
        finally:
            _lock_files.discard(file)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder itself, so that no lock file is left in it.

    Raises:
        BlockingIOError: if another process, or this one, holds it.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is created if missing, and removes incomplete files.

    Raises:
        ConfigError: if another one is writing into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "writer.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is writing into {folder}; wait for it, or name another folder"
            ) from error
        for left in folder.glob(f".*{UNFINISHED}"):  # by a run that was killed
            left.unlink(missing_ok=True)
        yield
