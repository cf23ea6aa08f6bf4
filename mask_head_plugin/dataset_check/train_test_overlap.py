"""Finds images that are in both training and test data, which makes all scores too high.

Two such images may be the same file, have the same content under different names, or, judging by
their names, be parts of one photograph.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence

from .photographs import content_keys, photograph_names

Images = Sequence[tuple[str, str]]
Pairs = list[tuple[str, str]]


def shared_images(train: Images, test: Images) -> list[tuple[str, Pairs]]:
    """Returns the test images that are also in the training data.

    Args:
        train: image folder and path of each training image.
        test: image folder and path of each test image.

    Returns:
        A description of each criterion that finds images, with pairs of paths of a test image and a
        training image. A test image appears only under the first criterion that matches.
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


def _matches(train: Images, test: Images, keys: Mapping[str, Hashable]) -> Pairs:
    """Returns the pairs of images with equal keys; ignores images whose key is None."""
    first: dict[Hashable, str] = {}
    for _, path in train:
        first.setdefault(keys.get(path), path)
    first.pop(None, None)
    return [(path, first[key]) for _, path in test if (key := keys.get(path)) in first]


def _by_file(train: Images, test: Images) -> Pairs:
    return _matches(train, test, {path: _identity(path) for _, path in (*train, *test)})


def _by_content(train: Images, test: Images) -> Pairs:
    def shared(keys: Mapping[str, Hashable]) -> set[Hashable]:
        parts = ({keys[path] for _, path in part if path in keys} for part in (train, test))
        return set.intersection(*parts)

    return _matches(train, test, content_keys((path for _, path in (*train, *test)), shared))


def _by_name(train: Images, test: Images) -> Pairs:
    images = [*train, *test]
    names = photograph_names([os.path.relpath(path, root) for root, path in images])
    return _matches(train, test, dict(zip((path for _, path in images), names, strict=True)))


def _identity(path: str) -> Hashable:
    """Returns an identity that is equal for a file and its links."""
    try:
        status = os.stat(path)  # noqa: PTH116  # faster than Path for many files
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
