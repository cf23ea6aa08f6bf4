"""Supports an annotation file whose images are in several folders."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError


def join_folders(content: Any, folders: str | Sequence[str]) -> str:
    """Makes file names relative to the common parent of several folders.

    Args:
        content: content of a COCO file; ``file_name`` is changed in place if there are several
            folders.
        folders: the folders that names are relative to. Each image is taken from the folder that
            contains it; missing images are assumed to be in the first folder.

    Returns:
        The folder that the names are now relative to.

    Raises:
        ConfigError: if two folders contain different files of the same name.
    """
    folders = [folders] if isinstance(folders, str) else list(folders)
    if len(folders) == 1:
        return folders[0]
    root = os.path.commonpath([Path(folder).resolve() for folder in folders])
    starts = [os.path.relpath(Path(folder).resolve(), root) for folder in folders]
    images = content.get("images") if isinstance(content, dict) else None
    for image in images if isinstance(images, list) else []:
        name = image.get("file_name") if isinstance(image, dict) else None
        if isinstance(name, str) and name.strip() and "\0" not in name:
            start = _folder_of(name, root, starts)
            image["file_name"] = os.path.normpath(os.path.join(start, name))  # noqa: PTH118  # as text
    return root


def _folder_of(name: str, root: str, starts: Sequence[str]) -> str:
    having = [start for start in starts if Path(root, start, name).is_file()]
    for other in having[1:]:
        a, b = (Path(root, start, name) for start in (having[0], other))
        if not filecmp.cmp(a, b, shallow=False):
            raise ConfigError(
                f"--images: {a} and {b} are different images with the same name, so it is unclear "
                "which one the annotations belong to; rename one in its folder and in the file"
            )
    return having[0] if having else starts[0]
