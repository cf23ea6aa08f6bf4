"""Imports the user's code, which registers losses, backbones and data sets."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from .config import ConfigError, load_config
from .config_imports import module_name

logger = logging.getLogger(__name__)


def load_config_and_code(
    config_file: str, opts: Sequence[str], *, is_named: bool = True
) -> CfgNode:
    """Loads a config like ``config.load_config``, and imports its IMPORTS."""
    cfg = load_config(config_file, opts, is_named=is_named)
    import_modules(cfg.IMPORTS)
    return cfg


def import_modules(entries: Sequence[str]) -> None:
    """Imports modules and files, and logs each one.

    Modules that this process has already imported do not run again. A file becomes a module with
    the file's name. The folder of the file is appended to Python's search path, so that new
    processes can unpickle objects of the module's classes.

    Args:
        entries: ``cfg.IMPORTS`` from ``config.read_config``.

    Raises:
        ConfigError: if an entry cannot be imported. The message names the file, the line and the
            reason.
    """
    for entry in entries:
        is_file = entry.endswith(".py")
        name = module_name(entry)
        search_also(Path(entry).parent if is_file else Path.cwd())
        if is_file:
            _check_name(name, Path(entry))
        if name in sys.modules:
            continue
        logger.warning("IMPORTS runs your code: %s", entry)
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"IMPORTS {entry}: {_explain(error)}") from error


def search_also(folder: Path) -> None:
    """Appends a folder to Python's search path unless it is already there."""
    importlib.invalidate_caches()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _check_name(name: str, path: Path) -> None:
    """Raises ConfigError unless ``import name`` would import this file."""
    if "." in name:
        raise ConfigError(
            f"IMPORTS {path}: the name of a module cannot contain a dot; rename the file"
        )
    spec = importlib.util.find_spec(name)
    found = spec.origin if spec else None
    if found is None or Path(found).resolve() != path:
        raise ConfigError(
            f"IMPORTS {path}: another module, {found}, is also called {name}; rename the file"
        )


def _explain(error: BaseException) -> str:
    """Returns, in one line, where in the user's code an import failed and why."""
    reason = " ".join(traceback.format_exception_only(error)[-1].split())
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {reason}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    if not frames:
        return f"{reason}; to import a file, give its path, such as my_losses.py"
    place = [frame for frame in frames if frame.filename == frames[0].filename][-1]
    return f"{place.filename}, line {place.lineno}: {reason}"
