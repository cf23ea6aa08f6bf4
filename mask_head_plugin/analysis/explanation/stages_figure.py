"""Draws the paper's Figure 1 for a user's image: proposals, classified boxes, K masks, one mask."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Rectangle
from pycocotools import mask as coco_mask
from torch import Tensor

from ...messages import counted
from .model_stages import FloatArray, Stages
from .style import CHOSEN, CLASS_COLOURS, INK, Style, blank, name_below, page_figure

MOST_PROPOSALS = 12
MOST_MASKS = 8
"""Largest number of masks in the strip: the chosen one and those with the highest probabilities."""

TEXT_COLUMNS = 112
"""Characters per line of a text as wide as the page."""

MOST_ELONGATED = 2.5
"""Largest ratio of the sides of a picture. If an image is more elongated, only a part is shown."""

GREY_SHARES = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a pixel's brightness (ITU-R BT.601)."""

MOST_LABELS = 16
"""Largest number of detections to label; if there are more, only the chosen one is labelled."""

SURE = 0.5
"""Lowest score of detections that are drawn in addition to the chosen one."""


def stages_figure(stages: Stages, number: int, probs: Tensor) -> Figure:
    """Draws the stages of the model on an image.

    Args:
        stages: stages of the image.
        number: index of the detection whose masks are shown.
        probs: (K, M, M) masks of that detection for each class; K is 1 if they are class-agnostic.
    """
    figure = page_figure(7.4, "Mask R-CNN on this image: from region proposals to masks")
    rows = figure.add_gridspec(3, 1, height_ratios=(1, 0.55, 1))
    first, last = (rows[k].subgridspec(1, 2) for k in (0, 2))
    proposals = stages.proposals[:MOST_PROPOSALS]
    _draw_proposals(figure.add_subplot(first[0]), stages, number, proposals)
    _draw_detections(figure.add_subplot(first[1]), stages, number)
    _draw_strip(figure, rows[1], stages, number, probs)
    _draw_crop(figure.add_subplot(last[0]), stages, number)
    _draw_pasted(figure.add_subplot(last[1]), stages, number)
    return figure


def told_in_words(stages: Stages, number: int) -> str:
    """Describes the picture in words."""
    name = stages.names[stages.classes[number]]
    return (
        f"Five stages on one image: {counted(len(stages.proposals), 'proposal')}; the boxes that "
        f"the box branch kept, with their classes; the masks of the {name} for each class, one of "
        "which is picked; that mask resized to its box; and the masks of all boxes in the image."
    )


def _image(axes: Axes, stages: Stages, number: int, title: str, told: str) -> FloatArray:
    """Draws the image or a part around a detection; returns x0, y0, x1, y1 of what is shown."""
    blank(axes)
    size = np.array(stages.image.shape[1::-1], float)
    view = shown_part(stages, number)
    if (view[2:] - view[:2] < size).any():
        title += " (part of the image)"
    x0, y0, x1, y1 = view - 0.5
    axes.imshow(stages.image, alpha=0.85)
    axes.set_anchor("NW")  # leaves half the page width for the text, even next to a tall image
    axes.set_title(title)
    axes.set_xlabel(told, loc="left", multialignment="left")
    axes.set(xlim=(x0, x1), ylim=(y1, y0))
    return view


def shown_part(stages: Stages, number: int) -> FloatArray:
    """Returns x0, y0, x1, y1 of the image or, if it is elongated, of a part with the detection."""
    size = np.array(stages.image.shape[1::-1], float)
    half = np.minimum(size, MOST_ELONGATED * size.min()) / 2
    box = stages.boxes[number]
    middle = np.clip((box[:2] + box[2:]) / 2, half, size - half)
    return np.concatenate([middle - half, middle + half])


def _box(axes: Axes, box: FloatArray, colour: str, width: float, **style: Any) -> None:
    x0, y0, x1, y1 = box - 0.5  # imshow puts pixel centres at whole numbers
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, lw=width, **style))


def _drawn(stages: Stages, number: int) -> dict[int, str]:
    """Returns the colour of each detection to draw, by index, with the chosen one last."""
    sure = [k for k, score in enumerate(stages.scores) if score >= SURE and k != number]
    colours = {k: CLASS_COLOURS[int(stages.classes[k]) % len(CLASS_COLOURS)] for k in sure}
    return {**colours, number: CHOSEN}


def _draw_proposals(axes: Axes, stages: Stages, number: int, proposals: FloatArray) -> None:
    told = (
        f"The {len(proposals)} of {len(stages.proposals)} boxes that most likely\n"
        "contain an object of any class"
    )
    _image(axes, stages, number, "1  Region proposals", told)
    for box in proposals:
        _box(axes, box, "white", 1.3, alpha=0.7)
        _box(axes, box, INK, 0.5)


def _draw_detections(axes: Axes, stages: Stages, number: int) -> None:
    told = (
        "The box branch classifies and refines the boxes, and\n"
        "removes duplicates. Thick: the box of stages 3 and 4"
    )
    view = _image(axes, stages, number, "2  Boxes and classes", told)
    drawn = _drawn(stages, number)
    for k, colour in drawn.items():
        _box(axes, stages.boxes[k], colour, 2.6 if k == number else 1.2)
        if len(drawn) > MOST_LABELS and k != number:
            continue
        x0, y0, x1, _ = stages.boxes[k]
        # The label fits above the box if the box starts below this line.
        room = view[1] + 0.06 * (view[3] - view[1])
        text: Style = {"fontsize": 7, "color": "white", "va": "bottom" if y0 > room else "top"}
        text["clip_on"] = True
        name = f"{stages.names[stages.classes[k]]} {stages.scores[k]:.0%}"
        back = {"facecolor": colour, "pad": 1, "linewidth": 0}
        is_right = x0 > view[0] + 0.7 * (view[2] - view[0])
        text["ha"] = "right" if is_right else "left"
        axes.text(x1 if is_right else x0, y0, name, bbox=back, **text)


def strip_classes(stages: Stages, number: int, probs: Tensor) -> list[int]:
    """Returns the indices of the classes whose masks are shown, ascending."""
    chosen = int(stages.classes[number])
    if len(probs) <= MOST_MASKS:
        return list(range(len(probs)))
    others = probs.flatten(1).mean(1).argsort(descending=True).tolist()
    return sorted([chosen, *[k for k in others if k != chosen][: MOST_MASKS - 1]])


def _draw_strip(
    figure: Figure, row: SubplotSpec, stages: Stages, number: int, probs: Tensor
) -> None:
    classes, chosen = strip_classes(stages, number, probs), int(stages.classes[number])
    agnostic = len(probs) == 1 < len(stages.names)
    several = figure.add_subfigure(row)
    told = "one for each class, computed independently"
    if len(probs) == 1:
        told = "one for all classes" if agnostic else "one for the only class"
    elif stages.classes_compete:
        told = "one for each class, which compete for each pixel"
    picks = "" if len(probs) == 1 else ". The class of the box picks one"
    which = f"; {len(classes)} of {len(probs)} are shown" if len(classes) < len(probs) else ""
    size = f"{probs.shape[1]} x {probs.shape[2]}"
    bins = " x ".join(map(str, stages.pooled_hw))
    said = (
        f"RoI pooling (RoIAlign in the paper) reads the features of the box in {bins} bins. From "
        f"them, the mask branch draws masks of {size} pixels (white: probability 1), {told}"
    )
    style: Style = {"x": 0.01, "ha": "left", "color": INK}
    several.suptitle("3  Features and masks of the thick box", fontsize=9, **style)
    words = textwrap.fill(f"{said}{picks}{which}.", TEXT_COLUMNS)
    several.supxlabel(words, fontsize=7.5, multialignment="left", **style)
    for axes, k in zip(np.atleast_1d(several.subplots(1, len(classes))), classes, strict=True):
        blank(axes)
        axes.imshow(probs[k].numpy(), vmin=0, vmax=1, cmap="gray")
        is_chosen = agnostic or k == chosen
        name = "any class" if agnostic else stages.names[k]
        name = f"{name}: picked" if is_chosen and len(probs) > 1 else name
        axes.set_xlabel(name_below(name, len(classes)))
        if is_chosen:
            axes.xaxis.label.set_fontweight("bold")
            for side in axes.spines.values():
                side.set(color=CHOSEN, linewidth=3)


def _draw_crop(axes: Axes, stages: Stages, number: int) -> None:
    """Draws the chosen mask in its box, pixel by pixel."""
    x0, y0, x1, y1 = stages.boxes[number]
    told = (
        "The mask is stretched over its box. Pixels with a probability\n"
        "of at least 0.5 (inside the line) belong to the mask"
    )
    _image(axes, stages, number, "4  Resized to the box", told)
    probs = stages.mask_probs[number].numpy()
    side = len(probs)
    extent = (x0 - 0.5, x1 - 0.5, y1 - 0.5, y0 - 0.5)
    axes.imshow(probs, extent=extent, vmin=0, vmax=1, cmap="gray", alpha=0.75)
    # Masks are zero outside the box; a ring of zeros closes the line.
    steps = (np.arange(-1, side + 1) + 0.5) / side
    xs, ys = x0 - 0.5 + steps * (x1 - x0), y0 - 0.5 + steps * (y1 - y0)
    if probs.max() > 0.5:
        axes.contour(xs, ys, np.pad(probs, 1), [0.5], colors=[CHOSEN], linewidths=1.4)
    axes.set(**_around(stages, number))


def _around(stages: Stages, number: int) -> Style:
    """Returns axis limits around a box, with the aspect ratio of the shown part of the image."""
    box, view = stages.boxes[number], shown_part(stages, number)
    size, shape = np.array(stages.image.shape[1::-1], float), view[2:] - view[:2]
    share = 1.3 * ((box[2:] - box[:2]) / shape).max()
    half = np.minimum(share * shape, size) / 2
    middle = np.clip((box[:2] + box[2:]) / 2, half, size - half) - 0.5
    (left, top), (right, bottom) = middle - half, middle + half
    return {"xlim": (left, right), "ylim": (bottom, top)}


def _draw_pasted(axes: Axes, stages: Stages, number: int) -> None:
    told = (
        f"The masks of all boxes that score {SURE:.0%} or more.\nDashed: the box of stages 3 and 4"
    )
    if not (stages.scores >= SURE).any():
        told = f"No box scores {SURE:.0%} or more.\nDashed: the box of stages 3 and 4"
    _image(axes, stages, number, "5  Masks in the image", told)
    # The image is grey, so that each mask has the same colour as its box in stage 2.
    axes.imshow(stages.image @ GREY_SHARES, cmap="gray", vmin=0, vmax=255)
    for k, colour in _drawn(stages, number).items():
        mask = coco_mask.decode(stages.pasted(k)[0])
        layer = np.zeros((*mask.shape, 4))
        layer[..., :3] = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        layer[..., 3] = 0.55 * mask
        axes.imshow(layer)
        if mask.any() and not mask.all():
            axes.contour(mask, [0.5], colors=[colour], linewidths=1)
    _box(axes, stages.boxes[number], INK, 1, linestyle=(0, (3, 2)))
