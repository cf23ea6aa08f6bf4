"""Weights that an address names, on this machine."""

from __future__ import annotations

import logging
from pathlib import PurePosixPath
from typing import Any

from detectron2.utils.file_io import Detectron2Handler, PathManager

from ..config import ConfigError
from ..messages import one_line

RANDOM_WEIGHTS = (
    "start from random weights, as configs/Base-Small.yaml and configs/misc/scratch_*.yaml do"
)


def local_copy(
    address: str,
    advice: str = f"set MODEL.WEIGHTS to it, or {RANDOM_WEIGHTS}",
    path_manager: Any = PathManager,
) -> str:
    """Returns the path of weights, downloaded unless they are in detectron2's cache.

    Args:
        address: a URL, ``detectron2://...`` or ``catalog://...``; a path is returned as it is.
        advice: what to do with a file that was downloaded elsewhere.
        path_manager: knows the kinds of address.

    Raises:
        ConfigError: if it cannot be downloaded; says what to fetch.
    """
    if "://" not in address:
        return address
    url = address.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX)
    iopath_log = logging.getLogger("iopath.common.download")
    iopath_log.addFilter(_is_no_error)  # it is in the error below
    try:
        return str(path_manager.get_local_path(address))
    except (OSError, KeyError, RuntimeError) as error:  # the latter two of an unknown catalog://
        raise ConfigError(
            f"{url} could not be downloaded ({one_line(error)}); fetch "
            f"{PurePosixPath(url).name} on another machine and {advice}"
        ) from error
    finally:
        iopath_log.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR
