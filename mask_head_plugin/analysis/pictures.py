"""Draws the pictures of an analysis: the worst images, and typical errors of each kind.

True objects are tinted and detections are outlined, so readers can tell them apart without relying
on colour.

Shape alphabet: H, W height and width in pixels of an image or of the part shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ..evaluation.drawing import ByteArray, LabelStyle, scaled, tint_mask, write_label
from ..evaluation.image_counts import most_disputed
from ..evaluation.mask_window import mask_window
from ..evaluation.matching import FloatArray
from ..image_files import read_image
from ..messages import counted, one_line
from ..pages.pictures import MOST_BYTES, Picture, css_colour, data_uri
from ..progress import progress
from .analysis import Analysis
from .errors import KINDS, LEFT_OUT, MEANINGS, MISSED, RIGHT
from .run_files import image_folder
from .scene import IntArray

logger = logging.getLogger(__name__)

NOT_HERE = "The images were not found; name their folder with --images."
NUM_WORST = 12
NUM_OF_KIND = 6
SIDE = 640
"""Length of a picture's longer side, in pixels. The page shows a smaller version until a click."""
LARGEST_SCALE = 6
MARGIN = 0.35
"""Margin on each side of an error, as a share of the boxes involved."""
LEAST_MARGIN = 12

# Okabe and Ito's colours for true objects, right detections and wrong detections.
TRUE, RIGHTLY, WRONGLY = (np.array(x) for x in ((86, 180, 233), (0, 158, 115), (213, 94, 0)))
LEGEND = (
    ("true object (tinted)", css_colour(TRUE)),
    ("right detection (outline)", css_colour(RIGHTLY)),
    ("wrong detection (outline)", css_colour(WRONGLY)),
)


@dataclass(frozen=True)
class PictureRow:
    """Pictures under a heading."""

    title: str
    note: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures. If there are no rows, ``problem`` says why."""

    rows: list[PictureRow]
    problem: str = ""


@dataclass(frozen=True)
class Outline:
    """A detection to draw: its row in the scene, its colour and its label."""

    row: int
    colour: npt.NDArray[Any]
    label: str


def gallery(analysis: Analysis) -> Gallery:
    """Draws the worst images and typical errors of each kind; skips images that cannot be read."""
    folder = image_folder(analysis.files, analysis.findings.scene.file_names[0])
    if folder is None:
        return Gallery([], NOT_HERE)
    rows, size, problems = [], 0, []
    for title, note, makers in [_worst(analysis), *_of_kinds(analysis)]:
        pictures = []
        for make in progress(makers, f"pictures: {title}"):
            try:
                picture = make.picture(analysis, folder)
            except (OSError, ValueError) as error:
                problems.append(one_line(error))
                continue
            size += len(picture.uri)
            if size < 2 * MOST_BYTES:
                pictures.append(picture)
        if pictures:
            rows.append(PictureRow(title, note, pictures))
    if problems:
        count = counted(len(problems), "image")
        logger.warning("%s cannot be shown, for example %s", count, problems[0])
    return Gallery(
        rows, "" if rows else f"No image can be shown: {(problems or ['there are no errors'])[0]}"
    )


@dataclass(frozen=True)
class _Wanted:
    """A picture to be drawn.

    Attributes:
        image: index of the image.
        title: what the picture shows.
        note: details below the title, such as counts.
        objects: objects to tint.
        outlines: detections to outline.
        about: boxes to crop the picture to; the whole image if empty.
    """

    image: int
    title: str
    note: str
    objects: IntArray
    outlines: list[Outline]
    about: list[FloatArray]

    def picture(self, analysis: Analysis, folder: Path) -> Picture:
        """Draws the picture.

        Raises:
            OSError: if the image cannot be read.
            ValueError: if the image is broken or differs in size from its annotation.
        """
        scene = analysis.findings.scene
        path = folder / scene.file_names[self.image]
        image = read_image(str(path), "RGB")
        height, width = scene.image_hw[self.image].tolist()
        if height and image.shape[:2] != (height, width):
            raise ValueError(
                f"{path} has {image.shape[:2]} pixels, but its annotation says {height, width}"
            )
        region = _region(self.about, image.shape[:2])
        uri = data_uri(_draw(analysis, image, region, self.objects, self.outlines))
        return Picture(self.title, self.note, uri)


def _worst(analysis: Analysis) -> tuple[str, str, list[_Wanted]]:
    """Returns the images with the lowest F1; of images with equal F1, crowded ones come first."""
    counts = analysis.image_counts
    order = np.lexsort((-counts.objects - counts.detections, counts.f1))
    wanted = [_whole(analysis, int(k)) for k in order[:NUM_WORST] if counts.f1[k] < 1]
    note = "Ranked by F1 at IoU 0.5, with detections above the best threshold of their class."
    return "The worst images", note, wanted


def _whole(analysis: Analysis, image: int, run: str = "") -> _Wanted:
    """Returns a picture of an image with its objects and the detections above the thresholds."""
    findings, counts = analysis.findings, analysis.image_counts
    assignment = findings.found[findings.main_task]
    kinds = findings.errors[findings.main_task][0.5].kind
    kept = analysis.is_kept[assignment.rows]
    shown = np.flatnonzero(kept & (assignment.matches.dt_image == image) & (kinds != LEFT_OUT))
    outlines = [_outline(analysis, int(n), kinds) for n in shown]
    false = int(counts.detections[image] - counts.found[image])
    note = f"{counts.found[image]} of {counts.objects[image]} found, {false} false"
    title = f"{run or findings.scene.file_names[image]}: F1 {100 * counts.f1[image]:.0f}"
    return _Wanted(image, title, note, _objects(analysis, image), outlines, [])


def changed_most(analysis: Analysis, other: Analysis) -> Gallery:
    """Draws the images whose F1 differs most between two runs; each run gets its own picture.

    Args:
        analysis: the analysis of the run.
        other: the analysis of the run that it is compared with, on the same images.
    """
    counts = [x.image_counts for x in (analysis, other)]
    folder = image_folder(analysis.files, analysis.findings.scene.file_names[0])
    chosen = most_disputed(counts)
    if not chosen or folder is None:
        return Gallery([], NOT_HERE if chosen else "Both runs have the same F1 on every image.")
    rows = []
    for k in progress(chosen, "pictures: images that changed most"):
        wanted = [(analysis, "this run"), (other, "the other run")]
        try:
            pictures = [_whole(x, k, name).picture(x, folder) for x, name in wanted]
        except (OSError, ValueError) as error:
            logger.warning("an image cannot be shown: %s", one_line(error))
            continue
        rows.append(PictureRow(analysis.findings.scene.file_names[k], "", pictures))
    return Gallery(rows)


def _of_kinds(analysis: Analysis) -> Iterator[tuple[str, str, list[_Wanted]]]:
    """Yields errors of each kind, at most one per image.

    Chooses the false detections with the highest scores, and missed objects of typical size.
    """
    findings = analysis.findings
    errors = findings.errors[findings.main_task][0.5]
    assignment = findings.found[findings.main_task]
    for kind, name in enumerate(KINDS):
        if kind == MISSED:
            rank = np.flatnonzero(errors.missed)
            middle = np.median(findings.scene.gt_area[rank]) if len(rank) else 0
            rank = rank[np.argsort(np.abs(findings.scene.gt_area[rank] - middle), kind="stable")]
            images: npt.NDArray[Any] = findings.scene.gt_image
            note = f"{MEANINGS[name].capitalize()}. Shows objects of medium size."
        else:
            rank = np.flatnonzero(errors.kind == kind)
            rank = rank[np.argsort(-assignment.matches.dt_score[rank], kind="stable")]
            images = assignment.matches.dt_image
            note = f"{MEANINGS[name].capitalize()}. Shows those with the highest scores."
        _, first = np.unique(images[rank], return_index=True)
        chosen = rank[np.sort(first)][:NUM_OF_KIND]
        make = _missed if kind == MISSED else _false
        yield f"Errors: {name}", note, [make(analysis, int(k)) for k in chosen]


def _false(analysis: Analysis, n: int) -> _Wanted:
    findings = analysis.findings
    scene, assignment = findings.scene, findings.found[findings.main_task]
    errors = findings.errors[findings.main_task][0.5]
    row, about = int(assignment.rows[n]), int(errors.about[n])
    image = int(scene.dt_image[row])
    objects = np.array(
        [about] if about >= 0 and errors.kind[n] != KINDS.index("background") else []
    )
    outlines = [_outline(analysis, n, errors.kind)]
    if errors.kind[n] == KINDS.index("duplicate"):
        first = np.flatnonzero((errors.kind == RIGHT) & (errors.about == about))
        outlines += [_outline(analysis, int(k), errors.kind) for k in first]
    boxes = [scene.dt_box[row], *(scene.gt_box[k] for k in objects.astype(int))]
    true = f"; true: {scene.class_names[scene.gt_class[about]]}" if len(objects) else ""
    iou = assignment.ious[image][row - scene.dt_slices[image].start]
    overlap = f", IoU {iou[about - scene.gt_slices[image].start]:.2f}" if len(objects) else ""
    title = f"{scene.class_names[scene.dt_class[row]]} {scene.dt_score[row]:.2f}{true}{overlap}"
    return _Wanted(image, title, scene.file_names[image], objects.astype(int), outlines, boxes)


def _missed(analysis: Analysis, g: int) -> _Wanted:
    scene = analysis.findings.scene
    image = int(scene.gt_image[g])
    title = f"{scene.class_names[scene.gt_class[g]]}, {scene.gt_area[g]:.0f} px"
    return _Wanted(image, title, scene.file_names[image], np.array([g]), [], [scene.gt_box[g]])


def _outline(analysis: Analysis, n: int, kinds: npt.NDArray[np.int8]) -> Outline:
    findings = analysis.findings
    row = int(findings.found[findings.main_task].rows[n])
    name = findings.scene.class_names[findings.scene.dt_class[row]]
    colour = RIGHTLY if kinds[n] == RIGHT else WRONGLY
    return Outline(row, colour, f"{name} {findings.scene.dt_score[row]:.2f}")


def _objects(analysis: Analysis, image: int) -> IntArray:
    """Returns the objects of an image except crowds."""
    scene = analysis.findings.scene
    gt = scene.gt_slices[image]
    return np.arange(gt.start, gt.stop)[~scene.gt_crowd[gt]]


def _region(boxes: Sequence[FloatArray], image_hw: Any) -> tuple[int, int, int, int]:
    """Returns x0, y0, x1, y1 of the part to show, in whole pixels within the image."""
    height, width = image_hw
    if not boxes:
        return 0, 0, width, height
    low = np.min([x[:2] for x in boxes], axis=0)
    high = np.max([x[:2] + x[2:] for x in boxes], axis=0)
    margin = np.maximum(MARGIN * (high - low), LEAST_MARGIN)
    x0, y0 = np.floor(low - margin).clip(0, [width - 1, height - 1]).astype(int).tolist()
    x1, y1 = np.ceil(high + margin).clip([x0 + 1, y0 + 1], [width, height]).astype(int).tolist()
    return x0, y0, x1, y1


def _draw(
    analysis: Analysis,
    image: ByteArray,
    region: tuple[int, int, int, int],
    objects: IntArray,
    outlines: Sequence[Outline],
) -> ByteArray:
    scene = analysis.findings.scene
    x0, y0, x1, y1 = region
    scale = min(SIDE / max(x1 - x0, y1 - y0), LARGEST_SCALE)
    canvas = _paled(scaled(np.ascontiguousarray(image[y0:y1, x0:x1]), scale))
    below = canvas.copy()
    true_masks = scene.gt_mask or [None] * len(scene.gt_box)
    found_masks = scene.dt_mask or [None] * len(scene.dt_box)
    for g in objects.tolist():
        bits = _bits(true_masks[g], scene.gt_box[g], region, canvas)
        tint_mask(canvas, below, bits, TRUE, TRUE.tolist(), 1)
    for outline in outlines:
        bits = _bits(found_masks[outline.row], scene.dt_box[outline.row], region, canvas)
        contours, _ = cv2.findContours(bits, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        # A wider white line below the outline keeps the outline visible on any image.
        cv2.drawContours(canvas, contours, -1, (255, 255, 255), 4, cv2.LINE_AA)
        cv2.drawContours(canvas, contours, -1, outline.colour.tolist(), 2, cv2.LINE_AA)
    if len(outlines) <= 3:  # more labels would hide the objects
        for outline in outlines:
            x, y = ((scene.dt_box[outline.row, :2] - (x0, y0)) * scale).astype(int).tolist()
            write_label(canvas, outline.label, max(x, 0), max(y - 4, 0), LabelStyle(0.5))
    return canvas


def _paled(image: ByteArray) -> ByteArray:
    """Returns an RGB image with a quarter of its colour, so that tint and outlines stand out."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(cv2.addWeighted(image, 0.25, grey, 0.75, 0), np.uint8)


def _bits(
    rle: Any, box: FloatArray, region: tuple[int, int, int, int], canvas: ByteArray
) -> ByteArray:
    """Returns the (H, W) pixels of the canvas that are in the mask or, without a mask, the box."""
    x0, y0, x1, y1 = region
    if rle is None:
        bits = np.zeros((y1 - y0, x1 - x0), np.uint8)
        left, top = np.round(box[:2] - (x0, y0)).astype(int).tolist()
        right, bottom = np.round(box[:2] + box[2:] - (x0, y0)).astype(int).tolist()
        bits[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 1
    else:
        bits = mask_window(rle).within(y0, x0, (y1 - y0, x1 - x0))
    size = canvas.shape[1], canvas.shape[0]
    return np.asarray(cv2.resize(bits, size, interpolation=cv2.INTER_NEAREST), np.uint8)
