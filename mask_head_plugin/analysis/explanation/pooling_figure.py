"""Draws the paper's Figure 3 for a user's image: what RoI pooling reads and what rounding moves."""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.patheffects import withStroke

from .model_stages import Stages
from .pooling_reads import ROUNDED, WAYS, AxisReads, FloatArray, Reads, pooling_reads
from .style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    VERMILION,
    Style,
    blank,
    page_figure,
)

WHAT_IT_DOES = {
    "RoIPool": (
        "Rounds box and bins to whole cells, so bins may overlap.\n"
        "A bin takes the maximum over its cells, per channel."
    ),
    "RoIWarp": (
        "Rounds the box to whole cells. A bin is the mean of\n"
        "points, each interpolated from four cells."
    ),
    "RoIAlign": "Rounds nothing. A bin is the mean of points, each\ninterpolated from four cells.",
    "PrROIPool": (
        "Rounds nothing and has no points. A bin is the mean over\n"
        "its area; interpolation reaches half a cell further."
    ),
}

MARGIN = 2.0
"""Cells drawn around a RoI on each side."""

MOST_ELONGATED = 0.6
"""Smallest height of the drawn part, as a share of its width."""

PANEL_INCHES, LEGEND_INCHES, WORDS_INCHES = 3.1, 0.9, 2.3
"""Width of a panel; height of the legend; height of all titles and text together."""

CELLS_OF_BIN, MOST_BINS = 2, 7
"""Cells per bin and largest number of bins along a side, if the user does not give a number."""

HALO = [withStroke(linewidth=2, foreground="white")]


def pooling_figure(stages: Stages, number: int, num_bins: int) -> Figure:
    """Draws four ways of pooling a detection's box, side by side.

    Args:
        stages: stages of the image.
        number: index of the detection.
        num_bins: bins along each side; 0 for bins of about CELLS_OF_BIN cells.
    """
    level = int(stages.map_of[number])
    box = stages.rois[number] / stages.strides[level]
    map_hw = stages.map_hws[level]
    side = np.prod(box[2:] - box[:2]) ** 0.5
    num_bins = num_bins or int(np.clip(round(side / CELLS_OF_BIN), 2, MOST_BINS))
    reads = [pooling_reads(way, box, map_hw, num_bins, stages.sampling_ratio) for way in WAYS]
    name = stages.names[stages.classes[number]]
    cell = stages.pixels * stages.strides[level]
    view = _view(reads)
    ratio = (view[3] - view[1]) / (view[2] - view[0])
    title = f"Four RoI pooling methods: what each reads for the box of “{name}”"
    heights = (PANEL_INCHES * ratio, PANEL_INCHES * ratio, LEGEND_INCHES)
    figure = page_figure(sum(heights) + WORDS_INCHES, title)
    rows = figure.add_gridspec(3, 2, height_ratios=heights)
    for place, each in enumerate(reads):
        axes = figure.add_subplot(rows[place // 2, place % 2])
        _draw_image(axes, stages, level, view)
        _draw_reads(axes, each, box)
        moved = (each.box - box) * np.tile(cell, 2)
        _draw_displacement(axes, each, box, moved)
        axes.set_title(each.way)
        said = f"{WHAT_IT_DOES[each.way]}\n{_told_displacement(each, reads, moved, cell)}"
        axes.set_xlabel(said, loc="left", multialignment="left")
    told = (
        f"Grey grid: cells of the feature map, each {cell[0]:.3g} x {cell[1]:.3g} px of the image. "
        f"The picture shows {num_bins} x {num_bins} bins;\nthe mask branch uses "
        f"{' x '.join(map(str, stages.pooled_hw))}. Each bin becomes one number per "
        f"channel.{_told_border(view, map_hw)}"
    )
    _draw_legend(figure.add_subplot(rows[2, :]), told)
    return figure


def told_in_words(stages: Stages, number: int) -> str:
    """Describes the picture in words."""
    name = stages.names[stages.classes[number]]
    return (
        f"The box of “{name}” on the grid of the feature map, pooled in four ways: RoIPool and "
        "RoIWarp round the box to whole cells, RoIAlign and PrROIPool do not."
    )


def _view(reads: list[Reads]) -> FloatArray:
    """Returns x0, y0, x1, y1, in cells, of the part to draw: all boxes with a margin.

    The part is never taller than wide.
    """
    boxes = np.array([each.box for each in reads])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    across, down = (high - low) / 2 + MARGIN
    half = np.array([max(across, down), max(down, MOST_ELONGATED * across)])
    middle = (low + high) / 2
    return np.concatenate([middle - half, middle + half])


def _draw_image(axes: Axes, stages: Stages, level: int, view: FloatArray) -> None:
    """Draws the faded image below the grid of the map's cells."""
    blank(axes)
    height, width = stages.image.shape[:2]
    across, down = (width, height) / stages.pixels / stages.strides[level]
    axes.imshow(stages.image, extent=(0, across, down, 0), alpha=0.5)
    map_h, map_w = stages.map_hws[level]
    x0, x1 = max(view[0], 0), min(view[2], map_w)
    y0, y1 = max(view[1], 0), min(view[3], map_h)
    style: Style = {"color": FAINT, "linewidth": 0.4}
    axes.hlines(np.arange(np.ceil(y0), np.floor(y1) + 1), x0, x1, **style)
    axes.vlines(np.arange(np.ceil(x0), np.floor(x1) + 1), y0, y1, **style)
    axes.set(xlim=(view[0], view[2]), ylim=(view[3], view[1]), aspect="equal")


def _marked_bin(num_bins: int) -> tuple[int, int]:
    """Returns the row and column of the bin drawn in detail: the middle bin at the right edge.

    Rounding moves the right edge most.
    """
    return num_bins // 2, num_bins - 1


def _bin_edges(way: str, axis: AxisReads) -> FloatArray:
    """Returns the positions of all edges of bins along one axis, in cells.

    RoIPool's bins consist of whole cells. Where two of them share a cell, both of its edges are
    returned.
    """
    if way != "RoIPool":
        return np.linspace(axis.start, axis.end, len(axis.weights) + 1)
    cells = [np.flatnonzero(weights) for weights in axis.weights]
    return np.unique([x for of_bin in cells if len(of_bin) for x in (of_bin[0], of_bin[-1] + 1)])


def _draw_reads(axes: Axes, reads: Reads, box: FloatArray) -> None:
    """Draws the RoI as the operator uses it, its bins and points, and the cells of one bin."""
    x0, y0, x1, y1 = reads.box
    num_bins = len(reads.x.weights)
    row, column = _marked_bin(num_bins)
    cells = reads.bin_cells(row, column)
    for i, j in np.argwhere(cells > 0):
        share = 0.25 + 0.6 * cells[i, j] / cells.max()
        axes.add_patch(Rectangle((j, i), 1, 1, facecolor=ORANGE, alpha=share, linewidth=0))
    inner: Style = {"color": BLUE, "linewidth": 0.8}
    axes.hlines(_bin_edges(reads.way, reads.y), x0, x1, **inner)
    axes.vlines(_bin_edges(reads.way, reads.x), y0, y1, **inner)
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=BLUE, lw=1.8))
    exact: Style = {"fill": False, "ec": INK, "lw": 1.4, "ls": (0, (3, 2)), "zorder": 2.5}
    axes.add_patch(Rectangle((box[0], box[1]), box[2] - box[0], box[3] - box[1], **exact))
    xs, ys = np.meshgrid(reads.x.samples.ravel(), reads.y.samples.ravel())
    axes.plot(xs.ravel(), ys.ravel(), "o", color=BLUE, markersize=2)
    if reads.x.samples.size:
        _draw_point(axes, reads, row, column)


def _draw_point(axes: Axes, reads: Reads, row: int, column: int) -> None:
    """Draws the points of a bin and the cells that its first point reads."""
    ys, xs = reads.y.samples[row], reads.x.samples[column]
    for i, j in itertools.product(reads.y.neighbours[row, 0], reads.x.neighbours[column, 0]):
        line: Style = {"color": INK, "linewidth": 1, "zorder": 3}
        axes.plot([xs[0], j + 0.5], [ys[0], i + 0.5], "-", **line)
        # Above the points, because one of them may lie at the centre of a cell.
        axes.plot(j + 0.5, i + 0.5, "s", color=INK, markersize=2.8, zorder=5)
    for y, x in itertools.product(ys, xs):
        axes.plot(x, y, "o", color=VERMILION, markersize=5, zorder=4)


def _draw_displacement(axes: Axes, reads: Reads, box: FloatArray, moved: FloatArray) -> None:
    """Draws arrows from the edges of the box to the rounded edges, with lengths in pixels."""
    if reads.way not in ROUNDED:
        return
    middle = (box[:2] + box[2:]) / 2
    for edge, is_across in enumerate((True, False, True, False)):
        tail = (box[edge], middle[1]) if is_across else (middle[0], box[edge])
        head = (reads.box[edge], tail[1]) if is_across else (tail[0], reads.box[edge])
        arrow: Style = {"arrowstyle": "-|>", "mutation_scale": 8, "color": GREEN, "lw": 1.8}
        axes.add_patch(FancyArrowPatch(tail, head, shrinkA=0, shrinkB=0, zorder=5, **arrow))
        text: Style = {"color": GREEN, "fontsize": 7, "fontweight": "bold", "zorder": 6}
        text |= {"ha": "center", "va": "bottom"} if is_across else {"ha": "left", "va": "center"}
        place = np.add(tail, head) / 2 + ((0, -0.3) if is_across else (0.3, 0))
        words = f"{abs(moved[edge]):.1f} px"
        said = axes.text(place[0], place[1], words, path_effects=HALO, **text)
        said.set_in_layout(False)


def _told_displacement(
    reads: Reads, all_reads: list[Reads], moved: FloatArray, cell: FloatArray
) -> str:
    """Describes the effect of rounding in pixels of the image."""
    if reads.way not in ROUNDED:
        return "The box does not move: 0 px."
    aligned = next(each for each in all_reads if each.way == "RoIAlign")
    marked = _marked_bin(len(reads.x.weights))
    off = (reads.bin_centre(*marked) - aligned.bin_centre(*marked)) * cell
    across, down = moved[2] - moved[0], moved[3] - moved[1]
    return (
        f"The box gets {abs(across):.1f} px {'wider' if across > 0 else 'narrower'} and "
        f"{abs(down):.1f} px {'taller' if down > 0 else 'shorter'}. The\n"
        f"marked bin lies {np.hypot(*off):.1f} px away from RoIAlign's."
    )


def _told_border(view: FloatArray, map_hw: tuple[int, int]) -> str:
    is_inside = (view[:2] >= 0).all() and (view[2:] <= map_hw[::-1]).all()
    return "" if is_inside else " White: outside the map."


def _draw_legend(axes: Axes, told: str) -> None:
    axes.axis("off")
    dots: Style = {"markersize": 4, "linestyle": "none"}
    handles = [
        Line2D([], [], color=INK, linestyle=(0, (3, 2)), label="the predicted box"),
        Line2D([], [], color=BLUE, label="the box used, with its bins"),
        Line2D([], [], color=GREEN, marker=">", markersize=4, label="shift due to rounding, in px"),
        Line2D([], [], color=BLUE, marker=".", label="sampling points", **dots),
        Line2D([], [], color=VERMILION, marker="o", label="points of the marked bin", **dots),
        Line2D([], [], color=INK, marker="s", label="the four cells of one point", **dots),
        Patch(facecolor=ORANGE, alpha=0.8, label="cells that the marked bin reads,"),
        Patch(facecolor="none", label="darker where they count more"),
    ]
    layout: Style = {"loc": "upper left", "ncol": 3, "alignment": "left", "borderaxespad": 0}
    legend = axes.legend(handles=handles, frameon=False, title=told, columnspacing=1, **layout)
    legend.set_in_layout(False)  # otherwise it would narrow the panels
