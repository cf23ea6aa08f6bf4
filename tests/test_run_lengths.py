"""Compressed counts are validated before they are passed to pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mask_head_plugin.run_lengths import MOST_CHARACTERS, annotation_rle, as_text, first_broken

GOOD = coco_mask.encode(np.asfortranarray(np.eye(5, 7, dtype=np.uint8)))


def makes_up_slowly(counts: bytes, size) -> bool:
    """Returns whether counts are valid. Decodes them in Python like pycocotools' rleFrString."""
    numbers, place = [], 0
    while place < len(counts):
        value = width = 0
        more = True
        while more:
            if place >= len(counts) or not 48 <= counts[place] < 48 + 64:
                return False
            bits = counts[place] - 48
            value |= (bits & 31) << (5 * width)
            more, place, width = bool(bits & 32), place + 1, width + 1
        if width > MOST_CHARACTERS:
            return False
        if bits & 16:
            value -= 1 << (5 * width)
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
    return bool(numbers) and min(numbers) >= 0 and sum(numbers) == size[0] * size[1]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_counts_written_by_pycocotools_are_valid(seed, height, width, share):
    bits = np.random.default_rng(seed).random((height, width)) < share
    rle = coco_mask.encode(np.asfortranarray(bits, dtype=np.uint8))
    assert first_broken([rle, as_text(rle)]) is None
    assert makes_up_slowly(rle["counts"], rle["size"])


@given(st.integers(0, 2**32 - 1), st.binary(max_size=12), st.integers(0, 30))
def test_a_slow_reference_finds_the_same_damaged_counts(seed, patch, place):
    bits = np.random.default_rng(seed).random((9, 11)) < 0.3
    rle = coco_mask.encode(np.asfortranarray(bits, dtype=np.uint8))
    counts = rle["counts"][:place] + patch + rle["counts"][place + len(patch) :]
    is_whole = makes_up_slowly(counts, rle["size"])
    found = first_broken([GOOD, {**rle, "counts": counts}, GOOD])
    assert found == (None if is_whole else 1)


@pytest.mark.parametrize("counts", ["", "zzzz!!!", "é", "0", "51", "o" * 9])
def test_invalid_counts_are_found(counts):
    assert first_broken([{"size": [5, 7], "counts": counts}]) == 0
    assert first_broken([]) is None


@pytest.mark.parametrize("counts", [[-5, 40], [1.5, 33.5], [np.nan], [2**40, 35 - 2**40]])
def test_counts_that_are_not_numbers_of_pixels_are_refused(counts):
    """pycocotools would fail with another error, or never return."""
    with pytest.raises(ValueError, match="must be whole numbers of 0 or more"):
        annotation_rle({"size": [5, 7], "counts": counts}, (5, 7))
    assert coco_mask.area(annotation_rle({"size": [5, 7], "counts": [5, 30.0]}, (5, 7))) == 30


@pytest.mark.parametrize("corner", [np.nan, np.inf, -np.inf, 1e9, -1e300, 10**400])
def test_a_corner_that_pycocotools_cannot_reach_is_refused(corner):
    """pycocotools would fill the memory or never return."""
    triangle = [1, 1, 5, 1, 5, 4]
    assert coco_mask.area(annotation_rle([triangle], (5, 7))) > 0
    with pytest.raises(ValueError, match="not finite or exceed a million"):
        annotation_rle([triangle, [1, 1, 5, 1, 5, corner]], (5, 7))
