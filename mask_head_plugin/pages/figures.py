"""Interactive figures of pages. Import it where plotly is installed (extra ``report``).

Colours are Okabe and Ito's, which colour-blind readers can tell apart; what a colour says, a
marker, a dash or a text says, too. Plotly takes texts for HTML: names are escaped.
"""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from typing import Any

BLACK, GREY = "#1a1a1a", "#6b6b6b"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", "dash", "dot", "dashdot")
FONT = {"family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 13}
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}
NAME_WIDTH = 30


@dataclass(frozen=True)
class Figure:
    """A figure with what stands above and below it, as plain text."""

    name: str
    title: str
    caption: str
    figure: Any

    def to_html(self) -> str:
        """Returns its element and script, without plotly.js."""
        return str(
            self.figure.to_html(
                config=CONFIG,
                full_html=False,
                include_plotlyjs=False,
                div_id=f"figure-{self.name}",
                default_height=f"{self.figure.layout.height}px",
            )
        )


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
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        legend={"tracegroupgap": 2},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(automargin=True, showgrid=True, gridcolor="#ececec")
    figure.update_yaxes(automargin=True, showgrid=True, gridcolor="#ececec")


def plotly_text(name: str) -> str:
    """Returns a name as plotly shows it as it is."""
    return html.escape(name, quote=False).replace("%{", "%&#123;")


def wrapped(name: str) -> str:
    """Returns a name as plotly shows it, in lines."""
    return "<br>".join(plotly_text(line) for line in textwrap.wrap(name, NAME_WIDTH) or [name])
