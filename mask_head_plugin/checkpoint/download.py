"""Finds or downloads weights that are named by an address."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath
from typing import Any

from detectron2.utils.file_io import Detectron2Handler, PathHandler, PathManager

from ..config import ConfigError
from ..messages import one_line

RANDOM_WEIGHTS = (
    "start from random weights, as configs/Base-Small.yaml and configs/misc/scratch_*.yaml do"
)


class PackageHandler(PathHandler):
    """Opens weights that come with the package: ``mask_head_plugin://mask_rcnn_shapes.safetensors``.

    detectron2 has ``detectron2://`` for its own. Nothing is downloaded.
    """

    PREFIX = "mask_head_plugin://"
    FOLDER = Path(__file__).parents[1] / "checkpoints"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, *_: Any, **__: Any) -> str:
        file = self.FOLDER / path.removeprefix(self.PREFIX)
        if not file.is_file():
            names = ", ".join(sorted(x.name for x in self.FOLDER.glob("*.safetensors")))
            raise ConfigError(f"{path} does not exist; the package has {names}")
        return str(file)


PathManager.register_handler(PackageHandler())


def local_copy(
    address: str,
    advice: str = f"set MODEL.WEIGHTS to it, or {RANDOM_WEIGHTS}",
    path_manager: Any = PathManager,
) -> str:
    """Returns the path of weights, downloaded unless they are in detectron2's cache.

    Args:
        address: a URL, ``detectron2://...``, ``catalog://...`` or ``mask_head_plugin://...``; a
            path is returned as it is.
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
