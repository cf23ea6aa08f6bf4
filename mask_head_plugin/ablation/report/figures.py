"""The report's interactive figures. Importing this module needs plotly (extra ``report``).

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Markers, dashes
or labels show the same information as colours. Plotly reads labels as HTML, so names are escaped.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ...evaluation.bootstrap import class_ap, precision_recall
from ...evaluation.coco_ap import METRICS
from ...pages.differences import verdict
from ...pages.figures import (
    BAND,
    BLACK,
    COLOURS,
    DASHES,
    MIDDLE,
    Figure,
    band_colour,
    lay_out,
    plotly_text,
    wrapped,
)
from ...pages.intervals import ROW_HEIGHT, IntervalRow, add_intervals, lay_out_rows, row_heights
from ...pages.tables import number as formatted
from ..trial_folder import Trial
from .study import TASK_WORDS, Study, Variant, metric_words

FloatArray = npt.NDArray[np.float64]

MOST_CLASSES = 40
CLASSES_WITH_NUMBERS = 20
CELL_WIDTH, NAMES_WIDTH = 38, 240
"""Width in pixels of a cell with a number, and of the names next to the cells."""
SMOOTHED_SHARE = 20
"""Losses are averaged over windows of 1 / SMOOTHED_SHARE of the logged iterations."""
PR_THRESHOLDS = (0.5, 0.75)


def figures(study: Study) -> list[Figure]:
    """Returns the figures for which there are data."""
    made = (
        _metric_differences(study),
        _other_metrics(study),
        _learning_curves(study),
        _classes(study),
        _precision_recall(study),
    )
    return [figure for figure in made if figure is not None]


def _metric_differences(study: Study) -> Figure | None:
    if not _compared(study, study.metric):
        return None
    figure = make_subplots(rows=1, cols=1)
    _add_intervals(figure, study, study.metric, 1)
    _add_paper(figure, study)
    lay_out_rows(figure, _rows(study))
    figure.update_xaxes(
        title_text=f"{metric_words(study.metric)} minus that of<br>{wrapped(study.baseline.name)}"
    )
    caption = (
        "Lines are 95% intervals over seeds and images; with one seed, over images only. A "
        "true difference inside the grey bar would be missed by more than one study in five."
    )
    title = f"Difference in {metric_words(study.metric)} from {study.baseline.name}"
    return Figure("differences", title, caption, figure)


def _other_metrics(study: Study) -> Figure | None:
    keys = [key for name in METRICS if (key := f"{study.task}/{name}") != study.metric]
    keys = [key for key in keys if _compared(study, key)]
    if not keys:
        return None
    titles = [key.partition("/")[2] for key in keys]
    figure = make_subplots(
        rows=1, cols=len(keys), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.02
    )
    for column, key in enumerate(keys, 1):
        _add_intervals(figure, study, key, column)
    lay_out_rows(figure, _rows(study))
    caption = (
        "As above, for the AP of small, medium and large objects (APs, APm, APl) and for the AP at "
        "individual IoU thresholds."
    )
    task = TASK_WORDS.get(study.task, study.task)
    title = f"Differences in the other {task} metrics from {study.baseline.name}"
    return Figure("other-metrics", title, caption, figure)


def _compared(study: Study, key: str) -> list[Variant]:
    """Returns the variants whose difference from the baseline is known."""
    found = [v for v in study.variants if v is not study.baseline]
    pairs = [(v, study.comparison(v, key)) for v in found]
    return [v for v, c in pairs if c is not None and math.isfinite(c.difference)]


def _rows(study: Study) -> dict[str, int]:
    """Returns the vertical position of each variant except the baseline, the first at the top."""
    return row_heights([v.name for v in study.variants if v is not study.baseline])


def _add_intervals(figure: Any, study: Study, key: str, column: int) -> None:
    heights = _rows(study)
    compared = [(v, c) for v in _compared(study, key) if (c := study.comparison(v, key))]
    # An AP, which lies in 0 to 100, limits the differences that are possible.
    ends = [
        (max(-c.detectable, -c.baseline), min(c.detectable, 100 - c.baseline)) for _, c in compared
    ]
    bars = go.Bar(
        y=[heights[v.name] for v, _ in compared],
        x=[high - low for low, high in ends],
        base=[low for low, _ in ends],
        orientation="h",
        width=0.5,
        marker={"color": BAND},
        hoverinfo="skip",
        name="too small to find reliably",
        showlegend=column == 1,
        legendgroup="detectable",
    )
    figure.add_trace(bars, row=1, col=column)
    rows = [IntervalRow(v.name, c, verdict(c)) for v, c in compared]
    add_intervals(figure, heights, rows, column)


def _add_paper(figure: Any, study: Study) -> None:
    heights = _rows(study)
    reference = study.baseline.paper.get(study.metric)
    given = [v for v in study.variants if v.name in heights and study.metric in v.paper]
    if reference is None or not given:
        return
    figure.add_trace(
        go.Scatter(
            x=[v.paper[study.metric] - reference for v in given],
            y=[heights[v.name] for v in given],
            mode="markers",
            cliponaxis=False,
            marker={"color": "#cc79a7", "symbol": "diamond-open", "size": 11, "line": {"width": 2}},
            name="paper",
            hovertemplate="paper: %{x:+.1f}<extra></extra>",
        )
    )


def _learning_curves(study: Study) -> Figure | None:
    """Plots the metric over the iterations or, if it was measured only once, the losses."""
    logs = {v.name: [trial.log() for trial in _with_log(v)] for v in study.variants}
    measured = [
        {row["iteration"] for row in log if row.get(study.metric) is not None}
        for many in logs.values()
        for log in many
    ]
    evaluated = any(len(iterations) > 1 for iterations in measured)
    keys = [study.metric] if evaluated else ["total_loss", "loss_mask"]
    titles = [metric_words(key) for key in keys]
    figure = make_subplots(rows=1, cols=len(keys), subplot_titles=titles, horizontal_spacing=0.08)
    for column, key in enumerate(keys, 1):
        for number, variant in enumerate(study.variants):
            series = [found for log in logs[variant.name] if (found := _series(log, key))]
            if not series:
                continue
            x, curves = _common(series)
            if not evaluated:
                x, curves = _smoothed(x, curves)
            style = _line(study, variant, number)
            label = {"legendgroup": str(number), "showlegend": column == 1}
            style["mode"] = "lines+markers" if evaluated else "lines"
            _add_curve(figure, column, x, curves, style | label)
    if not figure.data:
        return None
    _lay_out(figure, 420, study)
    figure.update_xaxes(title_text="iteration", rangemode="tozero")
    caption = (
        "Each line is the mean over a variant's seeds, with a band from the lowest to the highest "
        "seed."
    )
    if not evaluated:
        caption += (
            " The curves are smoothed losses, because the runs were not evaluated during training. "
            "If the variants have different loss functions, the curves show whether each variant "
            "converges, not which variant is better."
        )
    return Figure("learning", "Learning curves", caption, figure)


def _with_log(variant: Variant) -> Sequence[Trial]:
    """Returns the finished trials or, if a variant has none, all its trials."""
    return variant.finished or variant.trials


def _series(log: Iterable[dict[str, Any]], key: str) -> dict[int, float]:
    """Returns a key's logged values by iteration; ``loss_mask`` is the sum of all mask losses."""
    series = {}
    for row in log:
        names = [x for x in row if x.startswith("loss_mask")] if key == "loss_mask" else [key]
        values = [row[name] for name in names if row.get(name) is not None]
        if values and all(math.isfinite(value) for value in values):
            series[int(row["iteration"])] = sum(values)
    return series


def _common(series: Sequence[dict[int, float]]) -> tuple[FloatArray, FloatArray]:
    """Returns the I iterations that all S series have, and the (S, I) values at them."""
    common = sorted(set.intersection(*map(set, series)))
    values = [[x[iteration] for iteration in common] for x in series]
    return np.array(common, float), np.array(values, float)


def _smoothed(x: FloatArray, curves: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Returns running means of (S, I) curves, only where the window is complete."""
    if not len(x):
        return x, curves
    width = len(x) // SMOOTHED_SHARE // 2 * 2 + 1
    half, window = width // 2, np.ones(width) / width
    smooth = np.stack([np.convolve(y, window, "valid") for y in curves])
    return x[half : len(x) - half], smooth


def _add_curve(
    figure: Any, column: int, x: FloatArray, curves: FloatArray, style: dict[str, Any]
) -> None:
    """Adds the mean of a variant's (S, I) curves, with a band if there are several curves."""
    place = {"row": 1, "col": column}
    if len(curves) > 1:
        band = go.Scatter(
            x=[*x, *x[::-1]],
            y=[*curves.max(0), *curves.min(0)[::-1]],
            fill="toself",
            fillcolor=band_colour(style["line"]["color"]),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            legendgroup=style["legendgroup"],
            showlegend=False,
        )
        figure.add_trace(band, **place)
    figure.add_trace(go.Scatter(x=x, y=curves.mean(0), **style), **place)


def _classes(study: Study) -> Figure | None:
    """Plots how much the AP of each class differs from the baseline's."""
    matches = study.matches(study.task)
    name = study.metric.partition("/")[2]
    metric = name if name in METRICS else "AP"
    others = [v for v in study.variants if v is not study.baseline and v.name in matches]
    if study.baseline.name not in matches or not others:
        return None
    ap = {v: np.mean([class_ap(m, metric) for m in matches[v]], 0) for v in matches}
    classes = [str(x) for x in matches[study.baseline.name][0].class_names]
    ap_differences = np.stack([ap[v.name] - ap[study.baseline.name] for v in others])
    shown = _most_different(ap_differences)
    values = ap_differences[:, shown]
    limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    texts = [[formatted(x, "+.1f") for x in row] for row in values]
    heatmap = go.Heatmap(
        z=[[None if math.isnan(x) else x for x in row] for row in values.tolist()],
        x=list(range(len(shown))),
        y=[len(others) - k for k in range(len(others))],
        text=texts,
        texttemplate="%{text}" if len(shown) <= CLASSES_WITH_NUMBERS else None,
        customdata=[
            [[plotly_text(classes[k]), plotly_text(v.name)] for k in shown] for v in others
        ],
        hovertemplate="%{customdata[1]}<br>%{customdata[0]}: %{text}<extra></extra>",
        colorscale=[[0, "#d55e00"], [0.5, MIDDLE], [1, "#0072b2"]],
        zmin=-max(limit, 1e-9),
        zmax=max(limit, 1e-9),
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": metric, "side": "right"}, "thickness": 12, "tickformat": "+"},
    )
    figure = go.Figure(heatmap)
    names = [wrapped(v.name) for v in others]
    lines = max(name.count("<br>") + 1 for name in names)
    longest = max(len(classes[k]) for k in shown)
    _lay_out(figure, 90 + 7 * min(longest, 30) + len(others) * max(ROW_HEIGHT, 18 * lines + 8))
    ticks = [plotly_text(textwrap.shorten(classes[k], 30, placeholder="…")) for k in shown]
    figure.update_xaxes(tickvals=list(range(len(shown))), ticktext=ticks, showgrid=False, ticks="")
    figure.update_xaxes(autotickangles=[0, -90], showline=False)
    figure.update_yaxes(
        tickvals=heatmap.y, ticktext=names, showgrid=False, ticks="", showline=False
    )
    caption = "Mean over seeds, without intervals. Individual classes vary more than their mean."
    if len(shown) < len(classes):
        caption += f" Shows the {len(shown)} of {len(classes)} classes that differ most."
    words = metric_words(f"{study.task}/{metric}")
    title = f"Difference in each class's {words} from {study.baseline.name}"
    width = NAMES_WIDTH + CELL_WIDTH * len(shown) * (len(shown) <= CLASSES_WITH_NUMBERS)
    return Figure("classes", title, caption, figure, width)


def _most_different(ap_differences: FloatArray) -> list[int]:
    """Returns the classes to show: all classes, or the ones that differ most, in that order."""
    if ap_differences.shape[1] <= MOST_CLASSES:
        return list(range(ap_differences.shape[1]))
    largest = np.abs(np.nan_to_num(ap_differences)).max(0)
    return [int(k) for k in np.argsort(-largest, kind="stable")[:MOST_CLASSES]]


def _precision_recall(study: Study) -> Figure | None:
    matches = study.matches(study.task)
    if not matches:
        return None
    titles = [f"IoU {threshold:g}" for threshold in PR_THRESHOLDS]
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.08)
    recall = np.linspace(0, 1, 101)
    for column, threshold in enumerate(PR_THRESHOLDS, 1):
        for number, variant in enumerate(study.variants):
            if variant.name in matches:
                curves = [precision_recall(m, threshold) for m in matches[variant.name]]
                style = _line(study, variant, number) | {"mode": "lines"}
                label = {"legendgroup": str(number), "showlegend": column == 1}
                _add_curve(figure, column, recall, np.stack(curves), style | label)
    _lay_out(figure, 460, study)
    figure.update_xaxes(title_text="recall", range=[0, 1])
    figure.update_yaxes(range=[0, 1.02])
    figure.update_yaxes(title_text="precision", col=1)
    caption = (
        f"{TASK_WORDS.get(study.task, study.task).capitalize()} precision at each recall, averaged "
        "over classes. Each line is the mean over a variant's seeds, with a band from the lowest "
        "to the highest seed."
    )
    return Figure("precision-recall", "Precision and recall", caption, figure)


def _line(study: Study, variant: Variant, number: int) -> dict[str, Any]:
    """Returns the name and style of a variant's line, which are the same in every figure."""
    if variant is study.baseline:
        line = {"color": BLACK, "width": 3}
    else:
        number -= number > study.variants.index(study.baseline)
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        line = {"color": COLOURS[number % len(COLOURS)], "width": 2, "dash": dash}
    return {
        "line": line,
        "name": wrapped(variant.name),
        "hovertemplate": f"{plotly_text(variant.name)}<br>%{{x}}: %{{y:.3f}}<extra></extra>",
    }


def _lay_out(figure: Any, height: int, study: Study | None = None) -> None:
    """Applies the common layout; with a study, makes room for a legend of its variants."""
    if study is not None:
        lines = sum(len(wrapped(v.name).split("<br>")) for v in study.variants)
        height = max(height, 90 + 21 * lines)
    lay_out(figure, height)
