"""Which image files are of one photograph: copies of each other, tiles, or augmented versions."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from .check_splits import photograph

ROBOFLOW = re.compile(r"\.rf\.[0-9a-f]{32}$")
"""Roboflow gives each augmented version of an image a digest of its own."""

MARKED_TILE = re.compile(
    r"[_. -]+(?:(?:tile|patch|crop|chip)s?[_ -]*\d+(?:[_ -]+\d+)+"
    r"|(?:x|r|row|left)[_=-]?\d+[_ -]*(?:y|c|col|top)[_=-]?\d+(?:[_ -]+\d+)*"
    r"|(?:y|c|col|top)[_=-]?\d+[_ -]*(?:x|r|row|left)[_=-]?\d+(?:[_ -]+\d+)*"
    r"|_1__\d+___\d+)$",  # as DOTA's tools have it: P0001__1__0___824
    re.IGNORECASE,
)
COUNTED_TILE = re.compile(r"[_. -]+(?:tile|patch|crop|chip)s?[_ -]*\d+$", re.IGNORECASE)
TWO_NUMBERS = re.compile(r"(?<=[^_ -])[_ -]+(\d+)[_ -]+(\d+)$")
LEAST_STEP = 32
"""Pixels from one tile to the next; smaller numbers may count anything."""


def photograph_names(file_names: Sequence[str]) -> list[str]:
    """Returns for each file name that of its photograph, which tiles and versions share.

    Names that end in two numbers are tiles where the numbers make a grid: dates and times, or a
    scene and a frame, do not.

    Args:
        file_names: all of a data set, as grids show in many names only.
    """
    stems = [_without_version(name) for name in file_names]
    numbers: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for stem in stems:
        if match := TWO_NUMBERS.search(stem):
            numbers[stem[: match.start()]].add((int(match[1]), int(match[2])))
    counted = {COUNTED_TILE.sub("", stem) for stem in stems if COUNTED_TILE.search(stem)}
    # roof_tile_1 to roof_tile_500, of one stem, may show roof tiles.
    patterns = [MARKED_TILE, COUNTED_TILE] if len(counted) > 1 else [MARKED_TILE]
    return [_photograph_name(stem, patterns, numbers) for stem in stems]


def _photograph_name(
    stem: str, patterns: list[re.Pattern[str]], numbers: Mapping[str, set[tuple[int, int]]]
) -> str:
    for pattern in patterns:
        if match := pattern.search(stem):
            return stem[: match.start()]
    match = TWO_NUMBERS.search(stem)
    return stem[: match.start()] if match and _is_grid(numbers[stem[: match.start()]]) else stem


def _without_version(file_name: str) -> str:
    """Returns a path without suffix and Roboflow's digest, with / as separator."""
    stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", file_name.replace("\\", "/"))
    return ROBOFLOW.sub("", stem)


def _is_grid(numbers: set[tuple[int, int]]) -> bool:
    """Returns whether pairs of numbers are columns and rows of tiles."""
    columns, rows = ({pair[axis] for pair in numbers} for axis in (0, 1))
    if len(numbers) < 2:
        return False
    in_pixels = min(columns) == min(rows) == 0 and math.gcd(*columns, *rows) >= LEAST_STEP
    # Fuller than a diagonal: tiles share columns and rows, and hardly one is missing.
    is_full = len(numbers) > max(len(columns), len(rows), len(columns) * len(rows) / 2)
    return in_pixels or is_full


def digests(paths: Iterable[str]) -> dict[str, str]:
    """Returns a digest of each file that has another one's size; others are no copies."""
    sizes = {path: _size(path) for path in paths}
    shared = Counter(sizes.values())
    return {
        path: _digest(path) for path, size in sizes.items() if size is not None and shared[size] > 1
    }


def _size(path: str) -> int | None:
    try:
        return Path(path).stat().st_size
    except OSError:
        return None


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for chunk in iter(functools.partial(file.read, 1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def photographs(file_names: Sequence[str], paths: Sequence[str]) -> list[int]:
    """Returns for each image the number of its photograph.

    Images are of one photograph if their files have the same content or their names say so, or if
    both are with a third one.

    Args:
        file_names: as the records have them.
        paths: of their files.
    """
    first: dict[Hashable, int] = {}
    parent = list(range(len(paths)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = k = parent[parent[k]]
        return k

    same_content = digests(paths)
    for k, (name, path) in enumerate(zip(photograph_names(file_names), paths, strict=True)):
        # The check's own answer, too, so that it finds nothing to warn of in a split.
        of_check = photograph(file_names[k]) or file_names[k]
        for key in (f"name {name}", f"content {same_content.get(path, path)}", of_check):
            parent[root(k)] = root(first.setdefault(key, k))
    return [root(k) for k in range(len(paths))]
