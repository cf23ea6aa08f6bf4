"""Computes metrics of semantic segmentation from instances: how many pixels get the right class.

For each image, the ground truth and the predictions are painted into two semantic maps, which are
compared pixel by pixel. The metrics have the names, units and rules of detectron2's
SemSegEvaluator.

The values in a semantic map are 0 for background, k + 1 for the contiguous class k, and IGNORED for
pixels that do not count.

Shape alphabet: H, W image height and width in pixels; K classes without background.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_util

from ..progress import progress
from ..run_lengths import annotation_rle, check_rle_size

SemanticMap = npt.NDArray[np.int32]
Confusion = npt.NDArray[np.int64]

IGNORED = -1
BACKGROUND = "background"


def semantic_map(
    rles: Sequence[Mapping[str, Any]],
    classes: Sequence[int],
    scores: Sequence[float],
    image_hw: tuple[int, int],
    threshold: float,
) -> SemanticMap:
    """Paints an image's detections into an (H, W) map. Where they overlap, the best score wins.

    Args:
        rles: run lengths of each detection's mask, with compressed counts as bytes or str.
        classes: contiguous class of each detection, 0 to K - 1.
        scores: score of each detection. If scores are equal, the first detection wins.
        image_hw: height and width of the image in pixels.
        threshold: detections with a lower score are dropped.

    Raises:
        ValueError: if the arguments differ in length, or the size of an RLE is not image_hw.
    """
    for rle in rles:
        check_rle_size(rle, image_hw)
    kept = [x for x in zip(scores, rles, classes, strict=True) if x[0] >= threshold]
    # The detection that is painted last is on top. Because of the reversal and the stable sort,
    # this is the first of several detections with equal scores.
    kept = sorted(reversed(kept), key=lambda x: x[0])
    return _paint([(rle, k + 1) for _, rle, k in kept], image_hw)


def ground_truth_map(
    annotations: Iterable[Mapping[str, Any]],
    image_hw: tuple[int, int],
    contiguous_id: Mapping[int, int],
) -> SemanticMap:
    """Paints an image's annotations into an (H, W) map. Where they overlap, the smallest wins.

    The size of an annotation is the number of pixels in its mask. If sizes are equal, the later
    annotation wins. Pixels of crowds are IGNORED, because the loose outlines of crowds include
    background. If an ordinary object also covers a pixel, its class counts, because outlines of
    ordinary objects are exact. An annotation without a polygon of at least three points covers
    nothing.

    Args:
        annotations: COCO annotations with ``category_id``, ``segmentation`` (polygons, or an RLE
            with compressed or uncompressed counts) and optionally ``iscrowd``.
        image_hw: height and width of the image in pixels.
        contiguous_id: maps the file's category ids to classes 0 to K - 1.

    Raises:
        KeyError: if a category id is not in contiguous_id.
        ValueError: if the size of an RLE is not image_hw, or its counts do not add up to this size.
    """
    layers = []
    for annotation in annotations:
        value = _contiguous_class(annotation, contiguous_id) + 1
        rle = annotation_rle(annotation.get("segmentation"), image_hw)
        if rle is not None:
            is_ordinary = not annotation.get("iscrowd", 0)
            area = int(mask_util.area(rle))
            layers.append((is_ordinary, -area, rle, value if is_ordinary else IGNORED))
    layers.sort(key=lambda layer: layer[:2])  # crowds first, then objects from large to small
    return _paint([layer[2:] for layer in layers], image_hw)


def confusion_matrix(truth: SemanticMap, predicted: SemanticMap, num_classes: int) -> Confusion:
    """Counts pixels by true class (rows) and predicted class (columns), (K + 1, K + 1).

    Args:
        truth: (H, W) map with values 0 to K; IGNORED pixels are left out.
        predicted: (H, W) map with values 0 to K.
        num_classes: K, without background.

    Raises:
        ValueError: if the maps differ in shape or have other values.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth is {truth.shape} and predicted {predicted.shape}")
    for name, values, least in (("truth", truth, IGNORED), ("predicted", predicted, 0)):
        if ((values < least) | (values > num_classes)).any():
            raise ValueError(f"{name} has values outside the range {least} to {num_classes}")
    side = num_classes + 1
    kept = truth != IGNORED
    pairs = truth[kept].astype(np.int64) * side + predicted[kept]
    return np.bincount(pairs, minlength=side * side).reshape(side, side).astype(np.int64)


def semantic_metrics(confusion: Confusion, class_names: Sequence[str]) -> dict[str, float]:
    """Returns SemSegEvaluator's metrics in percent.

    These are mIoU, fwIoU, mACC, pACC and, for each class, IoU-<name> and ACC-<name>. The background
    counts as a class; it comes first and is named "background". The metrics of a class without
    ground-truth pixels are nan and are left out of the means, but its predictions count as errors
    of the classes that they cover.

    Differs from SemSegEvaluator: boundary IoU is not computed, and fwIoU, like the other means, is
    nan instead of 0 if no pixel counts.

    Args:
        confusion: (K + 1, K + 1) result of ``confusion_matrix``, summed over images.
        class_names: K different names without background.

    Raises:
        ValueError: if the matrix has the wrong shape for this number of names, or if a name occurs
            twice or is "background".
    """
    names = check_class_names(class_names)
    if confusion.shape != (len(names), len(names)):
        raise ValueError(
            f"confusion has the shape {confusion.shape}, which does not fit {len(class_names)} "
            "class_names"
        )
    hits, true_pixels = confusion.diagonal().astype(float), confusion.sum(axis=1)
    union = true_pixels + confusion.sum(axis=0) - hits
    valid = true_pixels > 0
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan, as intended
        iou = np.where(valid, hits / union, np.nan)  # nan even if a class occurs in predictions
        accuracy = hits / true_pixels
        metrics = {
            "mIoU": iou[valid].sum() / valid.sum(),
            "fwIoU": (iou * true_pixels)[valid].sum() / true_pixels.sum(),
            **{f"IoU-{name}": value for name, value in zip(names, iou, strict=True)},
            "mACC": accuracy[valid].sum() / valid.sum(),
            "pACC": hits.sum() / true_pixels.sum(),
            **{f"ACC-{name}": value for name, value in zip(names, accuracy, strict=True)},
        }
    return {name: 100 * float(value) for name, value in metrics.items()}


def evaluate_semantic(
    coco: Any,
    results: Iterable[Mapping[str, Any]],
    image_ids: Collection[int],
    contiguous_id: Mapping[int, int],
    class_names: Sequence[str],
    threshold: float,
) -> dict[str, float]:
    """Computes ``semantic_metrics`` over images of a COCO file.

    Args:
        coco: pycocotools' COCO, or an object that also has ``imgs`` and ``imgToAnns``.
        results: results in COCO's format, with the file's category ids and with RLEs as
            segmentation. If a result has a ``mask_score``, it is used instead of the score. Results
            of other images are ignored.
        image_ids: ids of the images to evaluate, including images without results.
        contiguous_id: maps the file's category ids to classes 0 to K - 1.
        class_names: K names in the order of these classes.
        threshold: lowest score of a detection that counts.

    Raises:
        KeyError: if an image is not in the file, or a category id is not in contiguous_id.
        ValueError: if the size of an RLE differs from its image; the message names the image. Also
            if class names are wrong as in ``semantic_metrics``.
    """
    check_class_names(class_names)  # fails before the work starts instead of after it
    results_of = defaultdict(list)
    for result in results:
        results_of[result["image_id"]].append(result)
    confusion = np.zeros((len(class_names) + 1, len(class_names) + 1), np.int64)
    for image_id in progress(image_ids, "semantic maps", "image"):
        if image_id not in coco.imgs:
            raise KeyError(f"image_ids has {image_id}, which is not among the file's images")
        image_hw = (coco.imgs[image_id]["height"], coco.imgs[image_id]["width"])
        found = results_of.get(image_id, [])
        try:
            predicted = semantic_map(
                [result["segmentation"] for result in found],
                [_contiguous_class(result, contiguous_id) for result in found],
                [result.get("mask_score", result["score"]) for result in found],
                image_hw,
                threshold,
            )
            truth = ground_truth_map(coco.imgToAnns.get(image_id, []), image_hw, contiguous_id)
            confusion += confusion_matrix(truth, predicted, len(class_names))
        except ValueError as error:
            raise ValueError(f"image {image_id}: {error}") from error
    return semantic_metrics(confusion, class_names)


def _paint(layers: Iterable[tuple[Any, int]], image_hw: tuple[int, int]) -> SemanticMap:
    """Paints (RLE, value) pairs onto a map of background, with the last pair on top."""
    # In Fortran order, like the decoded masks, so that both are read in the order of memory.
    painted = np.zeros(image_hw, np.int32, order="F")
    for rle, value in layers:
        np.copyto(painted, value, where=mask_util.decode(rle).view(np.bool_))
    return painted


def _contiguous_class(record: Mapping[str, Any], contiguous_id: Mapping[int, int]) -> int:
    if record["category_id"] not in contiguous_id:
        raise KeyError(f"the category_id {record['category_id']} is not in contiguous_id")
    return contiguous_id[record["category_id"]]


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """Returns the names, preceded by background.

    Raises:
        ValueError: if a name occurs twice or is "background".
    """
    names = [BACKGROUND, *class_names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"class_names must be unique and must not include {BACKGROUND!r}; repeated: {twice}"
        )
    return names
