"""Plots for papers, and what the page draws its figures from."""

from __future__ import annotations

import json

import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Plot

pytest.importorskip("plotly", reason="figures need the extra 'report'")

import plotly.graph_objects as go

from mask_head_plugin.pages.figures import DARK_COLOURS, Figure, lay_out, plotly_text
from mask_head_plugin.pages.plots import _curves, label_bars, save_curves

NAME = "a & <b>"


def figure(name, *traces):
    made = go.Figure([*traces])
    lay_out(made, 300)
    made.update_xaxes(title_text="recall", range=[0, 1])
    return Figure(name, "Title", "Caption", made)


def curve(**settings):
    line = {"color": "#0072b2", "dash": "dash", "width": 2}
    style = {"mode": "lines", "name": plotly_text(NAME), "line": line}
    return go.Scatter(x=[0, 0.5, 1], y=[3, None, 1], **style, **settings)


def test_curves_are_drawn_for_papers_the_same_each_time_and_other_figures_are_not(tmp_path):
    figures = [figure("pr", curve()), figure("classes", go.Heatmap(z=[[1.0]]))]
    contents = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        folder.mkdir()
        save_curves(figures, folder)
        contents.append({x.name: x.read_bytes() for x in folder.iterdir()})
    assert contents[0] == contents[1] and set(contents[0]) == {"pr.svg", "pr.pdf"}
    assert contents[0]["pr.svg"].startswith(b"<?xml") and contents[0]["pr.pdf"][:4] == b"%PDF"


def test_a_plot_for_papers_shows_what_the_page_does():
    band = go.Scatter(
        x=[0, 1, 1, 0], y=[4, 2, 1, 3], fill="toself", fillcolor="rgba(0,114,178,0.18)"
    )
    (axes,) = _curves(figure("pr", band, curve())).axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 0.5, 1] and line.get_linestyle() == "--"
    assert (line.get_color(), line.get_label()) == ("#0072b2", NAME)
    assert (axes.get_xlabel(), axes.get_xlim()) == ("recall", (0, 1))
    (band,) = axes.collections
    (outline,) = band.get_paths()
    assert {tuple(x) for x in outline.vertices.tolist()} == {(0, 4), (1, 2), (1, 1), (0, 3)}


def test_no_line_strikes_through_the_number_of_a_bar():
    axes = Plot().subplots()
    label_bars(axes, axes.barh([0], [0.9]), "%.2f")
    line = axes.axvline(1)
    (number,) = axes.texts
    assert number.get_text() == "0.90" and number.get_zorder() > line.get_zorder()
    assert number.get_bbox_patch().get_facecolor() == to_rgba("white")


def test_the_page_gets_all_of_a_figure_and_no_end_of_its_script():
    made = figure("x", curve(text="</script><!--"))
    text = made.to_json()
    assert "<" not in text and "&" not in text
    spec = json.loads(text)
    assert spec["data"][0]["text"] == "</script><!--"
    assert spec["config"]["toImageButtonOptions"] == {"format": "svg", "filename": "x"}
    drawn = {x for x in DARK_COLOURS if f'"{x}"' in text}
    assert {"#0072b2", "#ececec", "rgb(36,36,36)"} <= drawn, "are what a dark theme exchanges"
