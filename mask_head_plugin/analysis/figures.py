"""Interactive figures of an analysis. Importing this module needs plotly (extra ``report``)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..evaluation.bootstrap import precision_recall
from ..evaluation.matching import FloatArray
from ..pages.figures import BLACK, COLOURS, DASHES, GREY, Figure, lay_out, plotly_text
from ..pages.tables import number
from .analysis import Analysis
from .curves import NUM_BINS
from .diagnosis import TASK_NAMES
from .errors import MEANINGS
from .mask_quality import MAP_MARGIN, MAP_SIDE
from .measures import ERROR_THRESHOLDS

BAR_HEIGHT = 30
MOST_CLASSES = 40
"""Largest number of classes in the confusion matrix, which shows the most confused classes."""
CLASSES_WITH_NUMBERS = 15
TASK_PATTERNS = {"bbox": "", "segm": "/"}


def figures(analysis: Analysis) -> dict[str, list[Figure]]:
    """Returns the figures of each section, by the section's key."""
    made = {
        "errors": [_errors(analysis)],
        "branches": [_branches(analysis)],
        "quality": [_error_maps(analysis)],
        "classes": [_precision_recall(analysis), _reliability(analysis), _confusion(analysis)],
    }
    return {key: [x for x in of_key if x is not None] for key, of_key in made.items()}


def _errors(analysis: Analysis) -> Figure | None:
    findings = analysis.findings
    titles = [f"at IoU {t:g}" for t in ERROR_THRESHOLDS]
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04
    )
    for column, threshold in enumerate(ERROR_THRESHOLDS, 1):
        for task in findings.scene.tasks:
            won = [findings.value(task, "error", name, threshold) for name in findings.kinds]
            bar = _bar(task, won, findings.kinds, [MEANINGS[x] for x in findings.kinds])
            figure.add_trace(bar.update(showlegend=column == 1), row=1, col=column)
    _lay_out_bars(figure, 110 + BAR_HEIGHT * len(findings.kinds) * len(findings.scene.tasks))
    figure.update_xaxes(title_text="AP gained")
    return Figure("errors", "AP gained by repairing one kind of error", "", figure)


def _branches(analysis: Analysis) -> Figure | None:
    findings = analysis.findings
    oracles = {task: findings.oracles(task) for task in findings.scene.tasks}
    names = dict.fromkeys(itertools.chain(*oracles.values()))
    if not names:
        return None
    figure = make_subplots(rows=1, cols=1)
    for task in findings.scene.tasks:
        base = findings.value(task, "AP", "AP")
        won = {x: findings.value(task, "oracle", x) for x in names if x in oracles[task]}
        shown = {"this model": base, **{name: base + more for name, more in won.items()}}
        figure.add_trace(_bar(task, list(shown.values()), list(shown), [""] * len(shown)))
    _lay_out_bars(figure, 110 + BAR_HEIGHT * (len(names) + 1) * len(findings.scene.tasks))
    figure.update_xaxes(title_text="AP", range=[0, 110])
    return Figure("branches", "AP with one part of the model perfect", "", figure)


def _bar(task: str, values: list[float], names: list[str], notes: list[str]) -> Any:
    return go.Bar(
        x=[None if np.isnan(x) else x for x in values],
        y=[plotly_text(x) for x in names],
        text=[number(x, ".1f") for x in values],
        textposition="outside",
        cliponaxis=False,
        orientation="h",
        name=TASK_NAMES[task],
        marker={
            "color": COLOURS[0] if task == "bbox" else COLOURS[1],
            "pattern": {"shape": TASK_PATTERNS[task], "fgcolor": "white", "size": 6},
        },
        customdata=notes,
        hovertemplate="%{y}: %{x:.2f}<br>%{customdata}<extra>" + TASK_NAMES[task] + "</extra>",
    )


def _lay_out_bars(figure: Any, height: int) -> None:
    lay_out(figure, height)
    figure.update_layout(
        barmode="group",
        bargap=0.25,
        legend={"orientation": "h", "x": 0, "y": 0.995, "yanchor": "top", "yref": "container"},
        margin={"t": 60, "r": 40},
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")


def _error_maps(analysis: Analysis) -> Figure | None:
    quality = analysis.quality
    if quality is None or not len(quality.objects):
        return None
    titles = ["missing pixels", "extra pixels"]
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.06)
    # Centres of the cells in coordinates of the box, which spans 0 to 1.
    places = -MAP_MARGIN + (np.arange(MAP_SIDE) + 0.5) / MAP_SIDE * (1 + 2 * MAP_MARGIN)
    top = max(float(np.max([quality.missing, quality.extra])), 1e-3)
    for column, values in enumerate((quality.missing, quality.extra), 1):
        heatmap = go.Heatmap(
            z=100 * values,
            x=places,
            y=places,
            zmin=0,
            zmax=100 * top,
            colorscale="Cividis",
            showscale=column == 2,
            colorbar={"title": {"text": "% of objects", "side": "right"}, "thickness": 12},
            hovertemplate="x %{x:.2f}, y %{y:.2f}: %{z:.1f}%<extra></extra>",
        )
        figure.add_trace(heatmap, row=1, col=column)
        box = go.Scatter(
            x=[0, 1, 1, 0, 0],
            y=[0, 0, 1, 1, 0],
            mode="lines",
            line={"color": "rgb(255,255,255)", "dash": "dot", "width": 1.5},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_trace(box, row=1, col=column)
    lay_out(figure, 420)
    figure.update_xaxes(showgrid=False, constrain="domain")
    figure.update_yaxes(autorange="reversed", showgrid=False, constrain="domain")
    for column in (1, 2):
        figure.update_yaxes(scaleanchor=f"x{column if column > 1 else ''}", col=column)
    caption = (
        f"Mean over {len(quality.objects):,} found objects, in coordinates of the true box "
        "(dotted; 0 is its left and top edge, 1 its right and bottom edge)."
    )
    return Figure("error-maps", "Where masks are wrong", caption, figure)


def _precision_recall(analysis: Analysis) -> Figure | None:
    figure = make_subplots(rows=1, cols=1)
    recall = np.linspace(0, 1, 101)
    for number_of, (task, assignment) in enumerate(analysis.findings.found.items()):
        for k, threshold in enumerate((0.5, 0.75, 0.9)):
            curve = precision_recall(assignment.matches, threshold)
            figure.add_trace(
                go.Scatter(
                    x=recall,
                    y=_or_none(curve),
                    mode="lines",
                    name=f"{TASK_NAMES[task]}, IoU {threshold:g}",
                    line={"color": COLOURS[number_of], "width": 2, "dash": DASHES[k]},
                )
            )
    lay_out(figure, 420)
    figure.update_xaxes(title_text="recall", range=[0, 1])
    figure.update_yaxes(title_text="precision", range=[0, 1.02])
    caption = "Precision at each recall, averaged over the classes."
    return Figure("precision-recall", "Precision and recall", caption, figure)


def _reliability(analysis: Analysis) -> Figure | None:
    found = analysis.reliability
    if not found.count.sum():
        return None
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    middles = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    counts = go.Bar(
        x=middles,
        y=found.count,
        name="detections",
        marker={"color": "#d9d9d9"},
        width=0.9 / NUM_BINS,
    )
    figure.add_trace(counts, secondary_y=True)
    line = {"color": GREY, "dash": "dash", "width": 1}
    perfect = go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name="perfectly calibrated", line=line)
    figure.add_trace(perfect)
    figure.add_trace(
        go.Scatter(
            x=_or_none(found.score),
            y=_or_none(found.precision),
            name="this model",
            mode="lines+markers",
            line={"color": BLACK, "width": 2},
            customdata=found.count,
            hovertemplate="score %{x:.2f}: %{y:.0%} right of %{customdata:,}<extra></extra>",
        )
    )
    lay_out(figure, 420)
    figure.update_xaxes(title_text="score", range=[0, 1])
    figure.update_yaxes(
        title_text="share of right detections", range=[0, 1.02], dtick=0.2, secondary_y=False
    )
    # The bars are drawn below the lines, so that the lines stay readable.
    most = 1.05 * float(found.count.max())
    figure.update_yaxes(
        title_text="detections",
        range=[0, most],
        secondary_y=True,
        showgrid=False,
        side="right",
        tickmode="auto",
    )
    figure.update_layout(yaxis={"overlaying": "y2"}, yaxis2={"overlaying": None})
    caption = (
        "How often detections with a given score are right, at IoU 0.5. Below the dashed line, "
        "the model is overconfident. Mean difference (expected calibration error): "
        f"{100 * found.error:.1f}%."
    )
    return Figure("reliability", "How reliable a score is", caption, figure)


def _confusion(analysis: Analysis) -> Figure | None:
    counts = analysis.confusion
    names = [*analysis.class_names, "background"]
    shown = _confused_most(counts)
    counts = counts[np.ix_(shown, shown)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labels = [plotly_text(names[k]) for k in shown]
    missed = [*labels[:-1], "nothing"]
    heatmap = go.Heatmap(
        z=100 * shares,
        x=missed,
        y=labels,
        text=counts,
        texttemplate="%{text}" if len(shown) <= CLASSES_WITH_NUMBERS else None,
        colorscale=[[0, "#ffffff"], [0.5, "#56b4e9"], [1, "#0072b2"]],
        zmin=0,
        zmax=100,
        colorbar={"title": {"text": "% of row", "side": "right"}, "thickness": 12},
        hovertemplate="%{y} found as %{x}: %{text} (%{z:.0f}%)<extra></extra>",
    )
    figure = go.Figure(heatmap)
    lay_out(figure, 160 + 34 * min(len(shown), 20) + 8 * max(len(shown) - 20, 0))
    figure.update_xaxes(title_text="found as", showgrid=False, ticks="", type="category")
    figure.update_yaxes(
        title_text="true", autorange="reversed", showgrid=False, ticks="", type="category"
    )
    caption = (
        "Detections above the best threshold of their class, at IoU 0.5. The last column counts "
        "objects that were not found; the last row counts detections on background."
    )
    if len(shown) < len(names):
        caption += f" Shows the {len(shown) - 1} most confused of {len(names) - 1} classes."
    return Figure("confusion", "Confusion between classes", caption, figure)


def _confused_most(counts: Any) -> list[int]:
    """Returns the indices of the most confused classes, ascending, followed by the background."""
    num_classes = len(counts) - 1
    off = counts[:-1, :-1] * (1 - np.eye(num_classes, dtype=int))
    order = np.argsort(-(off.sum(0) + off.sum(1)), kind="stable")[:MOST_CLASSES]
    return [*sorted(order.tolist()), num_classes]


def _or_none(values: FloatArray) -> list[float | None]:
    return [None if np.isnan(x) else float(x) for x in values]
