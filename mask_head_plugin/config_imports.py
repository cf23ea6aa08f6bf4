"""IMPORTS of configs and ``--import``: whose code a run may execute, and where to find it.

Nothing runs here; ``user_code.import_modules`` does that.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from .messages import ConfigError


def import_options(codes: Sequence[str]) -> list[str]:
    """Returns the values of the flag ``--import`` as "KEY VALUE" pairs."""
    return [text for code in codes for text in ("IMPORTS", code)]


def split_imports(opts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates IMPORTS from the other "KEY VALUE" pairs; returns its entries, and the others.

    The value may be a list or, without quotes and brackets, one module or file.
    """
    imports: list[str] = []
    others = list(opts)
    for k in reversed(range(0, len(opts) - 1, 2)):
        if opts[k] == "IMPORTS":
            try:
                value = yaml.safe_load(opts[k + 1])
            except yaml.YAMLError:
                value = opts[k + 1]
            entries = [value] if isinstance(value, str) else value
            imports = [*resolve_imports(entries, "option IMPORTS"), *imports]
            del others[k : k + 2]
    return imports, others


def resolve_imports(entries: object, source: str, folder: Path | None = None) -> list[str]:
    """Returns entries of IMPORTS in a form that is valid in any folder: module names, absolute
    paths.

    Args:
        entries: a list of texts; a file ends in ``.py``. A name that Python does not find as a
            module may be that of a file in one of the folders.
        source: where they come from, for errors.
        folder: where files are looked for, before the current folder.

    Raises:
        ConfigError: if it is not such a list, or a file is missing.
    """
    if not isinstance(entries, list) or not all(isinstance(x, str) and x for x in entries):
        raise ConfigError(f"{source}: IMPORTS takes a list of modules and .py files, not {entries}")
    folders = [*([folder] if folder else []), Path()]
    found = []
    for entry in entries:
        is_file = entry.endswith(".py") or "/" in entry
        name = entry if is_file else f"{entry}.py"
        path = Path(name).expanduser()
        files = [x / path for x in folders if (x / path).is_file()]
        if is_file and not files:
            places = " or ".join(str(x.resolve()) for x in folders)
            raise ConfigError(f"{source}: IMPORTS names {entry}, which is not a file in {places}")
        if files and (is_file or not _is_module(entry)):
            found.append(str(files[0].resolve()))
        else:
            found.append(entry)
    return found


def module_name(entry: str) -> str:
    """Returns the name of the module that an entry of IMPORTS becomes."""
    return Path(entry).stem if entry.endswith(".py") else entry


def _is_module(name: str) -> bool:
    return name in sys.modules or ("." not in name and importlib.util.find_spec(name) is not None)


def refuse_imports(named: Sequence[str], wanted: Sequence[str], file: str) -> None:
    """Raises ConfigError if a file that the user has not named wants code that is not named either.

    The same module in another place passes, since only what is named will run.
    """
    modules = {module_name(entry) for entry in named}
    unnamed = [entry for entry in wanted if module_name(entry) not in modules]
    if unnamed:
        raise ConfigError(
            f"{file} asks to run {' and '.join(unnamed)} (IMPORTS), and you have not named that "
            f"file: read {unnamed[0]}, and if you trust it add --import {unnamed[0]}, or list it "
            "under IMPORTS in the file that you name"
        )
