"""Interactive figures of pages. Import it where plotly is installed (extra ``report``).

Colours are Okabe and Ito's, which colour-blind readers can tell apart; whatever a colour shows, a
marker, a dash or a text shows as well. Plotly reads texts as HTML, so names are escaped.

The page draws them (``figures.js``) in colours of the reader's theme and for the available width.
"""

from __future__ import annotations

import html
import json
import textwrap
from dataclasses import dataclass
from typing import Any

BLACK, GREY = "#1a1a1a", "#6b6b6b"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", "dash", "dot", "dashdot")
FONT = {"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13}
BAND, GRID, MIDDLE = "#e8e8e8", "#ececec", "#f7f7f7"
"""Of the background: a range, lines, the middle of a scale with two ends."""
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}
DARK_COLOURS = {
    BLACK: "#f0f0f0",
    GREY: "#a3a3a3",
    BAND: "#3d3d3d",
    GRID: "#383838",
    MIDDLE: "#2b2b2b",
    "#d9d9d9": "#4a4a4a",
    "rgb(36,36,36)": "#d6d6d6",
    "#ffffff": "#262626",
    "white": "#1c1c1c",
    "#0072b2": "#3fa2dc",
    "#d55e00": "#f0823a",
    "#009e73": "#2fc79b",
}
"""Replacements of colours in a dark theme; others stay. ``white`` and rgb(...) are plotly's own."""
BAND_OPACITY = 0.18
NAME_WIDTH = 30


def band_colour(colour: str) -> str:
    """Returns a line's colour, given as #rrggbb, for the band around it: grid and lines below stay
    visible.
    """
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{BAND_OPACITY})"


DARK_COLOURS |= {
    band_colour(light): band_colour(DARK_COLOURS[light])
    for light in (BLACK, *COLOURS)
    if light in DARK_COLOURS
}


@dataclass(frozen=True)
class Figure:
    """A figure with title and caption, as plain text.

    Attributes:
        name: of files and links.
        title: above it.
        caption: below the title.
        figure: plotly's.
        min_width: pixels below which it is scrolled sideways; 0 if it fits any width.
    """

    name: str
    title: str
    caption: str
    figure: Any
    min_width: int = 0

    def to_json(self) -> str:
        """Returns the data from which the page draws it, for a script element."""
        image = {"toImageButtonOptions": {"format": "svg", "filename": self.name}}
        spec = {**json.loads(self.figure.to_json()), "config": {**CONFIG, **image}}
        # What would end the script or begin a comment in a browser.
        return json.dumps(spec).replace("<", "\\u003c").replace("&", "\\u0026")


def lay_out(figure: Any, height: int) -> None:
    """Sets what all figures share.

    Args:
        figure: of plotly.
        height: in pixels.
    """
    figure.update_layout(
        template="simple_white",
        font=FONT,
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        legend={"tracegroupgap": 2},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(automargin=True, showgrid=True, gridcolor=GRID)
    figure.update_yaxes(automargin=True, showgrid=True, gridcolor=GRID)


def plotly_text(name: str) -> str:
    """Returns a name, escaped so that plotly shows it unchanged."""
    return html.escape(name, quote=False).replace("%{", "%&#123;")


def wrapped(name: str) -> str:
    """Returns a name for plotly, broken into lines."""
    return "<br>".join(plotly_text(line) for line in textwrap.wrap(name, NAME_WIDTH) or [name])
