"""Runs a trained model on images and videos and writes what it found, as pictures and as JSON.

Shape alphabet: H, W image height and width in pixels; N detections of an image.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.config import CfgNode
from tqdm import tqdm

from ..config import ConfigError
from ..config_check import check_config
from ..data import dataset_categories
from ..engine.predictor import load_predictor
from ..evaluation.drawing import ByteArray, draw_instances, instance_colour
from ..evaluation.semantic import SemanticMap, semantic_map
from ..messages import listed
from ..user_code import load_config_and_code
from .media import Frames, LeftOutError, Source, find_sources, num_frames, open_writer, read_bgr
from .predictions import Categories, ColourKeeper, Detections, Predictions

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.json"
SEMANTIC_FOLDER = "semantic"


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
        self._scaled: set[str] = set()  # inputs of which it was told

    def run(self, sources: Sequence[Source]) -> list[str]:
        """Writes overlays, semantic maps and predictions.json, also after an interruption.

        Returns:
            What went wrong, a line for each source that has no result, or only a part.

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
                    except LeftOutError as error:
                        problems.append(f"{source.path}: {error}")
        finally:
            self.predictions.write(self.output / PREDICTIONS)
        return problems

    def _run_one(self, source: Source, progress: Any) -> None:
        if source.is_video:
            self._run_video(source, progress)
        else:
            image = read_bgr(source.path)
            found, overlay = self._predict(image, {"file_name": str(source.path)})
            self._write_image(source.overlay, overlay)
            if self.semantic:
                name = f"{Path(source.overlay).stem}.png"
                self._write_semantic(name, found, overlay)
            progress.update()

    def _run_video(self, source: Source, progress: Any) -> None:
        writer, keeper, frames = None, ColourKeeper(), Frames(source.path)
        try:
            for index, frame in enumerate(frames):
                image = {"file_name": str(source.path), "frame": index}
                found, overlay = self._predict(frame, image, keeper)
                writer = writer or open_writer(self.output / source.overlay, overlay, frames.fps)
                writer.write(overlay)
                if self.semantic:
                    name = f"{Path(source.overlay).stem}/{index:06d}.png"
                    self._write_semantic(name, found, overlay)
                progress.update()
        finally:
            if writer is not None:
                writer.release()
                _tell_of_overlay(source, frames)

    def _predict(
        self, image: ByteArray, record: dict[str, Any], keeper: ColourKeeper | None = None
    ) -> tuple[Detections, ByteArray]:
        """Returns what is in a BGR image and its overlay, and notes it for predictions.json."""
        name = f"{record['file_name']}"
        try:
            output = self._run_model(image, name)
        except Exception as error:  # one image that the model cannot take must not cost the others
            logger.debug("the model failed", exc_info=True)
            where = f" in frame {record['frame']}" if "frame" in record else ""
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise LeftOutError(f"made the model fail{where}: {reason}") from error
        if "instances" not in output:
            raise ConfigError(f"the model finds no instances, it returns {sorted(output)} only")
        found = Detections.of(output["instances"])
        self.predictions.add(found, {**record, "height": image.shape[0], "width": image.shape[1]})
        names = self.predictions.categories.names
        pairs = zip(found.classes, found.scores, strict=True)
        labels = [f"{names[k]} {score:.2f}" for k, score in pairs]
        colours = [instance_colour(x) for x in (keeper or ColourKeeper()).numbers(found)]
        return found, draw_instances(image, labels, colours, found.boxes, found.rles)

    def _run_model(self, image: ByteArray, name: str) -> dict[str, Any]:
        height, width = image.shape[:2]
        if self.predictor.scales_down(height, width) and name not in self._scaled:
            self._scaled.add(name)
            logger.warning(
                "%s: the model sees its %d x %d pixels scaled to INPUT.MAX_SIZE_TEST %d, for at "
                "full size memory would run out; cut it into tiles if objects are small",
                name,
                width,
                height,
                self.predictor.cfg.INPUT.MAX_SIZE_TEST,
            )
        output: dict[str, Any] = self.predictor(image)
        return output

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
        What went wrong, a line for each input that has no result, or only a part.

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
    cfg = load_config_and_code(config_file, opts)
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("no weights: add --opts MODEL.WEIGHTS FILE (.pth, .pkl or .safetensors)")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = confidence_threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = confidence_threshold
    cfg.OUTPUT_DIR = str(output)
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
            count,
            unknown or f"{listed(list(id_of))} are {len(id_of)}",
        )
        numbers = range(1, count + 1)
        return Categories([str(k) for k in numbers], list(numbers))
    missing = [name for name in names if name not in id_of]
    free = itertools.count(max(id_of.values(), default=0) + 1)
    if missing:
        logger.warning(
            "category ids of predictions.json are free ones for %s: %s",
            listed(missing),
            unknown or f"the data set has {listed(list(id_of))}",
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


def _tell_of_overlay(source: Source, frames: Frames) -> None:
    changes = "" if frames.is_steady else ", though the input's frames come at changing intervals"
    logger.warning(
        "%s: the overlay %s has %.4g frames per second throughout%s, and no sound",
        source.path,
        source.overlay,
        frames.fps,
        changes,
    )


def instance_semantic_map(found: Detections, image_hw: tuple[int, int]) -> SemanticMap:
    """Returns the (H, W) map of class + 1, 0 for background; the best-scored detection is on top.

    Args:
        found: detections; masks are ranked by ``mask_scores`` where there are some.
        image_hw: H, W.
    """
    scores = found.scores if found.mask_scores is None else found.mask_scores
    return semantic_map(found.rles or [], found.classes, scores, image_hw, threshold=-math.inf)
