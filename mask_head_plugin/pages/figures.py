"""The style of interactive figures. The figures need plotly (extra ``report``).

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Markers, dashes
or labels show the same information as colours. Plotly reads labels as HTML, so names are escaped.

``figures.js`` draws the figures in the page, adapted to the reader's theme and the available width.
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
"""Light colours for ranges, grid lines and the middle of a diverging colour scale."""
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
"""The dark theme's colour for each light one. ``white`` and rgb(...) are from plotly's template."""
BAND_OPACITY = 0.18
NAME_WIDTH = 30


def band_colour(colour: str) -> str:
    """Returns a translucent colour for the band around a line.

    Args:
        colour: the line's colour as #rrggbb.
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
    """A figure with a title and a caption in plain text.

    Attributes:
        name: name of the figure in files and links.
        title: heading above the figure.
        caption: text below the title.
        figure: the plotly figure.
        min_width: width in pixels below which the figure scrolls sideways; 0 if it fits any width.
    """

    name: str
    title: str
    caption: str
    figure: Any
    min_width: int = 0

    def to_json(self) -> str:
        """Returns the figure's data as JSON for a script element."""
        image = {"toImageButtonOptions": {"format": "svg", "filename": self.name}}
        spec = {**json.loads(self.figure.to_json()), "config": {**CONFIG, **image}}
        # Escape characters that could end the script or start a comment in a browser.
        return json.dumps(spec).replace("<", "\\u003c").replace("&", "\\u0026")


def lay_out(figure: Any, height: int) -> None:
    """Applies the layout that all figures share.

    Args:
        figure: a plotly figure.
        height: height in pixels.
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
    """Escapes a name so that plotly shows it unchanged."""
    return html.escape(name, quote=False).replace("%{", "%&#123;")


def wrapped(name: str) -> str:
    """Escapes a name for plotly and breaks it into lines of at most NAME_WIDTH characters."""
    return "<br>".join(plotly_text(line) for line in textwrap.wrap(name, NAME_WIDTH) or [name])
