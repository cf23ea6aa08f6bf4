"""Images that are in the training data and in the test data, which makes every score too good.

The same file, the same bytes under another name, or parts of one photograph, by their names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Hashable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePath

THREADS = 8
PROBE = 4096
"""Bytes in the middle of a file, which tell most files of one size apart."""

_WORD = r"(?:tile|patch|crop|part|piece|chip|slice|aug)"
_AXIS = r"(?:x|y|r|c|row|col)"
_TILE = re.compile(
    rf"(?P<photo>.*?)[ _.-]*(?:{_WORD}[ _-]*\d+(?:[ _-]\d+)*|{_AXIS}[_-]?\d+[ _-]*{_AXIS}[_-]?\d+)",
    re.IGNORECASE,
)
_CORNERS = re.compile(r"(?P<photo>.+?)[_-](\d+)[_-](\d+)[_-](\d+)[_-](\d+)")
_PLACE = re.compile(r"(?P<photo>.+?)[_-]\d{1,5}[_-]\d{1,5}")
_DATE = re.compile(r"(?<!\d)(19|20)\d\d[_-]?[01]\d[_-]?[0-3]\d")
_ROBOFLOW = re.compile(r"(?P<photo>.+)\.rf\.\w{16,}")
_GENERIC = {
    *("", "image", "img", "tile", "patch", "crop", "frame", "photo", "picture", "sample"),
    *("train", "val", "valid", "test"),
}
"""Names before a number that say of no photograph which it is."""


def shared_images(
    train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns the images of the test data that the training data have, too.

    Args:
        train: image folder and path of each training image.
        test: the same of the test images.

    Returns:
        For each way to tell (in words) that has any, the pairs of paths, test image first. An image
        is counted in the first way that tells.
    """
    left = list(test)
    found = []
    for words, tell in (
        ("the same file", _by_file),
        ("the same content in another file", _by_content),
        ("parts or versions of one photograph, by name", _by_name),
    ):
        pairs = tell(train, left)
        if pairs:
            found.append((words, pairs))
        seen = {path for path, _ in pairs}
        left = [x for x in left if x[1] not in seen]
    return found


Images = Sequence[tuple[str, str]]
Pairs = list[tuple[str, str]]


def _matches(train: Images, test: Images, key: Callable[[str, str], Hashable]) -> Pairs:
    """Returns the pairs of images that have one key; None is no key."""
    first: dict[Hashable, str] = {}
    for image in train:
        first.setdefault(key(*image), image[1])
    first.pop(None, None)
    return [(path, first[k]) for root, path in test if (k := key(root, path)) in first]


def _by_file(train: Images, test: Images) -> Pairs:
    def identity(_: str, path: str) -> Hashable:
        status = _stat(path)
        return None if status is None else (status.st_dev, status.st_ino)

    return _matches(train, test, identity)


def _by_content(train: Images, test: Images) -> Pairs:
    """Reads only files of one size, and whole ones only where their middles are the same."""
    keys: dict[str, Hashable] = {
        path: status.st_size if (status := _stat(path)) and status.st_size else None
        for _, path in (*train, *test)
    }
    for digest in (_probe, _whole):
        both = {keys[path] for _, path in train} & {keys[path] for _, path in test} - {None}
        alike = [path for path, key in keys.items() if key in both]
        with ThreadPool(THREADS) as pool:
            keys = dict(zip(alike, pool.map(digest, alike, chunksize=16), strict=True))
        train = [x for x in train if x[1] in keys]
        test = [x for x in test if x[1] in keys]
    return _matches(train, test, lambda _, path: keys[path])


def _by_name(train: Images, test: Images) -> Pairs:
    return _matches(train, test, lambda root, path: photograph(os.path.relpath(path, root)))


def photograph(name: str) -> Hashable:
    """Returns what tells the photograph that an image is a part or a version of, None if nothing.

    Names end with the place of a tile (``bay_512_1024``, ``bay_r1_c2``, ``bay_tile7``), its corners
    (``bay_0_0_512_512``, as SAHI writes), or Roboflow's mark of a version (``bay.rf.<hash>``).

    Args:
        name: path within the image folder.
    """
    path = PurePath(name)
    stem, folder = path.stem, str(path.parent)
    if match := _ROBOFLOW.fullmatch(stem):
        return folder, match["photo"].lower()
    match = _TILE.fullmatch(stem)
    if match is None and not _DATE.search(stem):
        corners = _CORNERS.fullmatch(stem)
        if corners and int(corners[2]) < int(corners[4]) and int(corners[3]) < int(corners[5]):
            match = corners
        else:
            match = _PLACE.fullmatch(stem)
    if match is None:
        return None
    photo = match["photo"].strip(" _.-").lower()
    if photo in _GENERIC:
        return None if folder == "." else (folder,)
    return folder, photo


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116  # makes no Path of each of many files
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
