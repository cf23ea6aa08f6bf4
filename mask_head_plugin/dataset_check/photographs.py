"""Finds image files that come from the same photograph: copies, tiles, or augmented versions.

Used to check two data sets for overlap, and to split a data set.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

THREADS = 8
PROBE = 4096
"""Number of bytes read from the middle of a file; they distinguish most files of equal size."""

ROBOFLOW = re.compile(r"(?:_(?:jpe?g|png|bmp|tiff?|webp))?\.rf\.\w{16,}$", re.IGNORECASE)
"""End of the names that Roboflow gives: each augmented version has its own digest."""

_PART = r"(?:tile|patch|crop|chip|part|piece|slice|aug)"
_MARKED = re.compile(
    rf"(?:^|[_. /-]+)(?:{_PART}[_ -]*\d+(?:[_ -]+\d+)+"
    r"|(?:x|r|row|left)[_=-]?\d+[_ -]*(?:y|c|col|top)[_=-]?\d+(?:[_ -]+\d+)*"
    r"|(?:y|c|col|top)[_=-]?\d+[_ -]*(?:x|r|row|left)[_=-]?\d+(?:[_ -]+\d+)*"
    r"|_1__\d+___\d+)$",  # written by DOTA's tools: P0001__1__0___824
    re.IGNORECASE,
)
_COUNTED = re.compile(rf"(?:^|[_. /-]+){_PART}[_ -]*\d+$", re.IGNORECASE)
_CORNERS = re.compile(r"(?<=[^_ -])[_ -]+(\d+)[_ -]+(\d+)[_ -]+(\d+)[_ -]+(\d+)$")
_PLACE = re.compile(r"(?<=[^_ -])[_ -]+(\d{1,5})[_ -]+(\d{1,5})$")
_DATED = re.compile(r"(?<!\d)(?:19|20)\d\d(?:[_ -]?\d\d){0,3}$")
"""A year or the start of a date. Two two-digit numbers after it are the rest of the date."""
LEAST_STEP = 32
"""Smallest step between tiles in pixels; numbers with smaller steps may count something else."""
LONGEST = 8
"""Largest ratio of columns to rows of tiles, or of rows to columns; numbers of scenes and frames
usually have a larger ratio."""
_GENERIC = {
    *("image", "img", "tile", "patch", "crop", "frame", "photo", "picture", "sample"),
    *("train", "val", "valid", "test"),
}
"""Names before a number that do not identify a photograph."""

Places = set[tuple[str, str]]


def photograph_names(file_names: Sequence[str]) -> list[str | None]:
    """Returns, for each file, the name of the photograph of which it is a tile or a version.

    Names are recognised if they end with the position of a tile (``bay_512_1024``, ``bay_r1_c2``,
    ``bay_tile7``), its corners (``bay_0_0_512_512``, as written by SAHI), or Roboflow's mark of a
    version (``bay.rf.<digest>``). Two plain numbers count as the position of a tile if all such
    pairs form a grid. Numbers that look like dates and times, or scenes and frames, do not count.

    Args:
        file_names: all names in the data set, because a grid is visible only in many names.

    Returns:
        The name of each file's photograph; None for a file that is not a tile or a version, unless
        it is itself the photograph of such a file.
    """
    paths = [re.sub(r"\.[A-Za-z0-9]{1,5}$", "", name.replace("\\", "/")) for name in file_names]
    stems = [ROBOFLOW.sub("", path) for path in paths]
    places: dict[str, Places] = defaultdict(set)
    for stem in stems:
        if match := _PLACE.search(stem):
            places[stem[: match.start()]].add((match[1], match[2]))
    grids = {name for name, numbers in places.items() if _is_grid(name, numbers)}
    counted = {stem[: match.start()] for stem in stems if (match := _COUNTED.search(stem))}
    # roof_tile_1 to roof_tile_500 have a single stem, so they may be pictures of roof tiles.
    patterns = [_MARKED, _COUNTED] if len(counted) > 1 else [_MARKED]
    names = [_whole_photograph(stem, patterns, grids) for stem in stems]
    parts = {name for name, path in zip(names, paths, strict=True) if name != path}
    return [name if name in parts else None for name in names]


def _whole_photograph(stem: str, patterns: Iterable[re.Pattern[str]], grids: set[str]) -> str:
    """Returns a stem without the part that identifies a piece of the photograph."""
    name = next((stem[: x.start()] for pattern in patterns if (x := pattern.search(stem))), None)
    if name is None and (match := _CORNERS.search(stem)):
        x0, y0, x1, y1 = map(int, match.groups())
        if min(x1 - x0, y1 - y0) >= LEAST_STEP:
            name = stem[: match.start()]
    if name is None and (match := _PLACE.search(stem)) and stem[: match.start()] in grids:
        name = stem[: match.start()]
    if name is None:
        return stem
    folder, _, last = name.rpartition("/")
    if last.lower() in _GENERIC:
        name = folder
    return name or stem


def _is_grid(name: str, places: Places) -> bool:
    """Returns whether the pairs of numbers after a name are columns and rows of tiles."""
    numbers = {(int(x), int(y)) for x, y in places}
    texts = [text for place in places for text in place]
    columns, rows = ({pair[axis] for pair in numbers} for axis in (0, 1))
    if len(numbers) < 2 or (_DATED.search(name) and all(len(text) == 2 for text in texts)):
        return False
    in_pixels = 0 in columns | rows and math.gcd(*columns, *rows) >= LEAST_STEP
    # Tiles share columns and rows, and most tiles are present. Pairs of numbers that increase
    # together, on a diagonal, do not have these properties.
    is_full = len(numbers) > max(len(columns), len(rows), len(columns) * len(rows) / 2)
    # 01_0001 is a scene and a frame: columns and rows would be padded to equal lengths.
    padded = {len(text) for text in texts} if any(x[0] == "0" != x for x in texts) else set()
    long = max(len(columns), len(rows)) > LONGEST * min(len(columns), len(rows))
    return in_pixels or (is_full and len(padded) < 2 and not long)


def content_keys(
    paths: Iterable[str], shared: Callable[[Mapping[str, Hashable]], set[Hashable]] | None = None
) -> dict[str, Hashable]:
    """Returns a key for the content of each file that may be a copy; leaves out all other files.

    Only files of equal size are read, and they are read completely only if their middles are equal.

    Args:
        paths: paths of files; empty and unreadable files do not count as copies.
        shared: function that takes the keys by path and returns the keys to examine further; by
            default, these are all keys that occur more than once.
    """
    keys: dict[str, Hashable] = {path: _size(path) for path in paths}
    for digest in (_probe, _whole):
        worth = (shared or _twice)(keys) - {None}
        alike = [path for path, key in keys.items() if key in worth]
        with ThreadPool(THREADS) as pool:
            keys = dict(zip(alike, pool.map(digest, alike, chunksize=16), strict=True))
    return {path: key for path, key in keys.items() if key is not None}


def _twice(keys: Mapping[str, Hashable]) -> set[Hashable]:
    return {key for key, count in Counter(keys.values()).items() if count > 1}


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size or None  # noqa: PTH116  # faster than Path for many files
    except (OSError, ValueError):
        return None


def _probe(path: str) -> Hashable:
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 2)
            return size, hashlib.blake2b(file.read(PROBE), digest_size=16).digest()
    except OSError:
        return None


def _whole(path: str) -> Hashable:
    try:
        return hashlib.blake2b(Path(path).read_bytes()).digest()
    except OSError:
        return None


def photographs(file_names: Sequence[str], paths: Sequence[str]) -> list[int]:
    """Returns, for each image, the number of its photograph.

    Two images belong to the same photograph if their files have the same content, if their names
    indicate it, or if both belong to the same photograph as a third image.

    Args:
        file_names: file names in the records.
        paths: paths of the files.
    """
    first: dict[Hashable, int] = {}
    parent = list(range(len(paths)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = k = parent[parent[k]]
        return k

    contents = content_keys(paths)
    for k, (name, path) in enumerate(zip(photograph_names(file_names), paths, strict=True)):
        for key in (("name", name), ("content", contents.get(path)), ("path", path)):
            if key[1] is not None:
                parent[root(k)] = root(first.setdefault(key, k))
    return [root(k) for k in range(len(paths))]
