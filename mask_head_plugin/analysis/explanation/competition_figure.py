"""Draws independent and competing masks of one RoI side by side (the paper's Table 2b)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .model_stages import Stages
from .style import BLUE, CHOSEN, FAINT, INK, blank, name_below, page_figure

MOST_CLASSES = 6
"""Largest number of classes shown: the chosen one and those with the highest probabilities."""

SIGMOID = "Sigmoid, as in Mask R-CNN: each class decides independently whether it claims a pixel"
SOFTMAX = "Softmax: the classes and the background share each pixel"


def competition_figure(stages: Stages, number: int, sigmoid: Tensor, softmax: Tensor) -> Figure:
    """Draws a RoI's masks from two mask branches, and each class's probability at one pixel.

    Args:
        stages: stages of the image in the model with independent masks.
        number: index of the detection.
        sigmoid: (K, M, M) probabilities of the independent masks.
        softmax: (K, M, M) probabilities of competing masks, which share each pixel among the
            classes and the background.
    """
    chosen = int(stages.classes[number])
    classes = _shown(chosen, sigmoid, softmax)
    pixel = claimed_pixel(sigmoid, chosen)
    name = stages.names[chosen]
    figure = page_figure(6.8, f"Do the classes compete for a pixel? One box (“{name}”), two models")
    halves: Any = figure.subfigures(2, 1)
    for half, text, probs in zip(halves, (SIGMOID, SOFTMAX), (sigmoid, softmax), strict=True):
        half.suptitle(text, x=0.01, ha="left", color=INK, fontsize=9)
        shown = {stages.names[k]: probs[k] for k in classes}
        if text == SOFTMAX:
            rest = 1 - probs.sum(0), probs.sum(0) - probs[classes].sum(0)
            shown |= dict(zip(_besides(classes, softmax), rest, strict=False))
        rows = half.add_gridspec(2, 1, height_ratios=(1, 1.5))
        strip = rows[0].subgridspec(1, len(classes) + 2)
        for place, (label, each) in enumerate(shown.items()):
            axes = half.add_subplot(strip[place])
            _draw_map(axes, each, label, pixel, is_chosen=label == name)
        values = {label: float(each[pixel]) for label, each in shown.items()}
        if text == SIGMOID:
            # With the same rows, both halves have the same layout and bars can be compared.
            values |= dict.fromkeys(_besides(classes, softmax), math.nan)
        _draw_bars(half.add_subplot(rows[1]), values, name, shared=text == SOFTMAX)
    return figure


def told_in_words(stages: Stages, number: int) -> str:
    """Describes the picture in words."""
    name = stages.names[stages.classes[number]]
    return (
        f"The masks of one box (“{name}”) for each class, with sigmoids and with a softmax. Bars "
        "show each class's probability at one pixel. With the softmax, the bars add up to 1."
    )


def claimed_pixel(sigmoid: Tensor, chosen: int) -> tuple[int, int]:
    """Returns the row and column of the pixel in the chosen mask that other classes claim most.

    Args:
        sigmoid: (K, M, M) independent probabilities.
        chosen: class of the box.
    """
    others = sigmoid.sum(0) - sigmoid[chosen]
    own = sigmoid[chosen] >= min(0.5, float(sigmoid[chosen].max()))
    row, column = divmod(int(others.where(own, -1.0).argmax()), sigmoid.shape[2])
    return row, column


def _shown(chosen: int, sigmoid: Tensor, softmax: Tensor) -> list[int]:
    """Returns the indices of the classes to show, ascending."""
    most = (sigmoid.flatten(1).mean(1) + softmax.flatten(1).mean(1)).argsort(descending=True)
    others = [k for k in most.tolist() if k != chosen]
    return sorted([chosen, *others[: MOST_CLASSES - 1]])


def _besides(classes: list[int], softmax: Tensor) -> list[str]:
    """Returns what shares a pixel with the shown classes if they compete."""
    return ["background", *["other classes"] * (len(classes) < len(softmax))]


def _draw_map(
    axes: Axes, probs: Tensor, label: str, pixel: tuple[int, int], *, is_chosen: bool
) -> None:
    blank(axes)
    axes.imshow(probs.numpy(), vmin=0, vmax=1, cmap="gray")
    axes.plot(pixel[1], pixel[0], "o", mfc="none", mec=CHOSEN, markersize=7, markeredgewidth=1.8)
    axes.set_xlabel(
        name_below(label, MOST_CLASSES + 2), fontweight="bold" if is_chosen else "normal"
    )


def _draw_bars(axes: Axes, values: dict[str, float], name: str, *, shared: bool) -> None:
    """Draws the probability of each class at the circled pixel."""
    colours = {label: CHOSEN if label == name else BLUE for label in values}
    colours["background"] = FAINT
    labels = list(values)
    known = {label: x for label, x in values.items() if not math.isnan(x)}
    widths = [known.get(label, 0.0) for label in labels]
    bars = axes.barh(labels, widths, color=[colours[x] for x in labels], height=0.7)
    told = [f"{known[x]:.2f}" if x in known else "takes no part" for x in labels]
    axes.bar_label(bars, told, padding=3, fontsize=7.5)
    axes.axvline(0.5, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    axes.text(0.51, -0.75, "in the mask if at least 0.5", fontsize=7, color=INK, va="center")
    axes.set(xlim=(0, 1.08), ylim=(len(labels) - 0.5, -1.1), xticks=np.linspace(0, 1, 6))
    claims = sum(value >= 0.5 for label, value in values.items() if label != "background")
    said = f"{claims} of {len(known)} classes claim it, without taking it from others"
    if shared:
        said = "Whatever one class gains there, others lose: bars add up to 1"
    axes.set_xlabel(
        f"Probability at the circled pixel, which most classes claim.\n{said}.",
        loc="left",
        multialignment="left",
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
