"""Finds or downloads weights given by a URL or another address."""

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
    """Opens weights included in the package: ``mask_head_plugin://mask_rcnn_shapes.safetensors``.

    This is the counterpart of detectron2's ``detectron2://``, but downloads nothing.
    """

    PREFIX = "mask_head_plugin://"
    FOLDER = Path(__file__).parents[1] / "checkpoints"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, *_: Any, **__: Any) -> str:
        file = self.FOLDER / path.removeprefix(self.PREFIX)
        if not file.is_file():
            names = ", ".join(sorted(x.name for x in self.FOLDER.glob("*.safetensors")))
            raise ConfigError(f"{path} does not exist; the package includes {names}")
        return str(file)


PathManager.register_handler(PackageHandler())


def local_copy(
    address: str,
    advice: str = f"set MODEL.WEIGHTS to it, or {RANDOM_WEIGHTS}",
    path_manager: Any = PathManager,
) -> str:
    """Returns a local path of weights; downloads them unless they are in detectron2's cache.

    Args:
        address: a URL, ``detectron2://...``, ``catalog://...`` or ``mask_head_plugin://...``; a
            path is returned unchanged.
        advice: what users should do with a file that they downloaded on another machine.
        path_manager: resolves addresses.

    Raises:
        ConfigError: if the download fails; says which file to fetch.
    """
    if "://" not in address:
        return address
    url = address.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX)
    iopath_log = logging.getLogger("iopath.common.download")
    iopath_log.addFilter(_is_no_error)  # the error raised below includes it
    try:
        return str(path_manager.get_local_path(address))
    except (OSError, KeyError, RuntimeError) as error:  # an unknown catalog:// raises the last two
        raise ConfigError(
            f"{url} could not be downloaded ({one_line(error)}); fetch "
            f"{PurePosixPath(url).name} on another machine and {advice}"
        ) from error
    finally:
        iopath_log.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR
