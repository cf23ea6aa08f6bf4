"""Finds the checkpoints in a run's folder, checks them, and chooses the one to resume from."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import zipfile
from pathlib import Path

from ..config import ConfigError

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last_checkpoint"
"""File with the name of the checkpoint to resume from, as in detectron2."""

FINISHED_ITERATION = "finished_iteration"
"""File with the iteration of the newest checkpoint whose evaluation and logging also finished; see
hooks.Resume."""

BEST_CHECKPOINT = "model_best"
"""Name, without extension, of a file with the best weights. A run cannot resume from it."""


EARLY_STOPPING = "early_stopping.json"
"""File with the values of SOLVER.EARLY_STOPPING.METRIC in past evaluations; see
engine/early_stopping.py."""


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the checkpoints that a run can resume from, in order of preference.

    The checkpoint named in ``last_checkpoint`` comes first, unless a later iteration was written
    after it. The others follow, latest iteration first. File times alone would not be reliable,
    because copying changes them.
    """
    tag = folder / LAST_CHECKPOINT
    tagged = tag.read_bytes().strip().decode(errors="replace") if tag.is_file() else ""
    tag_time = tag.stat().st_mtime_ns if tag.is_file() else 0
    files = [path for path in folder.glob("*.pth") if path.match("model_*") or path.name == tagged]
    files = [path for path in files if path.stem != BEST_CHECKPOINT]

    def rank(path: Path) -> tuple[bool, bool, int, int]:
        # lstat also works for broken links.
        time, iteration = path.lstat().st_mtime_ns, _iteration(path.stem)
        is_later = time > tag_time and 0 <= _iteration(Path(tagged).stem) < iteration
        return is_later, path.name == tagged, iteration, time

    return sorted(files, key=rank, reverse=True)


def _iteration(stem: str) -> int:
    """Returns the number at the end of a checkpoint's name; -1 for names such as model_final."""
    number = re.search(r"_(\d{1,15})$", stem, re.ASCII)
    return int(number[1]) if number else -1


def newest_intact(folder: Path) -> Path:
    """Returns the first intact file of checkpoint_files; logs the damage of the files before it.

    Raises:
        ConfigError: if no checkpoint is intact; names each with its damage.
    """
    damages: list[str] = []
    for path in checkpoint_files(folder):
        damage = find_damage(path)
        if not damage:
            if damages:
                logger.warning(
                    "resuming from the older checkpoint %s, because a newer one is damaged: %s",
                    path,
                    "; ".join(damages),
                )
            return path
        damages.append(f"{path.name} {damage}")
    raise ConfigError(
        f"no checkpoint in {folder} can be resumed from: {'; '.join(damages)}. Start without "
        "--resume, or put an intact checkpoint there"
    )


def find_damage(path: Path) -> str:
    """Describes how a checkpoint file is damaged; returns "" if it is intact.

    If there is no checksum file, as for detectron2's checkpoints, the checksums inside the file are
    checked.
    """
    if not path.is_file():
        return "is a folder" if path.is_dir() else "is a broken link"
    if path.stat().st_size == 0:
        return "is empty"
    checksum = path.with_name(f"{path.name}.sha256")
    if checksum.is_file():
        if _sha256(path) != checksum.read_bytes().partition(b" ")[0].decode(errors="replace"):
            return f"does not match its checksum in {checksum.name}"
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as error:
        return f"is truncated or not a checkpoint ({error})"
    return f"has a damaged part ({damaged})" if damaged else ""


def set_aside_earlier_run(folder: Path) -> None:
    """Moves the checkpoints and metrics of an earlier run to ``earlier_run_<n>`` in the folder.

    Otherwise a new run could later resume from a checkpoint of the earlier one.
    """
    moved = [
        *folder.glob("model_*.pth*"),
        *folder.glob("events.out.tfevents.*"),
        *(folder / x for x in (LAST_CHECKPOINT, FINISHED_ITERATION, EARLY_STOPPING)),
        folder / f"{BEST_CHECKPOINT}.json",
    ]
    metrics = folder / "metrics.json"
    if not any(path.suffix == ".pth" for path in moved) and not (
        metrics.is_file() and metrics.stat().st_size
    ):
        return
    number = 1
    while (folder / f"earlier_run_{number}").exists():
        number += 1
    aside = folder / f"earlier_run_{number}"
    aside.mkdir()
    for path in moved:
        if path.is_file():
            path.rename(aside / path.name)
    if metrics.is_file():
        shutil.copy2(metrics, aside)  # not moved, because the writer has it open and empties it
    logger.warning(
        "%s contains an earlier run, but this run starts from the beginning (--resume would "
        "continue the earlier one). The earlier checkpoints and metrics are now in %s",
        folder,
        aside,
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the ``keep`` newest ``model_<iteration>.pth`` files, with their checksums."""
    files = [path for path in folder.glob("model_*.pth") if _iteration(path.stem) >= 0]
    for path in sorted(files, key=lambda path: _iteration(path.stem))[:-keep]:
        path.unlink()
        path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
