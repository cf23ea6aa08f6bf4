"""Reads results and annotations into one scene and refuses files that do not belong together."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..config import ConfigError
from ..evaluation.coco_ap import GroundTruth, as_bytes
from ..messages import counted, listed, one_line
from ..run_lengths import annotation_rle, first_broken
from .scene import IntArray, Scene

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

SCORE_ROUNDING = 1e-5
"""How far a score may lie outside the range 0 to 1, because exported models round scores."""

NUMBERS = {int, float}
"""Types of numbers in JSON. Compared by type, because isinstance accepts a bool as an int."""

IDS = {int, float, str}
"""Types of ids in JSON."""

BROKEN_COUNTS = (
    "the counts of its mask do not add up to an image of its size; export the mask again"
)


def read_scene(annotations: Path, results: Sequence[Record], source: Path) -> Scene:
    """Reads the scene from annotations and results.

    Args:
        annotations: a COCO or LVIS file.
        results: detections in COCO's result format. If a detection has a ``mask_score``, that score
            ranks its mask. A detection with a mask needs no box.
        source: the results file, named in errors.

    Raises:
        ConfigError: if the two files do not belong together. The message names the file and the ids
            or the entry.
    """
    content = _read_annotations(annotations)
    try:
        is_lvis = any("neg_category_ids" in image for image in content["images"])
        truth = GroundTruth(str(annotations), is_lvis=is_lvis)
        _check_ids(results, truth, source)
        with_masks = truth.has_masks and _have_masks(results, source, annotations)
        sizes = {x["id"]: (x.get("height"), x.get("width")) for x in content["images"]}
        checked = _checked(results, source, sizes, with_masks)
        found = truth.detections(checked, "segm" if with_masks else "bbox")
    except ConfigError:
        raise
    except (ValueError, OSError, KeyError, TypeError) as error:
        told = one_line(error)
        if not told.startswith(str(annotations)):
            told = f"{annotations} and {source} cannot be compared: {told}"
        raise ConfigError(told) from error
    boxes = [checked[x["id"] - 1]["bbox"] for x in found]
    scores = [checked[x["id"] - 1]["score"] for x in found]
    names = {x["id"]: str(x.get("file_name", x["id"])) for x in content["images"]}
    return _scene(truth, names, found, boxes, scores, with_masks)


def _read_annotations(path: Path) -> dict[str, Any]:
    """Reads an annotation file.

    Raises:
        ConfigError: if the file is broken or has nothing to compare with.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as annotations: {one_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ConfigError(f"{path} is not a COCO annotation file: it has no list of images")
    objects = content.get("annotations") or []
    categories = content.get("categories") or []
    for key, records in (
        ("images", content["images"]),
        ("annotations", objects),
        ("categories", categories),
    ):
        if not isinstance(records, list) or not all(isinstance(x, dict) for x in records):
            raise ConfigError(f"{path}: {key} is not a list of objects; export the file again")
    for what, key, records in (
        ("image", "id", content["images"]),
        ("category", "name", categories),
        ("category", "id", categories),
    ):
        values = [repr(x.get(key)) for x in records]
        twice = next((x for x, count in Counter(values).items() if count > 1), None)
        if twice is not None:
            raise ConfigError(
                f"{path} has {what} {twice} twice; tools/check_dataset.py can fix this"
            )
    for key, count in (("bbox", 4), ("area", None)):
        given = [(k, x[key]) for k, x in enumerate(objects) if x.get(key) not in (None, [])]
        _check_numbers(given, key, count, f"{path}, annotations")
    for key, records, find in (
        ("images", content["images"], _image_problem),
        ("annotations", objects, _object_problem),
        ("categories", categories, _category_problem),
    ):
        for number, record in enumerate(records):
            if problem := find(record):
                raise ConfigError(f"{path}, {key}: entry {number}: {problem}")
    if all(x.get("iscrowd") for x in objects):
        what = "only crowds" if objects else "no annotations"
        raise ConfigError(f"{path} has {what}: there is nothing to compare with")
    encoded = [x for x in objects if isinstance(x.get("segmentation"), dict)]
    encoded = [
        x
        for x in encoded
        if isinstance(x["segmentation"].get("counts"), str)
        and np.shape(x["segmentation"].get("size")) == (2,)
    ]
    broken = first_broken([x["segmentation"] for x in encoded])
    if broken is not None:
        raise ConfigError(f"{path}: annotation {encoded[broken].get('id')!r}: {BROKEN_COUNTS}")
    return content


def _image_problem(image: Record) -> str:
    """Returns what is wrong with an image; empty if nothing is."""
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        if not isinstance(image.get(key, []), list):
            return f"{key} is {image[key]!r}, not a list"
    for key in ("height", "width"):
        side = image.get(key)
        if side and (type(side) not in NUMBERS or side < 0 or side % 1):
            return f"{key} is {side!r}, not a whole number of pixels"
    return _id_problem(image, "id") or _text_problem(image, "file_name")


def _category_problem(category: Record) -> str:
    """Returns what is wrong with a category; empty if nothing is."""
    return _id_problem(category, "id") or _text_problem(category, "name")


def _text_problem(record: Record, key: str) -> str:
    """Returns whether a text has characters that no file can contain; empty if not."""
    try:
        str(record.get(key)).encode()
    except UnicodeEncodeError:
        return f"{key} is {record[key]!r}, which is not valid Unicode"
    return ""


def _id_problem(record: Record, *keys: str) -> str:
    """Returns which of the keys has no usable id; empty if all have one."""
    for key in keys:
        if type(record.get(key)) not in IDS:
            return f"{key} is {record.get(key)!r}, not a number or text"
    return ""


def _object_problem(annotation: Record) -> str:
    """Returns what is wrong with an annotation; empty if nothing is.

    Box and area must be known to be numbers.
    """
    if problem := _id_problem(annotation, "image_id", "category_id"):
        return problem
    if annotation.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd is {annotation['iscrowd']!r}, not 0 or 1"
    box, mask = annotation.get("bbox"), annotation.get("segmentation")
    if box and min(box[2:]) < 0:
        return f"bbox {box} has a negative size; it must be [x, y, width, height]"
    if (annotation.get("area") or 0) < 0:
        return f"area is {annotation['area']}, which is negative"
    return _mask_problem(mask)


def _mask_problem(segmentation: Any) -> str:
    """Returns why a value is neither polygons, an RLE nor missing; empty if it is one of these."""
    if isinstance(segmentation, list) and not all(isinstance(x, list) for x in segmentation):
        return "its segmentation is not a list of polygons [x, y, x, y, ...]"
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(counts, list | str) or not isinstance(size, list) or len(size) != 2:
            return "its segmentation is an RLE without size [height, width] and counts"
    if not isinstance(segmentation, list | dict | None):
        return f"its segmentation is {segmentation!r}, neither polygons nor an RLE"
    return ""


def _check_ids(results: Sequence[Record], truth: GroundTruth, source: Path) -> None:
    """Raises a ConfigError if results have images or categories that the annotations lack."""
    for key, known, what in (
        ("image_id", set(truth.image_ids), "images"),
        ("category_id", set(truth.category_ids), "categories"),
    ):
        for number, x in enumerate(results):
            if problem := f"has no {key}" if key not in x else _id_problem(x, key):
                raise ConfigError(f"{source}: entry {number}: {problem}")
        unknown = sorted({repr(x[key]) for x in results if x[key] not in known})
        if unknown:
            ours = listed([repr(x) for x in sorted(known, key=lambda x: (str(type(x)), x))], 4)
            raise ConfigError(
                f"{source} has detections for {what} that {truth.json_file} lacks: {key} "
                f"{listed(unknown, 4)} (it has {ours}); name the annotation file of the evaluation"
            )


def _have_masks(results: Sequence[Record], source: Path, annotations: Path) -> bool:
    """Returns whether the results have masks; warns if only the annotations have them."""
    without = [k for k, x in enumerate(results) if not x.get("segmentation")]
    if without and len(without) < len(results):
        have = "has" if len(without) == 1 else "have"
        raise ConfigError(
            f"{source}: {len(without)} of {len(results)} detections {have} no segmentation, such "
            f"as entry {without[0]}; give every detection a mask, or none"
        )
    if without:
        logger.warning(
            "%s has boxes only, so the masks of %s are not evaluated", source, annotations
        )
    return not without


def _checked(
    results: Sequence[Record], source: Path, sizes: Mapping[Any, Any], with_masks: bool
) -> list[dict[str, Any]]:
    """Returns the detections with score, box and, if ``with_masks``, the mask as RLE."""
    checked = []
    for number, result in enumerate(results):
        one = {key: result[key] for key in ("image_id", "category_id")}
        if with_masks:
            if problem := _mask_problem(result["segmentation"]):
                raise ConfigError(f"{source}: entry {number}: {problem}")
            try:
                rle = annotation_rle(result["segmentation"], sizes[result["image_id"]])
                if rle is None:
                    raise ValueError("none of its polygons has three corners [x, y, x, y, x, y]")
                one["segmentation"] = as_bytes(rle)
            except (ValueError, KeyError, TypeError) as error:
                where = f"{source}: entry {number} (image {result['image_id']!r})"
                told = f"its segmentation cannot be read: {one_line(error)}"
                raise ConfigError(f"{where}: {told}") from None
        one |= {"score": result.get("score"), "bbox": result.get("bbox")}
        if "mask_score" in result:
            one["mask_score"] = result["mask_score"]
        checked.append(one)
    if with_masks and (broken := first_broken([x["segmentation"] for x in checked])) is not None:
        where = f"{source}: entry {broken} (image {checked[broken]['image_id']!r})"
        raise ConfigError(f"{where}: {BROKEN_COUNTS}")
    for one in checked:
        if with_masks and one["bbox"] is None:
            one["bbox"] = coco_mask.toBbox(one["segmentation"]).tolist()
    for key, count in (("score", None), ("mask_score", None), ("bbox", 4)):
        _check_numbers([(k, x[key]) for k, x in enumerate(checked) if key in x], key, count, source)
    for number, one in enumerate(checked):
        if not -SCORE_ROUNDING <= one["score"] <= 1 + SCORE_ROUNDING:
            raise ConfigError(
                f"{source}: entry {number}: score is {one['score']}, not 0 to 1; if scores are in "
                "percent, divide them by 100"
            )
        if min(one["bbox"][2:]) < 0:
            raise ConfigError(
                f"{source}: entry {number}: bbox {one['bbox']} has a negative size; it must be "
                "[x, y, width, height]"
            )
    return checked


def _check_numbers(
    values: Sequence[tuple[int, Any]], key: str, count: int | None, source: Path | str
) -> None:
    """Raises a ConfigError unless each value is a finite number or a list of ``count`` of these.

    Args:
        values: pairs of an entry's number and its value.
        key: key that the values belong to.
        count: required length of a list; None for a single number.
        source: the file, and the list in it if it has several; named in errors.
    """
    try:
        written = [x for _, x in values] if count is None else [y for _, x in values for y in x]
        array = np.array([x for _, x in values], float)
        # NumPy would convert "0.9" and true to numbers.
        fits = set(map(type, written)) <= NUMBERS
        fits = fits and array.shape[1:] == (() if count is None else (count,))
        if fits and np.isfinite(array).all():
            return
    except (ValueError, TypeError, OverflowError):
        pass
    expected = "a finite number" if count is None else "[x, y, width, height] in finite numbers"
    for number, value in values:
        numbers = [value] if count is None else value
        fits = isinstance(numbers, list) and len(numbers) == (count or 1)
        if not fits or not all(type(x) in NUMBERS and abs(x) < math.inf for x in numbers):
            raise ConfigError(f"{source}: entry {number}: {key} is {value!r}, not {expected}")


def _scene(
    truth: GroundTruth,
    file_names: Mapping[Any, str],
    found: Sequence[Record],
    boxes: Sequence[Any],
    scores: Sequence[float],
    with_masks: bool,
) -> Scene:
    true = truth.coco.dataset["annotations"]
    images = [truth.coco.imgs[k + 1] for k in range(len(truth.image_ids))]
    dt_image, dt_class = _indices(found)
    gt_image, gt_class = _indices(true)
    dt, gt = np.lexsort((dt_class, dt_image)), np.lexsort((gt_class, gt_image))
    masks = [_mask(x, images[x["image_id"] - 1], truth) for x in true] if with_masks else []
    drawn = [k for k in range(len(masks)) if isinstance(true[k]["segmentation"], list)]
    if empty := [k for k in drawn if not coco_mask.area(masks[k])]:
        logger.warning(
            "%s: no mask can match %s whose polygons enclose no pixel, such as entry %d",
            *(truth.json_file, counted(len(empty), "annotation"), empty[0]),
        )
    gt_box = [x.get("bbox") or coco_mask.toBbox(masks[k]).tolist() for k, x in enumerate(true)]
    lenient = {(k, c - 1) for k, x in enumerate(images) for c in x["not_exhaustive_category_ids"]}
    return Scene(
        image_ids=truth.image_ids,
        file_names=[file_names[x] for x in truth.image_ids],
        image_hw=np.array([[x["height"], x["width"]] for x in images]),
        class_names=[str(x) for x in truth.class_names],
        dt_image=dt_image[dt],
        dt_class=dt_class[dt],
        dt_score=np.array(scores, float)[dt],
        dt_mask_score=np.array([x["score"] for x in found], float)[dt],
        dt_box=np.array(boxes, float).reshape(-1, 4)[dt],
        dt_mask=[found[k]["segmentation"] for k in dt] if with_masks else None,
        gt_image=gt_image[gt],
        gt_class=gt_class[gt],
        gt_crowd=np.array([x["iscrowd"] for x in true], bool)[gt],
        gt_area=np.array([x["area"] for x in true], float)[gt],
        gt_box=np.array(gt_box, float).reshape(-1, 4)[gt],
        gt_mask=[masks[k] for k in gt] if with_masks else None,
        lenient=frozenset(lenient) if truth.is_lvis else frozenset(),
    )


def _indices(records: Sequence[Record]) -> tuple[IntArray, IntArray]:
    """Returns the image indices and the class indices of the evaluator's records."""
    images, classes = ([x[key] for x in records] for key in ("image_id", "category_id"))
    return np.array(images, np.int64) - 1, np.array(classes, np.int64) - 1


def _mask(annotation: Record, image: Record, truth: GroundTruth) -> Any:
    """Returns an object's mask as compressed RLE; it is empty if the polygons enclose no pixel.

    Raises:
        ConfigError: if the polygons are invalid.
    """
    image_hw = image["height"], image["width"]
    try:
        rle = annotation_rle(annotation["segmentation"], image_hw)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{truth.json_file}, annotations: entry {annotation['id'] - 1}: its segmentation "
            f"cannot be read: {one_line(error)}"
        ) from None
    return as_bytes(rle or coco_mask.encode(np.zeros(image_hw, np.uint8, order="F")))
