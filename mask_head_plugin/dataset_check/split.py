"""Creates parts of a data set: selected categories, or a split into training and validation.

Shape alphabet: G photographs, K categories.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import ConfigError
from ..messages import nearest_name
from .photographs import photographs

Content = dict[str, Any]


def keep_categories(content: Content, names: Sequence[str]) -> Content:
    """Returns a file's content with only some categories and their annotations.

    All images are kept: images without annotations are useful as negative examples.

    Args:
        content: content of a file that has passed the check without errors.
        names: names of the categories.

    Raises:
        ConfigError: if the file lacks a category. The message suggests the nearest name.
    """
    known = [category["name"] for category in content["categories"]]
    for name in names:
        if name not in known:
            nearest = nearest_name(name, known)
            hint = f"did you mean {nearest!r}?" if nearest else f"it has {known}"
            raise ConfigError(f"--categories: the file has no category {name!r}; {hint}")
    kept = [category for category in content["categories"] if category["name"] in names]
    ids = {category["id"] for category in kept}
    annotations = [x for x in content["annotations"] if x["category_id"] in ids]
    return {**content, "categories": kept, "annotations": annotations}


def split(
    content: Content, image_root: str, share: float, seed: int = 0
) -> tuple[Content, Content]:
    """Splits a file into parts for training and validation.

    All images of a photograph are in the same part (see ``photographs``). As far as this allows,
    each category has about the same share of its annotations in validation.

    Args:
        content: content of a file that has passed the check without errors.
        image_root: the image folder.
        share: share of the images for validation, between 0 and 1.
        seed: seed of the random choice; the same seed gives the same parts.

    Raises:
        ConfigError: if the share is not between 0 and 1, or all images belong to one photograph.
    """
    if not 0 < share < 1:
        raise ConfigError(f"--split {share}: use a share between 0 and 1, such as 0.2")
    images = content["images"]
    names = [image["file_name"] for image in images]
    paths = [os.path.join(image_root, name) for name in names]  # noqa: PTH118  # as detectron2
    groups = photographs(names, paths)
    numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    if len(numbers) < 2:
        raise ConfigError(
            f"--split: all {len(images)} images belong to one photograph, judging by name or "
            "content"
        )
    group_of_image = {
        image["id"]: numbers[group] for image, group in zip(images, groups, strict=True)
    }
    chosen = _choose(_counts(content, group_of_image, len(numbers)), share, seed)
    parts = []
    for wanted in (False, True):
        kept = [image for image in images if chosen[group_of_image[image["id"]]] == wanted]
        ids = {image["id"] for image in kept}
        annotations = [x for x in content["annotations"] if x["image_id"] in ids]
        parts.append({**content, "images": kept, "annotations": annotations})
    return parts[0], parts[1]


def _counts(content: Content, group_of_image: dict[Any, int], num_groups: int) -> Any:
    """Returns (G, 1 + K) counts per photograph: images, and annotations of each category."""
    columns = {x["id"]: k for k, x in enumerate(content["categories"], start=1)}
    counts = np.zeros((num_groups, 1 + len(columns)))
    for group, count in Counter(group_of_image.values()).items():
        counts[group, 0] = count
    for x in content["annotations"]:
        counts[group_of_image[x["image_id"]], columns[x["category_id"]]] += 1
    return counts


def _choose(counts: Any, share: float, seed: int) -> Any:
    """Returns (G,) bools that are True for photographs in the validation part.

    A photograph is chosen if it brings the shares of images and categories closer to ``share``.
    Photographs with many images come first, so that those with few images can even out the shares.
    """
    totals = counts.sum(0)
    shares = counts[:, totals > 0] / totals[totals > 0]
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order, 0], kind="stable")]
    chosen = np.zeros(len(counts), bool)
    reached = np.zeros(shares.shape[1])
    for group in order:
        with_it = reached + shares[group]
        if ((with_it - share) ** 2).sum() < ((reached - share) ** 2).sum():
            chosen[group], reached = True, with_it
    if not chosen.any():  # too few photographs for the share
        chosen[order[-1]] = True
    elif chosen.all():
        chosen[order[-1]] = False
    return chosen
