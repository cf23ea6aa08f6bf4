"""Draws the figures of a page as SVG and PDF.

Uses matplotlib, because plotly needs a browser to write such files.

Supports only what the figures of this package contain: curves with bands, markers with intervals,
bars and heatmaps, in panels side by side.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import FuncFormatter

from .figures import Figure
from .plots import save_for_papers

PANEL_INCHES, NEXT_INCHES, LEAST_INCHES = 3.4, 2.2, 5.4
"""Width of the first panel, width of each further panel, and smallest width of a plot."""
INCHES_OF_PIXEL = 2.9 / 420
STYLES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MARKERS = {
    "triangle-right": ">",
    "triangle-left": "<",
    "circle-open": "o",
    "diamond-open": "D",
    None: ".",
}
FONTS: Any = {"font.size": 8, "axes.titlesize": 9, "hatch.linewidth": 0.6}
MOST_LEVEL = 6
"""Largest number of labels below a plot that stay horizontal. More labels are rotated."""


def save_figures(figures: Sequence[Figure], folder: Path) -> None:
    """Writes the figures of a page as NAME.svg and NAME.pdf.

    Args:
        figures: figures of the page.
        folder: output folder, which must exist.
    """
    for figure in figures:
        save_for_papers(paper_plot(figure), folder / figure.name)


def paper_plot(figure: Figure) -> Plot:
    """Draws a plotly figure with matplotlib."""
    source = figure.figure
    names = sorted({trace.xaxis or "x" for trace in source.data}, key=lambda x: int(x[1:] or 1))
    # At most three panels in a row: with more, the text would be too small on a page.
    columns = len(names) if len(names) <= 3 else -(-len(names) // 2)
    rows = -(-len(names) // columns)
    width = min(PANEL_INCHES * columns, PANEL_INCHES + NEXT_INCHES * (columns - 1))
    size = max(width, LEAST_INCHES), INCHES_OF_PIXEL * source.layout.height * rows
    with matplotlib.rc_context(FONTS):
        plot = Plot(figsize=size, layout="constrained")
        cells = plot.subplots(rows, columns, squeeze=False).flat
        panels = dict(zip(names, cells, strict=False))
        for unused in list(plot.axes)[len(names) :]:
            unused.set_axis_off()
        for number, (name, axes) in enumerate(panels.items()):
            _Panel(axes, source, name, is_first=number % columns == 0).draw()
        for annotation, axes in zip(source.layout.annotations, panels.values(), strict=False):
            axes.set_title(_plain(annotation.text))
        _add_legend(plot, columns)
    return plot


def _add_legend(plot: Plot, columns: int) -> None:
    handles: dict[str, Any] = {}
    for axes in plot.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        plot.legend(
            *(list(handles.values()), list(handles)),
            loc="outside lower center",
            ncols=2 if columns < 2 else 4,
            frameon=False,
        )


class _Panel:
    """One panel of a figure. Traces on its second axis are drawn below the others.

    Args:
        axes: matplotlib axes of the panel.
        source: the plotly figure.
        name: name of the panel's x axis in the plotly figure.
        is_first: whether the panel is the first in its row; only this panel labels a shared y axis.
    """

    def __init__(self, axes: Any, source: Any, name: str, *, is_first: bool) -> None:
        number = name[1:]
        self.is_first = is_first
        self.axes, self.source, self.name = axes, source, name
        self.traces = [x for x in source.data if (x.xaxis or "x") == name]
        self.settings = {axis: source.layout[f"{axis}axis{number}"] for axis in "xy"}
        self.categories: dict[str, list[Any]] = {
            axis: self._categories(axis) for axis in self.settings
        }
        others = [x.yaxis for x in self.traces if (x.yaxis or "y") != f"y{number}"]
        self.twin = axes.twinx() if others else None
        if self.twin is not None:
            other = source.layout[f"yaxis{others[0][1:]}"]
            self.twin.set(ylabel=_plain(other.title.text or ""), ylim=other.range)
            axes.set_zorder(self.twin.get_zorder() + 1)
            axes.patch.set_visible(False)

    def draw(self) -> None:
        self.axes.grid(alpha=0.3)
        self.axes.set_axisbelow(True)
        for trace in self.traces:
            own = (trace.yaxis or "y")[1:] == self.name[1:]
            axes = self.axes if own else self.twin
            {"scatter": self._scatter, "bar": self._bar, "heatmap": self._heatmap}[trace.type](
                axes, trace
            )
        for shape in self.source.layout.shapes:
            if shape.xref == self.name and shape.x0 == shape.x1:
                self.axes.axvline(shape.x0, color=_colour(shape.line.color), linewidth=0.8)
        for axis, settings in self.settings.items():
            self._set_axis(axis, settings)
        if self.settings["y"].scaleanchor:
            self.axes.set_aspect("equal")

    def _set_axis(self, axis: str, settings: Any) -> None:
        axes, names = self.axes, self.categories[axis]
        own = axes.xaxis if axis == "x" else axes.yaxis
        axes.set(**{f"{axis}label": _plain(settings.title.text or "")})
        if settings.tickvals is not None:
            own.set_ticks(list(settings.tickvals), [_plain(x) for x in settings.ticktext])
        elif names:
            own.set_ticks(range(len(names)), [_plain(str(x)) for x in names])
        elif settings.tickformat == "+":
            own.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}"))
        if axis == "x" and max(len(names), len(settings.tickvals or ())) > MOST_LEVEL:
            own.set_tick_params(rotation=90)
        if settings.range:
            axes.set(**{f"{axis}lim": settings.range})
        if settings.autorange == "reversed":
            own.set_inverted(True)
        if axis == "y" and settings.showticklabels is False and not self.is_first:
            own.set_tick_params(labelleft=False)

    def _categories(self, axis: str) -> list[Any]:
        """Returns the names along an axis in order; empty for a numeric axis."""
        values = [x for trace in self.traces for x in (_values(trace, axis) or ())]
        return list(dict.fromkeys(values)) if any(isinstance(x, str) for x in values) else []

    def _places(self, trace: Any, axis: str) -> list[float]:
        names, values = self.categories[axis], _values(trace, axis) or ()
        return [names.index(x) if names else _number(x) for x in values]

    def _scatter(self, axes: Any, trace: Any) -> None:
        x, y = self._places(trace, "x"), self._places(trace, "y")
        if trace.fill == "toself":  # band of a curve: upper edge forwards, lower edge backwards
            half, colour = len(x) // 2, _colour(trace.fillcolor)
            axes.fill_between(x[:half], y[:half], y[half:][::-1], color=colour, alpha=0.2, lw=0)
            return
        mode = trace.mode or "lines"
        colour = _colour(trace.line.color or trace.marker.color)
        style: dict[str, Any] = {"color": colour, "label": _label(trace)}
        style["linewidth"] = 0.6 * (trace.line.width or 2)
        style["linestyle"] = STYLES[trace.line.dash or "solid"] if "lines" in mode else "none"
        if "markers" in mode:
            style["marker"] = MARKERS[trace.marker.symbol]
            style["mfc"] = "none" if (trace.marker.symbol or "").endswith("-open") else colour
        if trace.error_x.array is None:
            axes.plot(x, y, **style)
        else:
            reach = [list(trace.error_x.arrayminus), list(trace.error_x.array)]
            axes.errorbar(
                *(x, y),
                xerr=reach if len(reach[0]) == len(x) else None,
                elinewidth=1.2,
                capsize=2.5,
                markersize=5,
                **style,
            )

    def _bar(self, axes: Any, trace: Any) -> None:
        lies = trace.orientation == "h"
        along, across = ("x", "y") if lies else ("y", "x")
        lengths, places = (np.array(self._places(trace, axis)) for axis in (along, across))
        width = trace.width
        if self.categories[across]:
            group = [x for x in self.traces if x.type == "bar"]
            width = (1 - (self.source.layout.bargap or 0.2)) / len(group)
            places = places + (group.index(trace) - (len(group) - 1) / 2) * width
        style: dict[str, Any] = {"color": _colour(trace.marker.color), "label": _label(trace)}
        if trace.marker.pattern.shape:
            style |= {"hatch": 3 * trace.marker.pattern.shape, "edgecolor": "white"}
        start = 0 if trace.base is None else np.array(trace.base)
        if lies:
            axes.barh(places, lengths, width, left=start, zorder=0.5, **style)
        else:
            axes.bar(places, lengths, width, bottom=start, zorder=0.5, **style)
        for text, length, place in zip(trace.text or (), lengths, places, strict=False):
            end = max(length, 0) if np.isfinite(length) else 0
            axes.annotate(
                *(text, (end, place)),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )
        if trace.text:
            axes.margins(x=0.14)

    def _heatmap(self, axes: Any, trace: Any) -> None:
        x, y = self._places(trace, "x"), self._places(trace, "y")
        values = np.array([[_number(v) for v in row] for row in trace.z])
        scale = [(place, _colour(colour)) for place, colour in trace.colorscale]
        colours = LinearSegmentedColormap.from_list("scale", scale)
        limits = {"vmin": trace.zmin, "vmax": trace.zmax}
        style: dict[str, Any] = {"cmap": colours, "shading": "nearest", "zorder": 0.5, **limits}
        if trace.xgap:
            style |= {"edgecolors": "white", "linewidth": 1.5}
        else:  # stored as an image, because viewers show seams between separately drawn cells
            style["rasterized"] = True
        cells = axes.pcolormesh(x, y, values, **style)
        if trace.texttemplate:
            for row, place in enumerate(y):
                for column, across in enumerate(x):
                    ground = colours(cells.norm(values[row, column]))
                    ink = "black" if np.dot(ground[:3], (0.3, 0.59, 0.11)) > 0.5 else "white"
                    text = str(trace.text[row][column])
                    axes.text(across, place, text, color=ink, fontsize=7, ha="center", va="center")
        if trace.showscale is not False:
            # Square panels do not fill the height that the layout reserves for them.
            shrink = 0.7 if self.settings["y"].scaleanchor else 1
            bar = axes.figure.colorbar(cells, ax=axes.figure.axes, pad=0.02, shrink=shrink)
            bar.set_label(_plain(trace.colorbar.title.text or ""))
        axes.grid(visible=False)


def _values(trace: Any, axis: str) -> Any:
    values = trace[axis]
    return None if values is None else list(values)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _label(trace: Any) -> str | None:
    return _plain(trace.name) if trace.name and trace.showlegend is not False else None


def _colour(text: str | None) -> Any:
    """Converts a plotly colour such as ``rgba(1,2,3,0.5)`` to matplotlib's, without opacity."""
    if text is None:
        return None
    parts = re.findall(r"[\d.]+", text) if text.startswith("rgb") else []
    return tuple(int(x) / 255 for x in parts[:3]) if parts else to_rgb(text)


def _plain(text: str) -> str:
    """Converts plotly's HTML to plain text."""
    return html.unescape(text.replace("<br>", " ").replace("%&#123;", "%{"))
