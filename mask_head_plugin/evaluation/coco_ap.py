"""Computes the AP of one task by COCO's or LVIS's rules with the engine faster-coco-eval.

Images, classes and annotations are renumbered from 1 for the engine. The ids in the file can
therefore be text, can exceed float64's exact range, and can include the annotation id 0, which
pycocotools would mistake for "unmatched".
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask

from ..messages import counted
from ..progress import progress
from ..run_lengths import annotation_rle
from .boundary import limit_by_boundary
from .matching import BoolArray, FloatArray, Matches, Pairs, match

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm", "boundary")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""Metrics in percent. A metric is nan if there are no objects that it counts."""

COCO_MAX_DETECTIONS = 100
ALL_DETECTIONS = -1
LVIS_MAX_DETECTIONS = 300
AREA_SUFFIXES = {"small": "s", "medium": "m", "large": "l"}
FREQUENCIES = ("r", "c", "f")

Pair = tuple[int, int]
"""An image and a class, by the engine's ids."""


class GroundTruth:
    """A COCO or LVIS annotation file.

    Attributes:
        image_ids: ids in the file, in ascending order. The engine's id of image_ids[k] is k + 1.
        category_ids: ids in the file, in ascending order. The engine's id of category_ids[k] is
            k + 1.
        class_names: names of the categories.
        is_lvis: whether images list the classes that were searched for (federated annotation).
        has_annotations: whether the file has a list of annotations. The list is missing in files of
            test images; if it is empty, the images have no objects.
        has_masks: whether any annotation has a segmentation. True if there are no annotations.
        coco: the engine's COCO object.
    """

    def __init__(self, json_file: str, *, is_lvis: bool = False) -> None:
        """
        Args:
            json_file: path of the annotation file.
            is_lvis: whether to evaluate by LVIS's rules.

        Raises:
            ValueError: if the file is not a COCO file, or an annotation refers to an unknown image
                or category. The message names the file and the annotation's id.
        """
        content = json.loads(Path(json_file).read_text())
        missing = [key for key in ("images", "categories") if key not in content]
        if missing:
            raise ValueError(f"{json_file} is not a COCO file: it has no {missing}")
        for key, needed in (("images", ("id",)), ("categories", ("id", "name"))):
            for number, x in enumerate(content[key]):
                if any(name not in x for name in needed):
                    raise ValueError(f"{json_file}: entry {number} of {key} lacks one of {needed}")
        self.json_file, self.is_lvis = json_file, is_lvis
        self.image_ids = sorted((x["id"] for x in content["images"]), key=_text_last)
        categories = sorted(content["categories"], key=lambda x: _text_last(x["id"]))
        self.category_ids = [x["id"] for x in categories]
        self.class_names = [x["name"] for x in categories]
        self._image_numbers = {x: k + 1 for k, x in enumerate(self.image_ids)}
        self._category_numbers = {x: k + 1 for k, x in enumerate(self.category_ids)}
        self.has_annotations = content.get("annotations") is not None
        annotations = content.get("annotations") or []
        without_mask = [x.get("id") for x in annotations if not x.get("segmentation")]
        self.has_masks = not annotations or len(without_mask) < len(annotations)
        if self.has_masks and without_mask:
            logger.warning(
                "%s: %s without a mask, for example %r, cannot match any predicted mask",
                json_file,
                counted(len(without_mask), "annotation"),
                without_mask[0],
            )
        images = sorted(content["images"], key=lambda x: _text_last(x["id"]))
        self._sizes = {x["id"]: (x.get("height"), x.get("width")) for x in images}
        self.coco = COCO()
        self.coco.dataset = {
            "images": [self._image(x) for x in images],
            "categories": [
                {"id": k + 1, "name": x["name"], "frequency": x.get("frequency", "f")}
                for k, x in enumerate(categories)
            ],
            "annotations": [self._annotation(k + 1, x) for k, x in enumerate(annotations)],
        }
        self.coco.createIndex()

    def _image(self, image: Mapping[str, Any]) -> dict[str, Any]:
        height, width = self._sizes[image["id"]]
        if self.has_masks and not (height and width):
            raise ValueError(f"{self.json_file}: image {image['id']!r} has no height and width")
        listed = {}
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            unknown = set(image.get(key, [])) - set(self.category_ids)
            if unknown:
                raise ValueError(
                    f"{self.json_file}: {key} of image {image['id']!r} has ids that are not among "
                    f"the categories: {unknown}"
                )
            listed[key] = [self._category_numbers[x] for x in image.get(key, [])]
        number = self._image_numbers[image["id"]]
        return {"id": number, "height": height or 0, "width": width or 0, **listed}

    def _annotation(self, number: int, annotation: Mapping[str, Any]) -> dict[str, Any]:
        if not {"image_id", "category_id"} <= annotation.keys():
            raise ValueError(
                f"{self.json_file}: annotation {annotation.get('id')!r} has no image_id or "
                "category_id"
            )
        try:
            image = self._image_numbers[annotation["image_id"]]
            category = self._category_numbers[annotation["category_id"]]
        except KeyError as error:
            raise ValueError(
                f"{self.json_file}: annotation {annotation.get('id')!r} names image "
                f"{annotation['image_id']!r} and category {annotation['category_id']!r}; the id "
                f"{error} is not in the file"
            ) from error
        copied = {"bbox": annotation["bbox"]} if annotation.get("bbox") else {}
        if self.has_masks:
            copied["segmentation"] = self._segmentation(annotation)
        return {
            **copied,
            "id": number,
            "image_id": image,
            "category_id": category,
            "iscrowd": int(annotation.get("iscrowd") or 0),
            "area": self._area(annotation, copied),
        }

    def _area(self, annotation: Mapping[str, Any], copied: Mapping[str, Any]) -> Any:
        """Returns the area from the file or, if it is missing, the area of the box or the mask."""
        if annotation.get("area") is not None:
            return annotation["area"]
        if "bbox" in copied:
            return copied["bbox"][2] * copied["bbox"][3]
        image_hw = self._sizes[annotation["image_id"]]
        rle = annotation_rle(copied.get("segmentation"), image_hw)
        return int(coco_mask.area(as_bytes(rle))) if rle else 0

    def _segmentation(self, annotation: Mapping[str, Any]) -> Any:
        """Returns an annotation's segmentation. Checks run lengths, because the engine does not."""
        found, image_hw = annotation.get("segmentation"), self._sizes[annotation["image_id"]]
        if not found:
            return coco_mask.encode(np.zeros(image_hw, np.uint8, order="F"))
        if isinstance(found, list):
            return found
        try:
            return annotation_rle(found, image_hw)
        except ValueError as error:
            raise ValueError(
                f"{self.json_file}: annotation {annotation.get('id')!r}: {error}"
            ) from error

    def detections(self, results: Iterable[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
        """Converts COCO results to the engine's annotations.

        Args:
            results: dictionaries with ``image_id``, ``category_id`` and ``score``. Boxes also need
                ``bbox``, and masks need ``segmentation`` (compressed RLE). If there is a
                ``mask_score``, masks are ranked by it.
            task: "bbox" or "segm".

        Returns:
            The detections of the file's categories. For LVIS, only those that count by its rules.

        Raises:
            ValueError: if an image is not in the file, the size of a mask differs from its image,
                or the file has no boxes or masks to compare with.
        """
        if task != "bbox" and not self.has_masks:
            raise ValueError(f"{self.json_file} has no masks to compare with")
        for number, x in enumerate(self.coco.dataset["annotations"] if task == "bbox" else ()):
            if "bbox" not in x:
                raise ValueError(f"{self.json_file}: entry {number} of annotations has no bbox")
        found: list[dict[str, Any]] = []
        for number, result in enumerate(results):
            if result["image_id"] not in self._image_numbers:
                raise ValueError(
                    f"a prediction has image id {result['image_id']!r}, which {self.json_file} "
                    "lacks"
                )
            if result["category_id"] not in self._category_numbers:
                continue  # the model has a class that is not in this file
            detection: dict[str, Any] = {
                "id": number + 1,
                "image_id": self._image_numbers[result["image_id"]],
                "category_id": self._category_numbers[result["category_id"]],
                "iscrowd": 0,
            }
            if task == "bbox":
                box = result["bbox"]
                detection |= {"score": result["score"], "bbox": box, "area": box[2] * box[3]}
            else:
                detection["score"] = result.get("mask_score", result["score"])
                self._check_size(detection["image_id"], result["segmentation"])
                # One at a time, because with NumPy 2 pycocotools fails on lists of more than 255.
                area = int(coco_mask.area(as_bytes(result["segmentation"])))
                detection |= {"segmentation": result["segmentation"], "area": area}
            found.append(detection)
        return self._as_lvis(found) if self.is_lvis else found

    def _check_size(self, image: int, rle: Mapping[str, Any]) -> None:
        size = [self.coco.imgs[image][side] for side in ("height", "width")]
        if list(rle["size"]) != size:
            raise ValueError(
                f"image {self.image_ids[image - 1]!r} of {self.json_file} has the size {size}, but "
                f"a predicted mask has {list(rle['size'])}"
            )

    def _as_lvis(self, detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Keeps the best detections of each image if their class was searched for in that image."""
        per_image = defaultdict(list)
        for detection in detections:
            per_image[detection["image_id"]].append(detection)
        kept = []
        for image, found in per_image.items():
            listed = set(self.coco.imgs[image]["neg_category_ids"])
            listed |= {x["category_id"] for x in self.coco.imgToAnns.get(image, [])}
            best = sorted(found, key=lambda x: -x["score"])[:LVIS_MAX_DETECTIONS]
            kept += [x for x in best if x["category_id"] in listed]
        return kept


class Evaluation:
    """The engine's result for one task.

    Attributes:
        ious: (d, g) IoUs for each image and class that have detections and objects; see Matches for
            the order of the detections.
        precision: (T, 101, K, A), the precision at each recall; -1 for a class without objects.
        recall: (T, K, A); -1 for a class without objects. Like the precision, it is computed from
            the best detections, up to ``limit``.
    """

    def __init__(
        self,
        truth: GroundTruth,
        detections: list[dict[str, Any]],
        task: str,
        max_detections: int = COCO_MAX_DETECTIONS,
        ious: Mapping[Pair, FloatArray] | None = None,
    ) -> None:
        """
        Args:
            truth: the ground truth.
            detections: from ``truth.detections``.
            task: "bbox" or "segm".
            max_detections: how many detections count per image and class; a negative value counts
                all. Ignored for LVIS.
            ious: IoUs to use instead of those that the engine computes.
        """
        self.truth, self.detections, self.max_detections = truth, detections, max_detections
        found = COCO()
        found.dataset = {**truth.coco.dataset, "annotations": detections}
        found.createIndex()
        engine = COCOeval_faster(
            truth.coco, found, task, print_function=_say_nothing, lvis_style=truth.is_lvis
        )
        # By LVIS's rules, the limit applies to an image, not to a class in an image.
        limit = max_detections if max_detections >= 0 else max(len(detections), 1)
        self.limit = LVIS_MAX_DETECTIONS if truth.is_lvis else limit
        engine.params.maxDets = [self.limit]
        if ious is not None:
            engine.computeIoU = lambda image, category: ious[image, category]
        engine.evaluate()
        engine.accumulate()
        self.ious = {pair: np.asarray(x) for pair, x in engine.ious.items() if len(x)}
        self.precision = np.asarray(engine.eval["precision"])[..., -1]
        self.recall = np.asarray(engine.eval["recall"])[..., -1]
        self.thresholds: FloatArray = engine.params.iouThrs
        self.area_names: list[str] = engine.params.areaRngLbl
        self._area_ranges = np.asarray(engine.params.areaRng, float)

    def metrics(self, classes: Sequence[int] | None = None) -> dict[str, float]:
        """Returns AP, AP50, AP75, APs, APm, APl and AR in percent; see METRICS.

        Args:
            classes: indices of the classes to average over; None averages over all classes.
        """
        chosen = slice(None) if classes is None else list(classes)
        precision, recall = self.precision[:, :, chosen], self.recall[:, chosen]
        at50, at75 = (int(np.abs(self.thresholds - t).argmin()) for t in (0.5, 0.75))
        parts = {
            "AP": precision[..., 0],
            "AP50": precision[at50, ..., 0],
            "AP75": precision[at75, ..., 0],
            **{
                f"AP{suffix}": precision[..., self.area_names.index(name)]
                for name, suffix in AREA_SUFFIXES.items()
            },
            "AR": recall[..., 0],
        }
        return {name: _mean_percent(values) for name, values in parts.items()}

    def frequency_metrics(self) -> dict[str, float]:
        """Returns LVIS's APr, APc and APf, for rare, common and frequent classes."""
        frequencies = [x["frequency"] for x in self.truth.coco.dataset["categories"]]
        return {
            f"AP{letter}": self.metrics([k for k, x in enumerate(frequencies) if x == letter])["AP"]
            for letter in FREQUENCIES
        }

    def with_boundaries(self) -> Evaluation:
        """Returns an evaluation that uses the boundary IoU where it is lower than the mask IoU."""
        objects, detections = self._by_pair()
        ious = {}
        for pair, values in progress(self.ious.items(), "boundary IoU", total=len(self.ious)):
            ious[pair] = limit_by_boundary(
                values,
                [as_bytes(x["segmentation"]) for x in detections[pair]],
                [as_bytes(x["rle"]) for x in objects[pair]],
                [bool(x["iscrowd"]) for x in objects[pair]],
            )
        return Evaluation(self.truth, self.detections, "segm", self.max_detections, ious)

    def matches(self) -> Matches:
        """Returns the matches that the APs are computed from; see Matches."""
        objects, detections = self._by_pair()
        keys = sorted({*objects, *detections})
        found = [x for key in keys for x in detections.get(key, [])]
        true = [x for key in keys for x in objects.get(key, [])]
        num_detections = np.array([len(detections.get(key, [])) for key in keys], int)
        num_objects = np.array([len(objects.get(key, [])) for key in keys], int)
        crowd = np.array([x["iscrowd"] for x in true], bool)
        per_detection = num_objects.repeat(num_detections)
        no_ious = np.zeros(0)
        pairs = Pairs(
            num_detections,
            num_objects,
            np.concatenate([no_ious, *(self.ious.get(key, no_ious).ravel() for key in keys)]),
            np.cumsum(per_detection) - per_detection,
            crowd,
            crowd | self._is_outside(true),
            self._is_outside(found) | self._is_lenient(found),
        )
        partner, ignored = match(pairs, self.thresholds)
        return Matches(
            image_ids=np.array([str(x) for x in self.truth.image_ids], dtype=str),
            class_names=np.array(self.truth.class_names, dtype=str),
            area_names=np.array(self.area_names),
            iou_thresholds=self.thresholds,
            dt_image=np.array([x["image_id"] - 1 for x in found], np.int32),
            dt_class=np.array([x["category_id"] - 1 for x in found], np.int32),
            dt_score=np.array([x["score"] for x in found], float),
            dt_matched=partner >= 0,
            dt_ignored=ignored,
            gt_image=np.array([x["image_id"] - 1 for x in true], np.int32),
            gt_class=np.array([x["category_id"] - 1 for x in true], np.int32),
            gt_ignored=pairs.ignored,
        )

    def _by_pair(self) -> tuple[dict[Pair, list[Any]], dict[Pair, list[Any]]]:
        """Returns the objects of each pair, and the pair's best detections up to the limit."""
        grouped = []
        for items in (self.truth.coco.dataset["annotations"], self.detections):
            of_pair: dict[Pair, list[Any]] = defaultdict(list)
            for x in items:
                of_pair[x["image_id"], x["category_id"]].append(x)
            grouped.append(dict(of_pair))
        objects, detections = grouped
        for pair, found in detections.items():
            detections[pair] = sorted(found, key=lambda x: -x["score"])[: self.limit]
        return objects, detections

    def _is_lenient(self, detections: Sequence[Any]) -> BoolArray:
        """Returns whether a detection that finds no object must not count as wrong, (N,).

        This is the case for a class of which LVIS did not annotate all objects in the image.
        """
        lenient = np.zeros(len(detections), bool)
        if self.truth.is_lvis:
            for k, x in enumerate(detections):
                image = self.truth.coco.imgs[x["image_id"]]
                lenient[k] = x["category_id"] in image["not_exhaustive_category_ids"]
        return lenient

    def _is_outside(self, annotations: Sequence[Any]) -> Any:
        """Returns whether each annotation's area is outside each area range, (A, n)."""
        areas = np.array([x["area"] for x in annotations], float)
        low, high = self._area_ranges.T[:, :, None]
        return (areas < low) | (areas > high)


def _mean_percent(values: FloatArray) -> float:
    counted = values[values > -1]
    return 100 * float(counted.mean()) if counted.size else float("nan")


def _text_last(value: Any) -> tuple[bool, Any]:
    """Returns a sort key for ids that may be numbers or text. Text is sorted last."""
    return isinstance(value, str), value


def as_bytes(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an RLE whose counts are bytes, as pycocotools requires."""
    counts = rle["counts"]
    return {"size": rle["size"], "counts": counts.encode() if isinstance(counts, str) else counts}


def _say_nothing(*_: object) -> None:
    """Replaces the engine's print function, because the engine prints many messages."""
