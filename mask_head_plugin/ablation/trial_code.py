"""Keeps a copy of the user's code with each trial, and refuses to mix versions of it in a study.

The copies are in the folder ``code`` of a trial. They cover the files and modules that IMPORTS
names, but not other files that these import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from ..config import ConfigError
from ..durable_files import write_durably
from ..user_code import search_also
from .trial_folder import Trial

logger = logging.getLogger(__name__)

CODE_FOLDER = "code"
DIGESTS_FILE = "digests.txt"
"""File in CODE_FOLDER with a line ``digest  name`` for each copied file, as b2sum writes it."""


def store_code(trial: Trial) -> None:
    """Copies the code that a trial is about to run into the trial's folder."""
    lines = []
    for name, path in _code_files(trial.cfg.IMPORTS).items():
        content = path.read_bytes()
        write_durably(trial.folder / CODE_FOLDER / name, _writer(content))
        lines.append(f"{_digest(content)}  {name}\n")
    write_durably(trial.folder / CODE_FOLDER / DIGESTS_FILE, "".join(lines))


def check_code(trials: Sequence[Trial], imports: Sequence[str]) -> None:
    """Compares the code that trials ran with the code that would run now.

    Logs one warning if trials were run by an older version of the plugin, which stored no code.
    Ignores failed trials without a checkpoint, because they start again from the beginning.

    Args:
        trials: trials of the same study; their folders need not exist.
        imports: IMPORTS of the config.

    Raises:
        ConfigError: if a file has changed since a trial ran it. The message names both.
    """
    files = _code_files(imports)
    now = {name: _digest(path.read_bytes()) for name, path in files.items()}
    unknown = []
    for trial in trials:
        if not trial.known_hash or _starts_again(trial):
            continue
        folder = trial.folder / CODE_FOLDER
        then = _digests(folder / DIGESTS_FILE)
        if then is None:
            unknown.append(trial)
            continue
        for name in now:
            if then.get(name, now[name]) != now[name]:
                raise ConfigError(
                    f"{files[name]} has changed since {trial.name} was run, and the report would "
                    f"mix both versions; restore the file from {folder / name}, put new code into "
                    "a new file, or choose another --output"
                )
    if unknown and files:
        logger.warning(
            "%d trials, such as %s, do not record the code that they ran: make sure that %s has "
            "not changed since",
            len(unknown),
            unknown[0].name,
            " and ".join(map(str, files.values())),
        )


def _starts_again(trial: Trial) -> bool:
    return trial.has_failed and not (trial.folder / "last_checkpoint").exists()


def _code_files(imports: Sequence[str]) -> dict[str, Path]:
    """Returns the file of each entry of IMPORTS, keyed by the name of its copy."""
    found = {}
    for entry in imports:
        if entry.endswith(".py"):
            name = Path(entry).name
            while name in found:  # a file of the same name in another folder
                name = f"other_{name}"
            found[name] = Path(entry)
            continue
        search_also(Path.cwd())
        try:
            spec = importlib.util.find_spec(entry)
        except (ImportError, ValueError):  # import_modules reports it
            continue
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            found[f"{entry}.py"] = Path(spec.origin)
    return found


def _writer(content: bytes) -> Callable[[IO[bytes]], object]:
    return lambda file: file.write(content)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()


def _digests(path: Path) -> dict[str, str] | None:
    """Reads the digests by file name; returns None if there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
