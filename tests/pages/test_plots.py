"""Figures on a page, and plots for papers that are drawn from the same data."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure as Plot

pytest.importorskip("plotly", reason="figures need the extra 'report'")

import plotly.graph_objects as go
from plotly.subplots import make_subplots

import mask_head_plugin.pages
from mask_head_plugin.evaluation.difference import PairedDifference
from mask_head_plugin.pages.differences import BETTER
from mask_head_plugin.pages.figures import (
    BLACK,
    DARK_COLOURS,
    Figure,
    band_colour,
    lay_out,
    plotly_text,
)
from mask_head_plugin.pages.intervals import (
    VERDICTS,
    IntervalRow,
    add_intervals,
    lay_out_rows,
    row_heights,
)
from mask_head_plugin.pages.paper_plots import paper_plot, save_figures
from mask_head_plugin.pages.plots import label_bars

NAME = "a & <b>"
FIGURES_JS = Path(mask_head_plugin.pages.__file__).with_name("figures.js")


def figure(name, *traces):
    made = go.Figure([*traces])
    lay_out(made, 300)
    made.update_xaxes(title_text="recall", range=[0, 1])
    return Figure(name, "Title", "Caption", made)


def curve(**settings):
    line = {"color": "#0072b2", "dash": "dash", "width": 2}
    style = {"mode": "lines", "name": plotly_text(NAME), "line": line}
    return go.Scatter(x=[0, 0.5, 1], y=[3, None, 1], **style, **settings)


def test_figures_for_papers_are_reproducible_files(tmp_path):
    scale = [[0, "#ffffff"], [1, "#0072b2"]]
    heatmap = go.Heatmap(z=[[1.0]], x=["a"], y=["b"], colorscale=scale)
    figures = [figure("pr", curve()), figure("map", heatmap)]
    contents = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        folder.mkdir()
        save_figures(figures, folder)
        contents.append({x.name: x.read_bytes() for x in folder.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"pr.svg", "pr.pdf", "map.svg", "map.pdf"}
    assert contents[0]["pr.svg"].startswith(b"<?xml") and contents[0]["map.pdf"][:4] == b"%PDF"


def test_a_plot_for_papers_shows_the_same_as_the_page():
    band = go.Scatter(
        x=[0, 1, 1, 0], y=[4, 2, 1, 3], fill="toself", fillcolor="rgba(0,114,178,0.18)"
    )
    (axes,) = paper_plot(figure("pr", band, curve())).axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 0.5, 1] and line.get_linestyle() == "--"
    assert (to_hex(line.get_color()), line.get_label()) == ("#0072b2", NAME)
    assert (axes.get_xlabel(), axes.get_xlim()) == ("recall", (0, 1))
    (band,) = axes.collections
    (outline,) = band.get_paths()
    assert {tuple(x) for x in outline.vertices.tolist()} == {(0, 4), (1, 2), (1, 1), (0, 3)}


def test_bars_for_papers_have_the_same_lengths_names_and_numbers():
    bars = [
        go.Bar(x=[3.0, None], y=["one", plotly_text(NAME)], text=["3.0", "none"], **style)
        for style in (
            {"orientation": "h", "name": "boxes", "marker": {"color": "#0072b2"}},
            {"orientation": "h", "name": "masks", "marker": {"color": "#d55e00"}},
        )
    ]
    made = figure("bars", *bars)
    made.figure.update_layout(barmode="group", bargap=0.2)
    made.figure.update_yaxes(autorange="reversed")
    (axes,) = paper_plot(made).axes
    boxes, masks = (c.patches[0] for c in axes.containers)
    assert boxes.get_width() == masks.get_width() == 3
    assert boxes.get_y() + boxes.get_height() == pytest.approx(masks.get_y()), (
        "bars of a group must be adjacent"
    )
    assert axes.yaxis.get_inverted()
    assert [x.get_text() for x in axes.get_yticklabels()] == ["one", NAME]
    assert [x.get_text() for x in axes.texts] == ["3.0", "none"] * 2


def test_a_heatmap_for_papers_has_its_values_in_place():
    heatmap = go.Heatmap(
        z=[[0, 100], [50, None]],
        x=["a", "b"],
        y=["c", "d"],
        text=[["0", "100"], ["50", ""]],
        texttemplate="%{text}",
        colorscale=[[0, "#ffffff"], [1, "#0072b2"]],
        zmin=0,
        zmax=100,
        colorbar={"title": {"text": "%"}},
    )
    axes, bar = paper_plot(figure("map", heatmap)).axes
    (cells,) = axes.collections
    assert cells.get_array().filled(-1).ravel().tolist() == [0, 100, 50, -1]
    assert [x.get_text() for x in axes.get_xticklabels()] == ["a", "b"]
    numbers = {x.get_text(): (x.get_position(), x.get_color()) for x in axes.texts}
    assert numbers["100"] == ((1, 0), "white") and numbers["50"] == ((0, 1), "black")
    assert bar.get_ylabel() == "%"


def test_intervals_on_the_page_and_in_plots_show_the_measured_values():
    paired = PairedDifference("AP", 3, 1, 2, 0.5, 3, 0.5, 3, math.nan, 1, False)
    made = make_subplots(rows=1, cols=2)
    heights = row_heights(["dog", NAME])
    for column in (1, 2):
        add_intervals(made, heights, [IntervalRow(NAME, paired, BETTER)], column)
    lay_out_rows(made, heights)
    assert len(made.layout.shapes) == 2, "each panel must mark zero"
    plot = paper_plot(Figure("intervals", "", "", made))
    axes, _ = plot.axes
    ((line, _, (interval,)),) = [x.lines for x in axes.containers if x[0].get_xdata()[0] == 2]
    assert interval.get_segments()[0].tolist() == [[0.5, 1], [3, 1]]
    assert [x.get_text() for x in axes.get_yticklabels()] == ["dog", NAME]
    assert line.get_marker() == ">" and axes.get_xlim()[0] <= 0
    names = [x.get_text() for x in plot.legends[0].get_texts()]
    assert names == list(VERDICTS), "each verdict must appear once in the legend"


def test_traces_on_a_second_axis_are_drawn_behind_the_others():
    made = make_subplots(specs=[[{"secondary_y": True}]])
    made.add_trace(go.Bar(x=[0.5], y=[300], width=0.1), secondary_y=True)
    made.add_trace(curve())
    lay_out(made, 300)
    made.update_yaxes(range=[0, 400], title_text="detections", secondary_y=True)
    axes, twin = paper_plot(Figure("x", "", "", made)).axes
    assert twin.patches[0].get_height() == 300 and twin.get_ylim() == (0, 400)
    assert twin.get_ylabel() == "detections" and axes.get_zorder() > twin.get_zorder()
    assert len(axes.lines) == 1 and not axes.patches


def test_no_line_crosses_the_number_of_a_bar():
    axes = Plot().subplots()
    label_bars(axes, axes.barh([0], [0.9]), "%.2f")
    line = axes.axvline(1)
    (number,) = axes.texts
    assert number.get_text() == "0.90" and number.get_zorder() > line.get_zorder()
    assert number.get_bbox_patch().get_facecolor() == to_rgba("white")


def test_the_page_gets_the_complete_figure_with_its_script_escaped():
    made = figure("x", curve(text="</script><!--"))
    text = made.to_json()
    assert "<" not in text and "&" not in text
    spec = json.loads(text)
    assert spec["data"][0]["text"] == "</script><!--"
    assert spec["config"]["toImageButtonOptions"] == {"format": "svg", "filename": "x"}
    drawn = {x for x in DARK_COLOURS if f'"{x}"' in text}
    assert {"#0072b2", "#ececec", "rgb(36,36,36)"} <= drawn, "the dark theme replaces these colours"


@pytest.mark.parametrize("colour", [BLACK, "#0072b2", "#d55e00"])
def test_a_curve_and_its_band_have_one_colour_in_the_dark_theme(colour):
    """Replaces colours as the page's script does, with the pattern taken from that script."""
    band = go.Scatter(x=[0, 1, 0], y=[0, 1, 1], fill="toself", fillcolor=band_colour(colour))
    line = go.Scatter(x=[0, 1], y=[0, 1], line={"color": colour})
    pattern = re.search(r"text\.replace\(/(.+?)/g", FIGURES_JS.read_text())[1]
    themed = re.sub(
        pattern,
        lambda quoted: json.dumps(DARK_COLOURS.get(quoted[1], quoted[1])),
        figure("x", band, line).to_json(),
    )
    band, line = json.loads(themed)["data"]
    assert line["line"]["color"] != colour
    assert band["fillcolor"] == band_colour(line["line"]["color"])
