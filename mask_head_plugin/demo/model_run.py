"""Runs a model on images and videos, and writes pictures and JSON.

Neither detectron2 nor PyTorch is needed.

Shape alphabet: H, W image height and width in pixels; N detections of an image.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from ..durable_files import make_output_folder
from ..evaluation.drawing import ByteArray, draw_instances, instance_colour
from ..evaluation.semantic import SemanticMap, semantic_map
from ..messages import ConfigError
from ..progress import Advance, progress_bar
from .media import Frames, LeftOutError, Source, num_frames, open_writer, read_bgr
from .predictions import Categories, ColourKeeper, Detections, Predictions

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.json"
SEMANTIC_FOLDER = "semantic"


class Model(Protocol):
    """A model that detects objects in images."""

    @property
    def categories(self) -> Categories:
        """Names and ids of the model's classes."""

    def find(self, images: Sequence[ByteArray]) -> list[Detections]:
        """Returns the detections in each (H, W, 3) BGR image of a batch.

        Raises:
            ConfigError: if the model does not return instances, so that the run must end. After any
                other error, only the image is skipped.
        """

    def longest_side(self, image_hw: tuple[int, int]) -> int | None:
        """Returns INPUT.MAX_SIZE_TEST if an image is so large that it is scaled down, or None."""


class _Item(NamedTuple):
    """An image, or a frame of a video."""

    source: Source
    image: ByteArray
    record: dict[str, Any]  # in predictions.json


class ModelRun:
    """Runs a model and writes results to a folder."""

    def __init__(
        self, model: Model, output: Path, *, semantic: bool = False, batch_size: int = 1
    ) -> None:
        """
        Args:
            model: the model to run.
            output: folder for the results, created by ``run``; see check_output.
            semantic: whether to write semantic maps as well.
            batch_size: number of images or frames passed to the model at a time.
        """
        self.model, self.predictions = model, Predictions(model.categories)
        self.output, self.semantic, self.batch_size = output, semantic, batch_size
        self._problems: list[str] = []
        self._scaled: set[Path] = set()  # inputs whose scaling has been logged

    def run(self, sources: Sequence[Source]) -> list[str]:
        """Writes overlays and semantic maps. Also writes predictions.json, even if interrupted.

        Returns:
            One line for each source without a complete result, with the reason.

        Raises:
            ConfigError: if the folder cannot be created, or the model does not return instances.
            OSError: if a result cannot be written.
        """
        make_output_folder(self.output)
        total = sum(num_frames(source) for source in sources)
        try:
            with progress_bar("running the model", "image", total) as advance:
                for is_video, group in itertools.groupby(sources, lambda source: source.is_video):
                    if is_video:
                        for source in group:
                            self._run_video(source, advance)
                    else:
                        self._run_images(group, advance)
        finally:
            self.predictions.write(self.output / PREDICTIONS)
        return self._problems

    def _run_images(self, sources: Iterable[Source], advance: Advance) -> None:
        for batch in _batches(self._read(sources), self.batch_size):
            for item, found in self._find(batch):
                if isinstance(found, LeftOutError):
                    self._note(item.source, found)
                    continue
                overlay = self._draw(item, found, ColourKeeper())
                self._write_image(item.source.overlay, overlay)
                self._write_semantic(f"{Path(item.source.overlay).stem}.png", item, found)
                advance(1)

    def _read(self, sources: Iterable[Source]) -> Iterator[_Item]:
        for source in sources:
            try:
                yield _Item(source, read_bgr(source.path), {"file_name": str(source.path)})
            except LeftOutError as error:
                self._note(source, error)

    def _run_video(self, source: Source, advance: Advance) -> None:
        writer, keeper, frames = None, ColourKeeper(), Frames(source.path)
        items = (
            _Item(source, image, {"file_name": str(source.path), "frame": index})
            for index, image in enumerate(frames)
        )
        try:
            for batch in _batches(items, self.batch_size):
                for item, found in self._find(batch):
                    if isinstance(found, LeftOutError):
                        raise found
                    overlay = self._draw(item, found, keeper)
                    path = self.output / source.overlay
                    writer = writer or open_writer(path, overlay, frames.fps)
                    writer.write(overlay)
                    name = f"{Path(source.overlay).stem}/{item.record['frame']:06d}.png"
                    self._write_semantic(name, item, found)
                    advance(1)
        except LeftOutError as error:
            self._note(source, error)
        finally:
            if writer is not None:
                writer.release()
                _tell_of_overlay(source, frames)

    def _note(self, source: Source, error: LeftOutError) -> None:
        self._problems.append(f"{source.path}: {error}")

    def _find(self, batch: Sequence[_Item]) -> Iterator[tuple[_Item, Detections | LeftOutError]]:
        """Yields each image of a batch with its detections, or an error if the model failed."""
        for item in batch:
            self._tell_of_scaling(item)
        try:
            results = self.model.find([item.image for item in batch])
        except ConfigError:
            raise
        except Exception as error:  # the other images are still processed
            logger.debug("the model failed", exc_info=True)
            if len(batch) > 1:
                for item in batch:
                    yield from self._find([item])
                return
            record = batch[0].record
            where = f" in frame {record['frame']}" if "frame" in record else ""
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            yield batch[0], LeftOutError(f"made the model fail{where}: {reason}")
        else:
            yield from zip(batch, results, strict=True)

    def _tell_of_scaling(self, item: _Item) -> None:
        height, width = item.image.shape[:2]
        longest = self.model.longest_side((height, width))
        if longest is not None and item.source.path not in self._scaled:
            self._scaled.add(item.source.path)
            logger.warning(
                "%s: its %d x %d pixels are scaled down to INPUT.MAX_SIZE_TEST %d, because "
                "the full size could exhaust the memory; if objects are small, cut it into tiles",
                item.source.path,
                width,
                height,
                longest,
            )

    def _draw(self, item: _Item, found: Detections, keeper: ColourKeeper) -> ByteArray:
        """Draws the overlay of a BGR image, and records its detections for predictions.json."""
        height, width = item.image.shape[:2]
        self.predictions.add(found, {**item.record, "height": height, "width": width})
        names = self.predictions.categories.names
        pairs = zip(found.classes, found.scores, strict=True)
        labels = [f"{names[k]} {score:.2f}" for k, score in pairs]
        colours = [instance_colour(x) for x in keeper.numbers(found)]
        return draw_instances(item.image, labels, colours, found.boxes, found.rles)

    def _write_semantic(self, name: str, item: _Item, found: Detections) -> None:
        """Writes the semantic map of an image as a PNG if semantic maps are wanted.

        The value of a pixel is class + 1, or 0 for background. The PNG has 16 bits if there are
        more than 255 classes.
        """
        if not self.semantic:
            return
        values = instance_semantic_map(found, (item.image.shape[0], item.image.shape[1]))
        kind = np.uint8 if len(self.predictions.categories.ids) <= 255 else np.uint16
        self._write_image(f"{SEMANTIC_FOLDER}/{name}", values.astype(kind))

    def _write_image(self, name: str, image: npt.NDArray[Any]) -> None:
        path = self.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), image):
            raise OSError(f"could not write {path}")


def check_threshold(confidence_threshold: float) -> None:
    """Raises ConfigError if the threshold is not between 0 and 1."""
    if not 0 <= confidence_threshold <= 1:
        raise ConfigError(f"--confidence-threshold {confidence_threshold} is not between 0 and 1")


def check_output(output: Path, sources: Iterable[Source], *, semantic: bool) -> None:
    """Raises ConfigError if a file in the output folder would be overwritten."""
    written = [PREDICTIONS, *([SEMANTIC_FOLDER] if semantic else []), *(s.overlay for s in sources)]
    for name in written:
        if (output / name).exists():
            raise ConfigError(f"--output {output} already contains {name}; use another folder")


def instance_semantic_map(found: Detections, image_hw: tuple[int, int]) -> SemanticMap:
    """Returns the (H, W) map of class + 1, or 0 for background. The best detection is on top.

    Args:
        found: the detections. If they have ``mask_scores``, these decide which one is best.
        image_hw: H, W.
    """
    scores = found.scores if found.mask_scores is None else found.mask_scores
    return semantic_map(found.rles or [], found.classes, scores, image_hw, threshold=-math.inf)


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Yields items in lists. Before it raises a LeftOutError, it yields all earlier items."""
    batch: list[_Item] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except LeftOutError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _tell_of_overlay(source: Source, frames: Frames) -> None:
    changes = "" if frames.is_steady else " (the intervals between the input's frames vary)"
    logger.warning(
        "%s: the overlay %s has a constant %.4g frames per second%s and no sound",
        source.path,
        source.overlay,
        frames.fps,
        changes,
    )
