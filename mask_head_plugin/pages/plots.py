"""matplotlib plots for pages and papers, in the pages' colours."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Plot

from .figures import COLOURS as COLOURS
from .figures import Figure

FOR_PAPERS: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
SETTINGS: Any = {"svg.hashsalt": "mask_head_plugin", "pdf.fonttype": 42}
"""Equal plots give equal bytes; text in PDFs is TrueType, as publishers require."""
PANEL_INCHES = (3.4, 2.9)
STYLES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


def save_plot(figure: Plot, path: Path) -> None:
    """Writes a matplotlib figure as PNG, and next to it as SVG and PDF.

    Args:
        figure: a matplotlib figure.
        path: of the PNG.
    """
    figure.savefig(path, dpi=120)
    _save_for_papers(figure, path)


def save_curves(figures: Sequence[Figure], folder: Path) -> None:
    """Writes those of a page's figures that are curves as NAME.svg and NAME.pdf.

    Plotly itself needs a browser for that; from the page, its camera button saves any figure.

    Args:
        figures: of the page.
        folder: where to.
    """
    for figure in figures:
        if all(trace.type == "scatter" for trace in figure.figure.data):
            _save_for_papers(_curves(figure), folder / figure.name)


def label_bars(axes: Any, bars: Any, form: str) -> None:
    """Writes each bar's number next to it, on white, so that no line crosses it."""
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.bar_label(bars, fmt=form, padding=3, fontsize=8, bbox=ground, zorder=5)


def _save_for_papers(figure: Plot, path: Path) -> None:
    with matplotlib.rc_context(SETTINGS):
        for suffix, metadata in FOR_PAPERS.items():
            figure.savefig(path.with_suffix(suffix), metadata=metadata)


def _curves(figure: Figure) -> Plot:
    """Returns a matplotlib plot with the curves of a plotly figure, in one row of panels."""
    source = figure.figure
    names = sorted({trace.xaxis or "x" for trace in source.data}, key=lambda x: int(x[1:] or 1))
    width, height = PANEL_INCHES
    plot = Plot(figsize=(width * max(len(names), 1.6), height), layout="constrained")
    panels = dict(zip(names, plot.subplots(1, len(names), squeeze=False)[0], strict=True))
    for trace in source.data:
        _add(panels[trace.xaxis or "x"], trace)
    for annotation, axes in zip(source.layout.annotations, panels.values(), strict=False):
        axes.set_title(_plain(annotation.text), fontsize=10)
    for name, axes in panels.items():
        for axis in "xy":
            settings = source.layout[f"{axis}axis{name[1:]}"]
            axes.set(**{f"{axis}label": _plain(settings.title.text or "")})
            if settings.range:
                axes.set(**{f"{axis}lim": settings.range})
        axes.grid(alpha=0.3)
    lines, labels = next(iter(panels.values())).get_legend_handles_labels()
    plot.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return plot


def _add(axes: Any, trace: Any) -> None:
    x, y = list(trace.x), [float("nan") if value is None else value for value in trace.y]
    if trace.fill == "toself":  # the band of a curve: forth along the top, back along the bottom
        half = len(x) // 2
        colour = [int(part) / 255 for part in trace.fillcolor[5:].split(",")[:3]]
        axes.fill_between(x[:half], y[:half], y[half:][::-1], color=colour, alpha=0.2, lw=0)
        return
    line = trace.line
    axes.plot(
        x,
        y,
        STYLES[line.dash or "solid"],
        color=line.color,
        linewidth=0.6 * (line.width or 2),
        marker="." if "markers" in trace.mode else None,
        label=_plain(trace.name) if trace.showlegend is not False else None,
    )


def _plain(text: str) -> str:
    """Returns plotly's HTML as plain text."""
    return html.unescape(text.replace("<br>", " ").replace("%&#123;", "%{"))
