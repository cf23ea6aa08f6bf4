"""Styles the explanatory pictures and writes them as PNG and SVG, as wide as a page."""

from __future__ import annotations

import textwrap
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...durable_files import write_durably

PAGE_INCHES = 6.5
"""Text width on an A4 or US letter page."""

DPI = 160

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
CLASS_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW)
CHOSEN = VERMILION
INK, FAINT = "#222222", "#8a8a8a"

Style = dict[str, Any]

FONTS: Any = {
    "font.size": 7.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "svg.hashsalt": "mask_head_plugin",  # otherwise ids in an SVG are random
}
"""Settings for drawing and saving a figure."""


def page_figure(height: float, title: str) -> Figure:
    """Returns an empty figure with a title, as wide as a page and ``height`` inches high."""
    figure = Figure(figsize=(PAGE_INCHES, height), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", color=INK)
    return figure


def blank(axes: Axes) -> None:
    """Removes ticks and labels from axes but keeps the frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(FAINT)


def name_below(name: str, across: int) -> str:
    """Breaks a name into lines that fit below a picture if ``across`` pictures share the width."""
    return textwrap.fill(name, max(112 // across, 10))


def save(figure: Figure, folder: Path, name: str, told: str) -> list[Path]:
    """Writes ``name.png`` and ``name.svg``.

    Args:
        figure: the figure to save.
        folder: output folder, which must exist.
        name: name of the files without extension.
        told: description for readers who cannot see the picture, stored in the files.

    Returns:
        The written files.
    """
    written = []
    said: dict[str, dict[str, Any]] = {
        "png": {"Description": told},
        "svg": {"Description": told, "Date": None},
    }
    # Lay out twice: if images keep their aspect ratio, the first layout leaves too little room for
    # the text below them.
    for _ in range(2):
        figure.draw_without_rendering()
    for kind, metadata in said.items():
        content = BytesIO()
        figure.savefig(content, format=kind, dpi=DPI, metadata=metadata)
        path = folder / f"{name}.{kind}"
        write_durably(path, partial(_write, content.getvalue()))
        written.append(path)
    return written


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)
