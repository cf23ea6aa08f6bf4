"""Plots differences with their intervals: a marker and a line in each row. Needs plotly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from ..evaluation.difference import PairedDifference
from .differences import BETTER, NOISE, ONE_SEED, WORSE
from .figures import BLACK, GREY, lay_out, plotly_text, wrapped

VERDICTS = {
    BETTER: ("#0072b2", "triangle-right"),
    WORSE: ("#d55e00", "triangle-left"),
    NOISE: (GREY, "circle-open"),
    ONE_SEED: (GREY, "diamond-open"),
}
"""Colour and marker of each finding."""
EMPTY: list[Any] = [None]
"""Coordinates of a trace that appears only in the legend."""
ROW_HEIGHT = 44


@dataclass(frozen=True)
class IntervalRow:
    """A difference to plot.

    Attributes:
        name: name of the row.
        paired: the difference with its interval.
        finding: a key of VERDICTS.
    """

    name: str
    paired: PairedDifference
    finding: str


def row_heights(names: Sequence[str]) -> dict[str, int]:
    """Returns the vertical position of each row, the first row at the top."""
    return {name: len(names) - k for k, name in enumerate(names)}


def add_intervals(
    figure: Any,
    heights: dict[str, int],
    rows: Sequence[IntervalRow],
    column: int,
    kinds: Sequence[str] = tuple(VERDICTS),
) -> None:
    """Adds differences to a column of a figure.

    Args:
        figure: a plotly figure.
        heights: positions of all rows, see ``row_heights``.
        rows: the differences to plot.
        column: column of the figure, counted from 1; the first column defines the legend.
        kinds: findings to plot and to list in the legend, even if no row has them.
    """
    place = {"row": 1, "col": column}
    for kind in kinds:
        colour, symbol = VERDICTS[kind]
        shown = [x for x in rows if x.finding == kind]
        paired = [x.paired for x in shown]
        trace = go.Scatter(
            x=[c.difference for c in paired] or EMPTY,
            y=[heights[x.name] for x in shown] or EMPTY,
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [c.high - c.difference for c in paired],
                "arrayminus": [c.difference - c.low for c in paired],
                "color": colour,
                "thickness": 2,
                "width": 5,
            },
            customdata=[
                [plotly_text(x.name), f"{x.paired.low:+.2f} to {x.paired.high:+.2f}"] for x in shown
            ],
            hovertemplate="%{customdata[0]}<br>%{x:+.2f} (%{customdata[1]})<extra></extra>",
            mode="markers",
            cliponaxis=False,  # do not cut off markers at the edge
            marker={
                "color": colour,
                "symbol": symbol,
                "size": 11,
                "line": {"width": 2, "color": colour},
            },
            name=kind,
            legendgroup=kind,
            showlegend=column == 1,
        )
        figure.add_trace(trace, **place)
    # Add the line last, because plotly omits lines from empty panels.
    figure.add_vline(x=0, line={"color": BLACK, "width": 1}, **place)


def lay_out_rows(figure: Any, heights: dict[str, int], row_height: int = ROW_HEIGHT) -> None:
    """Sets the size of a figure with a row for each difference, and labels the rows.

    Args:
        figure: a plotly figure.
        heights: positions of all rows.
        row_height: height of a row in pixels; rows are taller if a name needs several lines.
    """
    lines = max(len(wrapped(name).split("<br>")) for name in heights)
    lay_out(figure, 150 + len(heights) * max(row_height, 18 * lines + 8))
    figure.update_layout(
        bargap=0,
        legend={"orientation": "h", "x": 0, "y": 0.995, "yanchor": "top", "yref": "container"},
        margin={"t": 70},
    )
    figure.update_yaxes(
        tickvals=list(heights.values()),
        ticktext=[wrapped(name) for name in heights],
        range=[0.4, len(heights) + 0.6],
        showgrid=True,
        ticks="",
    )
    figure.update_xaxes(tickformat="+", labelalias={"+0": "0"}, zeroline=False, rangemode="tozero")
