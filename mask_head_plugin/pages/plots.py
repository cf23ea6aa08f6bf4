"""Saves matplotlib plots for pages and papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Plot

from .figures import COLOURS as COLOURS

FOR_PAPERS: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
SETTINGS: Any = {"svg.hashsalt": "mask_head_plugin", "pdf.fonttype": 42}
"""Settings that make the files reproducible and store the text of a PDF as TrueType fonts, as
publishers require."""
DPI = 300
"""Resolution of raster images inside plots for papers."""


def save_plot(figure: Plot, path: Path) -> None:
    """Writes a matplotlib figure as PNG, with an SVG and a PDF next to it.

    Args:
        figure: a matplotlib figure.
        path: path of the PNG.
    """
    figure.savefig(path, dpi=120)
    save_for_papers(figure, path)


def label_bars(axes: Any, bars: Any, form: str) -> None:
    """Writes a number next to each bar, on a white background that hides grid lines."""
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.bar_label(bars, fmt=form, padding=3, fontsize=8, bbox=ground, zorder=5)


def save_for_papers(figure: Plot, path: Path) -> None:
    """Writes a matplotlib figure as SVG and PDF.

    Args:
        figure: a matplotlib figure.
        path: path of the files; its suffix is replaced.
    """
    with matplotlib.rc_context(SETTINGS):
        # Lay out the figure once instead of once per file.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for suffix, metadata in FOR_PAPERS.items():
            figure.savefig(path.with_suffix(suffix), metadata=metadata, dpi=DPI)
