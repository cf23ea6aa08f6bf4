"""Writes files that are complete or absent, and provides locks that end with their process."""

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
"""Suffix of files that are still being written, or were left incomplete by a killed process."""


def make_output_folder(folder: Path) -> None:
    """Creates the --output folder, so that a problem with it is reported before any work starts.

    Raises:
        ConfigError: if the folder cannot be created or written to.
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
    """Writes a file under a temporary name in its folder, syncs it to disk and renames it.

    The final name therefore never refers to an incomplete file, even if the process is killed or
    several processes write at once.

    Args:
        path: the file to write; its folder is created if it does not exist.
        content: a string, which is written as UTF-8, or a function that writes to a binary file.
        before_rename: called when the new file is complete, before it gets its final name.

    Raises:
        OSError: if the file cannot be written. An existing file then stays unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name, because processes on other machines or in containers may have the same ID.
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
        error.filename = error.filename or str(path)  # Python does not set it if the disk is full
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(folder)
    finally:
        os.close(folder)


_lock_files: set[IO[str]] = set()


def _close_lock_files() -> None:
    while _lock_files:
        _lock_files.pop().close()


# A data loader worker can outlive the run by seconds and must not keep the run's locks.
os.register_at_fork(after_in_child=_close_lock_files)


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, even if it is killed.

    Args:
        path: the lock file, which is created if it does not exist.
        how: see fcntl.flock.

    Raises:
        BlockingIOError: with LOCK_NB, if the lock is already held, even by this process.
    """
    with path.open("w") as file:
        fcntl.flock(file, how)
        _lock_files.add(file)
        try:
            yield
        finally:
            _lock_files.discard(file)


def lock_holder(path: Path) -> int | None:
    """Returns the process that holds the lock of ``locked``; None if nobody does or it is unknown.

    Only Linux tells which process holds a lock.
    """
    with contextlib.suppress(OSError):
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            match line.split():
                case [_, "FLOCK", _, "WRITE", pid, place, *_] if place.rpartition(":")[2] == inode:
                    return int(pid)
    return None


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, without a lock file.

    Raises:
        BlockingIOError: if this process or another one already holds the lock.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Creates a folder if necessary, keeps other runs from writing to it, and removes leftovers.

    Leftovers are the incomplete files of runs that were killed.

    Raises:
        ConfigError: if another run is writing to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "writer.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is writing to {folder}; wait until it ends, or use another folder"
            ) from error
        for left in folder.glob(f".*{UNFINISHED}"):  # left by a run that was killed
            left.unlink(missing_ok=True)
        yield
