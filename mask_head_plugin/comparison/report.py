"""Writes the report of a comparison: Markdown tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as coco_mask
from tabulate import tabulate

from ..durable_files import write_durably
from ..evaluation.drawing import ByteArray, LabelStyle, draw_instances, instance_colour, write_label
from ..image_file_mapper import ImageFileMapper
from ..image_files import read_image
from ..messages import counted
from ..progress import progress
from .image_differences import BOX_TOLERANCE, SCORE_TOLERANCE, THRESHOLD_TOLERANCE
from .measurement import DIFFERENT, EQUAL, MIN_CONFIDENT, SIDES, TOO_FEW, Comparison
from .twins import Twins
from .zoo import MODEL_ZOO

PICTURES = "pictures"
NUM_PICTURES = 6
NUM_PICTURES_EQUAL = 3
MIN_SIDE = 480  # pixels; smaller images are enlarged by a whole factor, up to this longer side
HEADER_HEIGHT, GAP = 28, 6
RED, WHITE = (60, 60, 255), (255, 255, 255)
PUBLISHED_AP = {"bbox": "box_ap", "segm": "mask_ap"}
EXPLANATIONS = {
    EQUAL: "the same ordered detections, and no difference beyond the tolerances",
    DIFFERENT: "differences beyond the tolerances",
    TOO_FEW: "no difference beyond the tolerances, but too few detections to prove anything; for "
    "example, random weights detect nothing",
}


def write_markdown(comparison: Comparison, pictures: Sequence[Path], path: Path) -> None:
    """Writes the comparison of one config.

    Args:
        comparison: the measured comparison.
        pictures: pictures to list, in or below the folder of ``path``.
        path: the file to write.
    """
    a = comparison.agreement
    sections = [
        f"# {comparison.config}: stock detectron2 and the plugin",
        f"Verdict: **{comparison.verdict}** ({EXPLANATIONS[comparison.verdict]}).",
        f"Weights: `{comparison.weights}` (sha256 {comparison.weights_sha256[:16]}). Both models "
        f"loaded {comparison.num_tensors} tensors with {comparison.num_values} values from this "
        "file; none was missing, left over or of the wrong shape.",
        f"Data: `{comparison.dataset}`, {counted(a.images, 'image')}.",
        f"## Detections\n\n{_agreement_table(comparison)}",
        "Detections are matched by class and position. Two detections may swap places if their "
        f"scores are within {SCORE_TOLERANCE:g}. Boxes and masks are compared in pixels of the "
        "image. A pixel is close to the threshold if its mask value is within "
        f"{THRESHOLD_TOLERANCE:g} of 0.5.",
        f"## AP in percent\n\n{_ap_table(comparison)}",
        f"## Time and memory per image\n\n{_cost_table(comparison)}",
        f"Measured on {comparison.device}. Both models run in turn on one image at a time; times "
        "are medians and do not include reading the images. Memory is the peak that PyTorch "
        "allocates in addition to the weights, on the images with the most detections. Both models "
        "have detectron2's memory layout (contiguous).",
        f"## Pictures\n\n{_picture_list(comparison, pictures, path.parent)}",
    ]
    write_durably(path, "\n\n".join(sections) + "\n")


def _agreement_table(comparison: Comparison) -> str:
    a = comparison.agreement
    rows: list[list[Any]] = [
        [f"detections above {comparison.min_score:g}", a.confident, f">= {MIN_CONFIDENT}"],
        ["all detections", a.detections, ""],
        ["images whose ordered detections differ", a.images_with_other_set, 0],
        ["detections without a counterpart", a.unmatched, ""],
        ["largest difference of scores", f"{a.score:.2e}", f"<= {SCORE_TOLERANCE:g}"],
        ["largest difference of boxes, pixels", f"{a.box:.2e}", f"<= {BOX_TOLERANCE:g}"],
        ["largest difference of mask probabilities", f"{a.mask_prob:.2e}", ""],
        ["mask pixels that differ", a.mask_pixels, ""],
        ["of these, not close to the threshold", a.far_mask_pixels, 0],
    ]
    return tabulate(rows, ["", "measured", "equal if"], tablefmt="pipe", disable_numparse=True)


def _ap_table(comparison: Comparison) -> str:
    if not comparison.ap:
        return "The data set has no annotations."
    rows = []
    for task, ap in comparison.ap.items():
        published = getattr(comparison.published, PUBLISHED_AP.get(task, ""), None)
        interval = f"{ap.low:+.3f} to {ap.high:+.3f}"
        figures = [f"{ap.stock:.3f}", f"{ap.plugin:.3f}", f"{ap.difference:+.3f}"]
        rows.append([task, *figures, interval, "" if published is None else f"{published:.1f}"])
    header = ["", "stock", "plugin", "plugin - stock", "95% interval", "published"]
    table = tabulate(rows, header, tablefmt="pipe", disable_numparse=True)
    notes = (
        "The interval covers only the choice of images; both models use the same draws of images."
    )
    if comparison.published:
        notes += (
            f" Published: AP of model {comparison.published.model_id} in "
            f"[MODEL_ZOO.md]({MODEL_ZOO}) on the complete validation set; not measured here."
        )
    return f"{table}\n\n{notes}"


def _cost_table(comparison: Comparison) -> str:
    rows = [
        [side, f"{c.network_seconds:.4f} s", f"{c.seconds:.4f} s", f"{c.peak_megabytes:.1f} MB"]
        for side, c in comparison.costs.items()
    ]
    if comparison.published:
        rows.append(["published (V100)", f"{comparison.published.inference_seconds:.3f} s", "", ""])
    return tabulate(rows, ["", "model", "with postprocessing", "peak memory"], tablefmt="pipe")


def _picture_list(comparison: Comparison, pictures: Sequence[Path], folder: Path) -> str:
    said = (
        "Images that differ most" if comparison.differing else "No image differs. The first images"
    )
    links = [f"![{x.stem}]({x.relative_to(folder).as_posix()})" for x in pictures]
    return "\n\n".join([f"{said}: stock, plugin, and differences in red.", *links])


def write_table(results: Mapping[str, Comparison | str], path: Path) -> None:
    """Writes a table of many comparisons.

    Args:
        results: for each config, its comparison or the reason for its failure.
        path: the file to write. The folders of the configs are next to this file.
    """
    header = ["config", "verdict", "images", "detections", "scores", "boxes, px", "mask pixels"]
    header += ["mask AP stock", "plugin", "95% interval", "published", "s/image stock", "plugin"]
    rows = [_table_row(name, x) for name, x in results.items() if isinstance(x, Comparison)]
    failed = [f"- {name}: {x}" for name, x in results.items() if isinstance(x, str)]
    parts = ["# Model zoo: stock detectron2 and the plugin"]
    if rows:
        parts += [tabulate(rows, header, tablefmt="pipe", disable_numparse=True)]
        parts += [
            "Scores, boxes: the largest difference. Mask pixels: how many differ, and how many of "
            "these are not close to the threshold. Published: the published AP, not measured here. "
            "Seconds include postprocessing."
        ]
    if failed:
        parts += ["Not compared:", "\n".join(failed)]
    write_durably(path, "\n\n".join(parts) + "\n")


def _table_row(name: str, x: Comparison) -> list[str]:
    a, ap = x.agreement, x.ap.get("segm")
    aps = (
        [f"{ap.stock:.2f}", f"{ap.plugin:.2f}", f"{ap.low:+.3f} to {ap.high:+.3f}"]
        if ap
        else [""] * 3
    )
    return [
        *(f"[{name}]({name}/comparison.md)", x.verdict, str(a.images), str(a.confident)),
        *(f"{a.score:.1e}", f"{a.box:.1e}", f"{a.mask_pixels}, {a.far_mask_pixels}", *aps),
        f"{x.published.mask_ap:.1f}" if x.published else "",
        *(f"{x.costs[side].seconds:.3f}" for side in SIDES),
    ]


def write_pictures(twins: Twins, comparison: Comparison, output: Path) -> list[Path]:
    """Draws the images that differ most, or the first images if there are no differences.

    Args:
        twins: the models, which run again on these images.
        comparison: the measured comparison, which decides which images are drawn.
        output: output folder; the pictures are written to a folder in it.

    Returns:
        The written files in order.

    Raises:
        OSError: if a picture cannot be written.
    """
    records = DatasetCatalog.get(comparison.dataset)
    chosen = [x.image_id for x in comparison.differing[:NUM_PICTURES]]
    chosen = chosen or [x["image_id"] for x in records[:NUM_PICTURES_EQUAL]]
    by_id = {x["image_id"]: x for x in records}
    (output / PICTURES).mkdir(exist_ok=True)
    paths = []
    for number, image_id in enumerate(progress(chosen, "drawing pictures", "image"), start=1):
        name = "".join(c if c.isalnum() else "_" for c in str(image_id))
        path = output / PICTURES / f"{number}_{name}.png"
        if not cv2.imwrite(str(path), _picture(twins, comparison, by_id[image_id])):
            raise OSError(f"could not write {path}")
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Drawn:
    """A model's detections in an image, by descending score; the first ``num_shown`` are drawn."""

    labels: list[str]
    classes: list[int]
    boxes: Any
    masks: list[ByteArray]
    num_shown: int


def _picture(twins: Twins, comparison: Comparison, record: dict[str, Any]) -> ByteArray:
    image = read_image(record["file_name"], "BGR")
    x = ImageFileMapper(twins.cfg, is_train=False)(record)
    names = MetadataCatalog.get(comparison.dataset).thing_classes
    sides = [_drawn(model, x, names, comparison.min_score) for model in (twins.stock, twins.plugin)]
    factor = max(1, MIN_SIDE // max(image.shape[:2]))
    image = _enlarged(image, factor)
    panels = [_draw(image, side, factor) for side in sides]
    panels.append(_draw_difference(image, sides, factor))
    titles = ["detectron2", "plugin", "masks that differ, in red"]
    framed = [_titled(panel, title) for panel, title in zip(panels, titles, strict=True)]
    return np.concatenate(framed, axis=1)


@torch.no_grad()
def _drawn(
    model: torch.nn.Module, x: dict[str, Any], names: Sequence[str], min_score: float
) -> Drawn:
    found = model([x])[0]["instances"].to("cpu")
    classes = found.pred_classes.tolist()
    pairs = zip(classes, found.scores.tolist(), strict=True)
    masks = [np.asarray(mask, np.uint8) for mask in found.pred_masks]
    labels = [f"{names[k]} {score:.2f}" for k, score in pairs]
    num_shown = int((found.scores > min_score).sum())
    return Drawn(labels, classes, found.pred_boxes.tensor.numpy(), masks, num_shown)


def _enlarged(image: ByteArray, factor: int) -> ByteArray:
    return np.ascontiguousarray(image.repeat(factor, axis=0).repeat(factor, axis=1))


def _draw(image: ByteArray, found: Drawn, factor: int) -> ByteArray:
    n = found.num_shown
    masks = [_enlarged(mask, factor) for mask in found.masks[:n]]
    rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    colours = [instance_colour(k) for k in range(n)]
    return draw_instances(image, found.labels[:n], colours, found.boxes[:n] * factor, rles)


def _draw_difference(image: ByteArray, sides: Sequence[Drawn], factor: int) -> ByteArray:
    """Returns the image in grey, with red pixels where the masks of the two models differ.

    For each class, compares how many masks of each model cover a pixel. This includes masks that
    the other panels do not show.
    """
    differing = np.zeros(image.shape[:2], bool)
    for k in {k for side in sides for k in side.classes}:
        counts = [np.zeros(image.shape[:2], int) for _ in sides]
        for side, count in zip(sides, counts, strict=True):
            for mask, found_class in zip(side.masks, side.classes, strict=True):
                count += _enlarged(mask, factor) * (found_class == k)
        differing |= counts[0] != counts[1]
    brightness = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) // 2 + 100
    panel = np.repeat(brightness[:, :, None], 3, axis=2).astype(np.uint8)
    panel[differing] = RED
    return panel


def _titled(panel: ByteArray, title: str) -> ByteArray:
    framed = np.pad(panel, ((HEADER_HEIGHT, 0), (0, GAP), (0, 0)), constant_values=255)
    framed[:HEADER_HEIGHT] = 255
    write_label(framed, title, 0, HEADER_HEIGHT - 8, LabelStyle(0.5))
    return framed
