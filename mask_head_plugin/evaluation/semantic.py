"""Semantic metrics for instance results: how many pixels get the right class.

Instances are painted into one map of classes per image, for ground truth and for predictions, and
the two maps are compared pixel by pixel. The numbers have the names, units and rules of
detectron2's SemSegEvaluator.

In a map, 0 is background, k + 1 is the contiguous class k, and IGNORED is a pixel that does not
count.

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
    """Returns the (H, W) map of an image's detections; a pixel gets the best-scored one covering
    it.

    Args:
        rles: a COCO RLE with compressed counts, bytes or str, of each detection.
        classes: their contiguous classes, 0 to K - 1.
        scores: what ranks them; of equal scores the first comes out on top.
        image_hw: height and width of the image in pixels.
        threshold: detections with a lower score are dropped; one that equals it is kept.

    Raises:
        ValueError: if the arguments differ in length, or the size of any RLE is not image_hw.
    """
    for rle in rles:
        check_rle_size(rle, image_hw)
    kept = [x for x in zip(scores, rles, classes, strict=True) if x[0] >= threshold]
    # The last one painted is on top: in a stable sort of the reversed list, the first of a tie.
    kept = sorted(reversed(kept), key=lambda x: x[0])
    return _paint([(rle, k + 1) for _, rle, k in kept], image_hw)


def ground_truth_map(
    annotations: Iterable[Mapping[str, Any]],
    image_hw: tuple[int, int],
    contiguous_id: Mapping[int, int],
) -> SemanticMap:
    """Returns the (H, W) map of an image's annotations; a pixel gets the smallest one covering it.

    The size is the mask's number of pixels; among equals, the later annotation is on top. Pixels of
    crowd regions are IGNORED, because their outlines are loose and include background, unless an
    ordinary instance also covers them: its outline is exact, so their class is known. An annotation
    without a polygon of three points covers nothing.

    Args:
        annotations: COCO annotations: ``category_id``, ``segmentation`` (polygons, or an RLE with
            compressed or uncompressed counts) and optionally ``iscrowd``.
        image_hw: height and width of the image in pixels.
        contiguous_id: maps the file's category ids to classes 0 to K - 1.

    Raises:
        KeyError: if a category id is not in contiguous_id.
        ValueError: if the size of an RLE is not image_hw or its counts do not add up to it.
    """
    layers = []
    for annotation in annotations:
        value = _contiguous_class(annotation, contiguous_id) + 1
        rle = annotation_rle(annotation.get("segmentation"), image_hw)
        if rle is not None:
            is_ordinary = not annotation.get("iscrowd", 0)
            area = int(mask_util.area(rle))
            layers.append((is_ordinary, -area, rle, value if is_ordinary else IGNORED))
    layers.sort(key=lambda layer: layer[:2])  # crowds lowest, then from large to small
    return _paint([layer[2:] for layer in layers], image_hw)


def confusion_matrix(truth: SemanticMap, predicted: SemanticMap, num_classes: int) -> Confusion:
    """Returns the (K + 1, K + 1) counts of pixels: rows are the truth, columns the prediction.

    Args:
        truth: (H, W) of 0 to K; pixels that are IGNORED are left out.
        predicted: (H, W) of 0 to K.
        num_classes: K, without background.

    Raises:
        ValueError: if the maps differ in shape or have other values.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth is {truth.shape} and predicted {predicted.shape}")
    for name, values, least in (("truth", truth, IGNORED), ("predicted", predicted, 0)):
        if ((values < least) | (values > num_classes)).any():
            raise ValueError(f"{name} has other values than {least} to {num_classes}")
    side = num_classes + 1
    kept = truth != IGNORED
    pairs = truth[kept].astype(np.int64) * side + predicted[kept]
    return np.bincount(pairs, minlength=side * side).reshape(side, side).astype(np.int64)


def semantic_metrics(confusion: Confusion, class_names: Sequence[str]) -> dict[str, float]:
    """Returns SemSegEvaluator's metrics in percent: mIoU, fwIoU, mACC, pACC, IoU- and ACC-<name>.

    Background is a class like the others, first and named "background". A class without
    ground-truth pixels is nan and does not enter the means, but predictions of it count against the
    classes that they cover.

    Differs from SemSegEvaluator: there is no boundary IoU; without any pixel, fwIoU is nan like the
    other means, not 0.

    Args:
        confusion: (K + 1, K + 1) of ``confusion_matrix``, summed over images.
        class_names: K different names without background.

    Raises:
        ValueError: if the names do not fit the matrix, or a name occurs twice or is "background".
    """
    names = check_class_names(class_names)
    if confusion.shape != (len(names), len(names)):
        raise ValueError(f"{len(class_names)} class_names and a confusion of {confusion.shape}")
    hits, true_pixels = confusion.diagonal().astype(float), confusion.sum(axis=1)
    union = true_pixels + confusion.sum(axis=0) - hits
    valid = true_pixels > 0
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that we want
        iou = np.where(valid, hits / union, np.nan)  # not 0 where a class is only predicted
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
    """Returns the metrics of ``semantic_metrics`` over images of a COCO file.

    Args:
        coco: pycocotools' COCO, or an object with its ``imgs`` and ``imgToAnns``.
        results: COCO's list of results, with the file's category ids and RLEs as segmentation.
            A ``mask_score`` takes the place of the score. Results of other images are ignored.
        image_ids: the images to count, with or without results.
        contiguous_id: maps the file's category ids to classes 0 to K - 1.
        class_names: K names in the order of these classes.
        threshold: lowest score of a detection that counts.

    Raises:
        KeyError: if an image is not in the file or a category id not in contiguous_id.
        ValueError: if the size of an RLE is not its image's (names the image); for class names, as
            in ``semantic_metrics``.
    """
    check_class_names(class_names)  # before the work, not afterwards
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
    """Returns a background map with (RLE, value) pairs painted into it, the last on top."""
    # Column by column like the decoded masks, so that both are read in the order of memory.
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
        raise ValueError(f"class_names must differ, also from our {BACKGROUND!r}; twice: {twice}")
    return names
