r"""Finds the file of an image whose record has the wrong name.

Export tools sometimes write names with a different separator (``images\0.jpg``), paths from another
machine (``/home/me/images/0.jpg``), names with different capitals, or names without a folder.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

MOST_FILES = 1_000_000
"""Maximum number of files to list; a larger folder does not belong to a single data set."""

Parts = tuple[str, ...]


class ImagePlaces:
    """The files below an image folder, which are listed on the first search.

    Args:
        image_root: the folder that ``file_name`` is relative to.
    """

    def __init__(self, image_root: str) -> None:
        self._root = image_root
        self._root_parts = _parts(os.path.abspath(image_root))  # noqa: PTH100  # follows no links
        self._by_name: dict[str, dict[str, Parts]] | None = None

    def locate(self, name: str) -> str | None:
        """Returns the path, relative to the folder, of the file that a name refers to.

        Differences in case, separator and Unicode form are ignored. Leading folders may be missing
        from the name or from the path, but must not differ: ``val/1.jpg`` is not ``train/1.jpg``.

        Args:
            name: ``file_name`` of a record.

        Returns:
            The path, or None if no file matches or several match equally well.
        """
        for wanted in _spellings(name):
            nearest = self._nearest(wanted)
            if len(nearest) == 1:
                parts = _parts(nearest[0])
                same = _common_end(_folded(parts), _folded(wanted))
                return nearest[0] if same == min(len(parts), len(wanted)) else None
        return None

    def namesakes(self, name: str) -> list[str]:
        """Returns the files of the same name whose folders match best, if there are any."""
        nearest = (self._nearest(wanted) for wanted in _spellings(name))
        return next((paths for paths in nearest if paths), [])

    def _nearest(self, wanted: Parts) -> list[str]:
        """Returns the paths that share the longest ending with the wanted path.

        The image folder's own name counts as part of a path: if the folder is called ``day``,
        ``day/1.jpg`` finds its file ``1.jpg``. In a tie, the exact spelling wins, and then a
        path without additional folders.
        """
        ranks = {
            path: (
                _common_end(_folded(self._root_parts + parts), _folded(wanted)),
                _common_end(self._root_parts + parts, wanted),
                _folded(parts) == _folded(wanted),
            )
            for path, parts in self._files().get(_folded(wanted)[-1], {}).items()
        }
        return [path for path, rank in ranks.items() if rank == max(ranks.values())]

    def _files(self) -> dict[str, dict[str, Parts]]:
        """Returns the parts of each path, by case-folded file name and path."""
        if self._by_name is None:
            self._by_name = defaultdict(dict)
            for path in itertools.islice(_walk(self._root), MOST_FILES):
                parts = _parts(path)
                self._by_name[_folded(parts)[-1]][path] = parts
        return self._by_name


def locate(image_root: str, name: str) -> str | None:
    """Locates a single name; see ``ImagePlaces.locate``."""
    return ImagePlaces(image_root).locate(name)


def _spellings(name: str) -> list[Parts]:
    """Returns a name as written and URL-decoded, because Label Studio writes ``a%20cat.jpg``."""
    return [parts for x in (name, unquote(name)) if (parts := _parts(x))]


def _parts(path: str) -> Parts:
    """Splits a path at slashes, and at backslashes, which archives from Windows leave in names."""
    return tuple(x for x in re.split(r"[\\/]+", path) if x not in ("", "."))


def _folded(parts: Parts) -> Parts:
    return tuple(unicodedata.normalize("NFC", x).casefold() for x in parts)


def _common_end(a: Parts, b: Parts) -> int:
    """Returns the number of parts that two paths share at their end."""
    same = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        same += 1
    return same


def _walk(root: str) -> Iterator[str]:
    """Yields the relative path of each file below a folder once; also follows links to folders."""
    seen: set[tuple[int, int]] = set()
    _is_new(Path(root), seen)  # a link may lead back to it
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(
            x for x in subfolders if not x.startswith(".") and _is_new(Path(folder, x), seen)
        )
        below = os.path.relpath(folder, root)
        for file in sorted(files):
            yield os.path.normpath(os.path.join(below, file))  # noqa: PTH118  # faster for many


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    try:
        status = folder.stat()
    except OSError:
        return False
    key = (status.st_dev, status.st_ino)
    new = key not in seen
    seen.add(key)
    return new
