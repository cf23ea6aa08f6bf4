"""Runs a trained model on images and videos and writes what it found, as pictures and as JSON.

Shape alphabet: H, W image height and width in pixels; N detections of an image.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from pycocotools import mask as coco_mask
from tqdm import tqdm

from ..config import ConfigError, load_config
from ..data import dataset_categories
from ..evaluation.drawing import ByteArray, draw_instances, instance_colour
from ..evaluation.semantic import SemanticMap, semantic_map
from ..messages import listed
from ..structures import run_lengths
from ..user_code import import_modules
from .config_check import check_config
from .media import (
    Source,
    UnreadableError,
    find_sources,
    num_frames,
    open_writer,
    read_bgr,
    read_frames,
)
from .predictor import load_predictor

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.json"
SEMANTIC_FOLDER = "semantic"
SAME_OBJECT_IOU = 0.5


@dataclass(frozen=True)
class Detections:
    """What a model found in one image, the best first.

    Attributes:
        classes: N contiguous classes.
        scores: N.
        mask_scores: N, from a model with mask scoring, else None.
        boxes: (N, 4) XYXY in pixels.
        rles: N masks with str counts, None from a model without masks.
    """

    classes: list[int]
    scores: list[float]
    mask_scores: list[float] | None
    boxes: npt.NDArray[np.float64]
    rles: list[dict[str, Any]] | None

    @staticmethod
    def of(instances: Any) -> Detections:
        """Takes them from detectron2's Instances after inference."""
        instances = instances.to("cpu")
        return Detections(
            instances.pred_classes.tolist(),
            instances.scores.tolist(),
            instances.mask_scores.tolist() if instances.has("mask_scores") else None,
            instances.pred_boxes.tensor.numpy().astype(np.float64).reshape(-1, 4),
            run_lengths(instances.pred_masks) if instances.has("pred_masks") else None,
        )

    @property
    def boxes_xywh(self) -> npt.NDArray[np.float64]:
        return np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)


@dataclass(frozen=True)
class Categories:
    """Name and id of each class. A class k is k + 1 in semantic maps, where 0 is background."""

    names: list[str]
    ids: list[int]

    def records(self) -> list[dict[str, Any]]:
        """Returns COCO's ``categories``."""
        pairs = enumerate(zip(self.ids, self.names, strict=True))
        return [{"id": i, "name": name, "semantic_value": k + 1} for k, (i, name) in pairs]


@dataclass
class Predictions:
    """A COCO file in the making."""

    categories: Categories
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, found: Detections, image: dict[str, Any]) -> None:
        """Adds an image and what was found in it.

        Args:
            found: detections.
            image: ``file_name``, ``height`` and ``width``; of a video also ``frame``.
        """
        image = {"id": len(self.images) + 1, **image}
        self.images.append(image)
        for index, k in enumerate(found.classes):
            box = [round(x, 3) for x in found.boxes_xywh[index].tolist()]
            record: dict[str, Any] = {
                "id": len(self.annotations) + 1,
                "image_id": image["id"],
                **{key: image[key] for key in ("file_name", "frame") if key in image},
                "category_id": self.categories.ids[k],
                "category_name": self.categories.names[k],
                "score": found.scores[index],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            if found.mask_scores is not None:
                record["mask_score"] = found.mask_scores[index]
            if found.rles is not None:
                record["segmentation"] = found.rles[index]
                record["area"] = int(coco_mask.area(found.rles[index]))
            self.annotations.append(record)

    def write(self, path: Path) -> None:
        content = {
            "images": self.images,
            "categories": self.categories.records(),
            "annotations": self.annotations,
        }
        path.write_text(json.dumps(content), encoding="utf-8")


class ColourKeeper:
    """Keeps the colour of an object from frame to frame.

    Without it, colours would jump whenever the order of the scores changes. An object is known by
    its class and by overlapping itself in the frame before.
    """

    def __init__(self) -> None:
        self._count = 0
        self._before: tuple[Detections, list[int]] | None = None

    def numbers(self, found: Detections) -> list[int]:
        """Returns a number for the colour of each of the next frame's instances."""
        numbers = [-1] * len(found.classes)
        if self._before is not None and found.classes and self._before[0].classes:
            before, before_numbers = self._before
            overlap = _class_iou(found, before)
            while overlap.max() >= SAME_OBJECT_IOU:
                new, old = np.unravel_index(int(overlap.argmax()), overlap.shape)
                numbers[new] = before_numbers[old]
                overlap[new], overlap[:, old] = 0, 0
        for index, number in enumerate(numbers):
            if number < 0:
                numbers[index] = self._count
                self._count += 1
        self._before = found, numbers
        return numbers


class Demo:
    """A model with its class names, and the folder where results go."""

    def __init__(self, cfg: CfgNode, output: Path, *, semantic: bool) -> None:
        """Loads the model.

        Args:
            cfg: of ``demo_config``.
            output: a folder, made if missing.
            semantic: write semantic maps, too.

        Raises:
            ConfigError: if the weights cannot be read or do not fill the model.
        """
        self.predictor = load_predictor(cfg)
        names = self.predictor.metadata.get("thing_classes")
        self.predictions = Predictions(model_categories(cfg, names))
        self.output, self.semantic = output, semantic

    def run(self, sources: Sequence[Source]) -> list[str]:
        """Writes overlays, semantic maps and predictions.json, also after an interruption.

        Returns:
            What went wrong, a line for each source that could not be read.

        Raises:
            OSError: if a result cannot be written.
        """
        problems = []
        total = sum(num_frames(source) for source in sources)
        try:
            with tqdm(total=total, desc="running the model", unit="image") as progress:
                for source in sources:
                    try:
                        self._run_one(source, progress)
                    except UnreadableError as error:
                        problems.append(f"{source.path}: {error}")
        finally:
            self.predictions.write(self.output / PREDICTIONS)
        return problems

    def _run_one(self, source: Source, progress: Any) -> None:
        if source.is_video:
            self._run_video(source, progress)
        else:
            found, overlay = self._predict(read_bgr(source.path), {"file_name": str(source.path)})
            self._write_image(source.overlay, overlay)
            if self.semantic:
                name = f"{Path(source.overlay).stem}.png"
                self._write_semantic(name, found, overlay)
            progress.update()

    def _run_video(self, source: Source, progress: Any) -> None:
        writer, keeper = None, ColourKeeper()
        try:
            for index, (frame, fps) in enumerate(read_frames(source.path)):
                image = {"file_name": str(source.path), "frame": index}
                found, overlay = self._predict(frame, image, keeper)
                writer = writer or open_writer(self.output / source.overlay, overlay, fps)
                writer.write(overlay)
                if self.semantic:
                    name = f"{Path(source.overlay).stem}/{index:06d}.png"
                    self._write_semantic(name, found, overlay)
                progress.update()
        finally:
            if writer is not None:
                writer.release()

    def _predict(
        self, image: ByteArray, record: dict[str, Any], keeper: ColourKeeper | None = None
    ) -> tuple[Detections, ByteArray]:
        """Returns what is in a BGR image and its overlay, and notes it for predictions.json."""
        output = self.predictor(image)
        if "instances" not in output:
            raise ConfigError(f"the model finds no instances, it returns {sorted(output)} only")
        found = Detections.of(output["instances"])
        self.predictions.add(found, {**record, "height": image.shape[0], "width": image.shape[1]})
        names = self.predictions.categories.names
        pairs = zip(found.classes, found.scores, strict=True)
        labels = [f"{names[k]} {score:.2f}" for k, score in pairs]
        colours = [instance_colour(x) for x in (keeper or ColourKeeper()).numbers(found)]
        return found, draw_instances(image, labels, colours, found.boxes, found.rles)

    def _write_semantic(self, name: str, found: Detections, image: ByteArray) -> None:
        """Writes a PNG of class + 1, 0 for background; of 16 bits if there are over 255 classes."""
        values = instance_semantic_map(found, (image.shape[0], image.shape[1]))
        kind = np.uint8 if len(self.predictions.categories.ids) <= 255 else np.uint16
        self._write_image(f"{SEMANTIC_FOLDER}/{name}", values.astype(kind))

    def _write_image(self, name: str, image: npt.NDArray[Any]) -> None:
        path = self.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), image):
            raise OSError(f"could not write {path}")


def run_demo(
    config_file: str,
    opts: Sequence[str],
    inputs: Sequence[str],
    output: Path,
    confidence_threshold: float = 0.5,
    *,
    semantic: bool = False,
) -> list[str]:
    """Runs a model on images and videos.

    Args:
        config_file: a YAML file.
        opts: "KEY VALUE" pairs in one flat list.
        inputs: images, videos, folders of them, patterns such as ``photos/*.jpg``.
        output: a folder, made if missing. Nothing in it is overwritten.
        confidence_threshold: detections need a higher score; 0 to 1.
        semantic: write semantic maps, too.

    Returns:
        What went wrong, a line for each input that could not be read.

    Raises:
        ConfigError: if a setting, a file or the output folder cannot be used.
        OSError: if a result cannot be written.
    """
    if not 0 <= confidence_threshold <= 1:
        raise ConfigError(f"--confidence-threshold {confidence_threshold} is not from 0 to 1")
    sources = find_sources(inputs)
    check_output(output, sources, semantic=semantic)
    cfg = demo_config(config_file, opts, output, confidence_threshold)
    if semantic and not cfg.MODEL.MASK_ON:
        raise ConfigError("--semantic paints masks, and MODEL.MASK_ON is False")
    return Demo(cfg, output, semantic=semantic).run(sources)


def check_output(output: Path, sources: Iterable[Source], *, semantic: bool) -> None:
    """Makes the output folder.

    Raises:
        ConfigError: if it cannot be made, or has a file or folder that would be overwritten.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output} is not a folder that can be made: {error}") from error
    written = [PREDICTIONS, *([SEMANTIC_FOLDER] if semantic else []), *(s.overlay for s in sources)]
    for name in written:
        if (output / name).exists():
            raise ConfigError(f"--output {output} has {name} already; name another folder")


def demo_config(
    config_file: str, opts: Sequence[str], output: Path, confidence_threshold: float
) -> CfgNode:
    """Returns a checked config whose model drops detections below the threshold.

    Raises:
        ConfigError: if it cannot be used; without weights, too.
    """
    cfg = load_config(config_file, opts)
    import_modules(cfg.IMPORTS)
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("no weights: add --opts MODEL.WEIGHTS FILE (.pth, .pkl or .safetensors)")
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise ConfigError(f"INPUT.FORMAT {cfg.INPUT.FORMAT!r} is not BGR or RGB")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = confidence_threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = confidence_threshold
    cfg.OUTPUT_DIR = str(output)  # check_config makes it
    check_config(cfg, train=False, evaluate=False)
    return cfg


def model_categories(cfg: CfgNode, names: Sequence[str] | None) -> Categories:
    """Returns names and category ids of a model's classes; numbers where the names are unknown.

    Ids are those that the first data set of DATASETS.TEST, or else TRAIN, has for the classes of
    these names; classes that it has not get ids above its own. The annotation files of
    DATASETS.COCO_FILES need not be on this machine.

    Args:
        cfg: of the model.
        names: of its K classes, in the order of its rows.
    """
    id_of, unknown = _category_ids(cfg)
    if names is None:
        count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        logger.warning(
            "classes are numbers, for the weights do not name them, nor %d classes of a data set: "
            "%s",
            *(count, unknown or f"{listed(list(id_of))} are {len(id_of)}"),
        )
        numbers = range(1, count + 1)
        return Categories([str(k) for k in numbers], list(numbers))
    missing = [name for name in names if name not in id_of]
    free = itertools.count(max(id_of.values(), default=0) + 1)
    if missing:
        logger.warning(
            "category ids of predictions.json are free ones for %s: %s",
            *(listed(missing), unknown or f"the data set has {listed(list(id_of))}"),
        )
    return Categories(list(names), [id_of[x] if x in id_of else next(free) for x in names])


def _category_ids(cfg: CfgNode) -> tuple[dict[str, int], str]:
    """Returns the category id of each class of a data set, or why there are none."""
    unknown = []
    for name in (*cfg.DATASETS.TEST[:1], *cfg.DATASETS.TRAIN[:1]):
        try:
            categories = dataset_categories(cfg.DATASETS, name)
        except ConfigError as error:
            unknown.append(str(error))
            continue
        if categories is not None:
            return {category: i for i, category in categories.items()}, ""
        unknown.append(f"data set {name!r} is not known")
    return {}, "; ".join(unknown) or "DATASETS is empty"


def instance_semantic_map(found: Detections, image_hw: tuple[int, int]) -> SemanticMap:
    """Returns the (H, W) map of class + 1, 0 for background; the best-scored detection is on top.

    Args:
        found: detections; masks are ranked by ``mask_scores`` where there are some.
        image_hw: H, W.
    """
    scores = found.scores if found.mask_scores is None else found.mask_scores
    return semantic_map(found.rles or [], found.classes, scores, image_hw, threshold=-math.inf)


def _class_iou(found: Detections, before: Detections) -> npt.NDArray[np.float64]:
    """Returns the (N, N before) IoU of masks, else of boxes; 0 where classes differ."""
    shapes = [x.boxes_xywh if x.rles is None else x.rles for x in (found, before)]
    overlap = np.array(coco_mask.iou(*shapes, [0] * len(before.classes)))
    overlap[np.not_equal.outer(found.classes, before.classes)] = 0
    return overlap
