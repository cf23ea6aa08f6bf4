"""Reads IMPORTS from configs and the flag ``--import``, which name the code that a run executes.

This module does not execute the code; ``user_code.import_modules`` does.
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
    """Separates "KEY VALUE" pairs into the entries of IMPORTS and all other pairs.

    The value of IMPORTS may be a list, or a single module or file without quotes and brackets.
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
    """Resolves entries of IMPORTS to module names and absolute paths, which are valid anywhere.

    Args:
        entries: a list of strings. Entries that end in ``.py`` are files. All others are modules
            or, if Python does not find a module of this name, files in one of the folders.
        source: where the entries come from, for error messages.
        folder: folder that is searched for files before the current folder.

    Raises:
        ConfigError: if ``entries`` is not a list of strings, or a file is missing.
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
    """Returns the module name of an entry of IMPORTS."""
    return Path(entry).stem if entry.endswith(".py") else entry


def _is_module(name: str) -> bool:
    return name in sys.modules or ("." not in name and importlib.util.find_spec(name) is not None)


def refuse_imports(named: Sequence[str], wanted: Sequence[str], file: str) -> None:
    """Raises ConfigError if a config file imports code that the user did not name.

    A module of the same name in another folder is accepted, because only the copy that the user
    named runs.

    Args:
        named: the IMPORTS that the user named.
        wanted: the IMPORTS of a config file that the user did not name, such as a ``_BASE_``.
        file: path of this config file, for the message.
    """
    modules = {module_name(entry) for entry in named}
    unnamed = [entry for entry in wanted if module_name(entry) not in modules]
    if unnamed:
        raise ConfigError(
            f"{file} would run {' and '.join(unnamed)} (IMPORTS), but you did not name this code "
            f"yourself; read {unnamed[0]} and, if you trust it, add --import {unnamed[0]}, or list "
            "it under IMPORTS in your config file"
        )
