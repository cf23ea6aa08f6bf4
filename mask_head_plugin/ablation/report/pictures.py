"""Shows the validation images on which an ablation's variants disagree, side by side."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...config import ConfigError, load_config
from ...data import register_coco_files
from ...evaluation.drawing import ByteArray, class_colour, draw_instances, in_grey, scaled
from ...evaluation.image_counts import MIN_SCORE, ImageCounts, image_counts, most_disputed
from ...evaluation.matching import Matches
from ...image_files import read_image
from ...messages import counted, one_line
from ...pages.pictures import (
    MOST_BYTES,
    Picture,
    css_colour,
    data_uri,
    resized_mask,
)
from ...run_lengths import annotation_rle
from ..trial_folder import Trial
from .study import Study

logger = logging.getLogger(__name__)

SIDE = 250
"""Length of a picture's longer side, in pixels."""
Rle = Mapping[str, Any]
Instance = tuple[int, Rle]
"""A class index and a mask."""


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures, one row for each image.

    Attributes:
        rows: for each image, its name and its pictures, ground truth first.
        classes: name and CSS colour of each class shown.
        problem: why there are no pictures; empty if there are some.
    """

    rows: list[tuple[str, list[Picture]]]
    classes: list[tuple[str, str]]
    problem: str = ""


def side_by_side(study: Study) -> Gallery:
    """Draws the images whose F1 differs most between variants.

    Each variant is represented by its first finished trial that evaluated masks. If no image can be
    shown, the returned gallery has no rows and gives the reason.
    """
    shown = {t: m for v in study.variants for t, m in _first_with_masks(v.finished)}
    if not shown:
        return Gallery([], [], "No finished trial has evaluated masks.")
    try:
        records, names = _dataset(next(iter(shown)), study.dataset)
        _check_classes(next(iter(shown.values())), study.dataset)
        return _draw(shown, records, names)
    except (ConfigError, OSError, KeyError, ValueError, SyntaxError) as error:
        logger.warning("the report has no pictures of %s: %s", study.dataset, error)
        reason = one_line(error)
        return Gallery([], [], f"The images of {study.dataset} cannot be shown: {reason}")


def _first_with_masks(trials: Iterable[Trial]) -> list[tuple[Trial, Matches]]:
    """Returns the first trial that evaluated masks, with its matches; empty if there is none."""
    for trial in trials:
        has_masks = "segm" in (trial.record().get("results") or {})
        matches = trial.matches("segm") if has_masks else None
        if matches is not None:
            return [(trial, matches)]
    return []


def _dataset(trial: Trial, name: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns detectron2's records by image id (as text), and the class names."""
    path = trial.folder / "config.yaml"
    if path.is_file():
        register_coco_files(load_config(str(path)))
    if name not in DatasetCatalog.list():
        raise ConfigError("the data set is not registered")
    records = {str(record["image_id"]): record for record in DatasetCatalog.get(name)}
    return records, list(MetadataCatalog.get(name).thing_classes)


def _draw(
    shown: Mapping[Trial, Matches], records: Mapping[str, dict[str, Any]], names: Sequence[str]
) -> Gallery:
    counts = {trial: image_counts(matches) for trial, matches in shown.items()}
    first = next(iter(shown.values()))
    chosen = most_disputed(list(counts.values()))
    if not chosen:
        return Gallery(
            [],
            [],
            f"All variants have the same F1 on every image (IoU 0.5, score {MIN_SCORE} or more).",
        )
    ids = [str(first.image_ids[k]) for k in chosen]
    predicted = {trial: _predictions(trial, ids) for trial in shown}
    rows: list[tuple[str, list[Picture]]] = []
    classes: set[int] = set()
    size = 0
    for k, image_id in zip(chosen, ids, strict=True):
        record = records[image_id]
        truth = _true_masks(record)
        image = read_image(record["file_name"], "RGB")
        image = in_grey(scaled(image, SIDE / max(image.shape[:2])))
        row = [_picture(image, "ground truth", counted(len(truth), "object"), truth, names)]
        for trial, found in predicted.items():
            title = f"{trial.variant}, seed {trial.seed}"
            row.append(_picture(image, title, _note(counts[trial], k), found[image_id], names))
            classes.update(index for index, _ in found[image_id])
        classes.update(index for index, _ in truth)
        size += sum(len(picture.uri) for picture in row)
        if rows and size > MOST_BYTES:
            break
        rows.append((record["file_name"].rpartition("/")[2], row))
    return Gallery(rows, [(names[k], css_colour(class_colour(k))) for k in sorted(classes)])


def _predictions(trial: Trial, ids: Sequence[str]) -> dict[str, list[Instance]]:
    """Returns the confident detections by image id (as text), best first."""
    results = json.loads((trial.inference / "coco_instances_results.json").read_text())
    found: dict[str, list[tuple[float, Any, Rle]]] = {image_id: [] for image_id in ids}
    for result in results:
        score = result.get("mask_score", result["score"])  # the score that ranks masks
        if str(result["image_id"]) in found and score >= MIN_SCORE and "segmentation" in result:
            entry = (score, result["category_id"], result["segmentation"])
            found[str(result["image_id"])].append(entry)
    index_of = _class_indices(trial.dataset)
    return {
        image_id: [(index_of(category), rle) for _, category, rle in sorted(entries, key=_score)]
        for image_id, entries in found.items()
    }


def _check_classes(matches: Matches, dataset: str) -> None:
    """Raises ValueError if the data set's classes have changed since the evaluation.

    Detections are stored with category ids, which no longer identify the classes after such a
    change.
    """
    metadata = MetadataCatalog.get(dataset)
    names = list(map(str, matches.class_names))
    if metadata.get("from_coco_files", False) and names != metadata.thing_classes:
        raise ValueError("its categories have changed since the trials were evaluated")


def _score(entry: tuple[float, Any, Rle]) -> float:
    return -entry[0]


def _class_indices(dataset: str) -> Any:
    """Returns a function that maps a category id of the annotation file to a class index."""
    metadata = MetadataCatalog.get(dataset)
    mapping = metadata.get("thing_dataset_id_to_contiguous_id")
    if mapping:
        return mapping.__getitem__
    return lambda category: category  # without ids, MaskEvaluator numbers categories from 0


def _true_masks(record: Mapping[str, Any]) -> list[Instance]:
    """Returns the objects of an image except crowds."""
    image_hw = record["height"], record["width"]
    return [
        (annotation["category_id"], rle)
        for annotation in record.get("annotations", ())
        if not annotation.get("iscrowd", 0)
        and (rle := annotation_rle(annotation.get("segmentation"), image_hw))
    ]


def _picture(
    image: ByteArray, title: str, note: str, instances: Sequence[Instance], names: Sequence[str]
) -> Picture:
    """Draws instances into an already scaled image."""
    size = (image.shape[1], image.shape[0])
    rles = [resized_mask(rle, size) for _, rle in instances]
    labels = [names[k] for k, _ in instances]
    colours = [class_colour(k) for k, _ in instances]
    drawn = draw_instances(image, labels, colours, np.zeros((len(rles), 4)), rles)
    return Picture(title, note, data_uri(drawn))


def _note(counts: ImageCounts, k: int) -> str:
    false = int(counts.detections[k] - counts.found[k])
    return f"{counts.found[k]} of {counts.objects[k]} found, {false} false, F1 {counts.f1[k]:.2f}"
