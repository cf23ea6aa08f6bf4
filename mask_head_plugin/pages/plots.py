"""matplotlib plots for pages and papers, in the pages' colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Plot

from .figures import COLOURS as COLOURS

FOR_PAPERS: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
SETTINGS: Any = {"svg.hashsalt": "mask_head_plugin", "pdf.fonttype": 42}
"""Equal plots give equal bytes; text in PDFs is TrueType, as publishers require."""
DPI = 300
"""Of what is an image in a plot for papers."""


def save_plot(figure: Plot, path: Path) -> None:
    """Writes a matplotlib figure as PNG, and next to it as SVG and PDF.

    Args:
        figure: a matplotlib figure.
        path: of the PNG.
    """
    figure.savefig(path, dpi=120)
    save_for_papers(figure, path)


def label_bars(axes: Any, bars: Any, form: str) -> None:
    """Writes each bar's number next to it, on white, so that no line crosses it."""
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.bar_label(bars, fmt=form, padding=3, fontsize=8, bbox=ground, zorder=5)


def save_for_papers(figure: Plot, path: Path) -> None:
    """Writes a figure of matplotlib as SVG and PDF, next to each other.

    Args:
        figure: of matplotlib.
        path: of one of the files.
    """
    with matplotlib.rc_context(SETTINGS):
        # Laid out once instead of for each file.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for suffix, metadata in FOR_PAPERS.items():
            figure.savefig(path.with_suffix(suffix), metadata=metadata, dpi=DPI)
