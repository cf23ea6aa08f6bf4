#!/usr/bin/env python3
"""Draws the figures of docs/roi_align_sampling.md from the results in docs/results/.

With --take FOLDER, the results of the other sampling_*.py scripts are first copied from that
folder. The copies are packed: a table becomes a row of column names followed by rows of values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mask_head_plugin.pages.plots import COLOURS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PREFIX = "sampling_"
TAKEN = ("error", "exchange", "training", "equivariance", "whole")
"""First words of the file names of the results that --take copies."""

BASELINE = "four samples"
MISPLACED = ("no half-pixel shift", "edges rounded", "RoIWarp", "RoIPool")
"""Ways that read in the wrong place. They get separate axes: their differences are larger."""

NAMES = {
    "ROIAlign, adaptive": "adaptive",
    "ROIAlign without the half-pixel shift": "no half-pixel shift",
    "ROIPool, max": "RoIPool",
}
"""Names of ways in the figures, by their names in configs/ablations/roi_pooling.yaml."""

STYLES: dict[str, tuple[str, str, str]] = {
    BASELINE: ("#1a1a1a", "o", "-"),
    "one sample": (COLOURS[1], "s", "--"),
    "adaptive": (COLOURS[2], "^", ":"),
    "16 samples": (COLOURS[3], "D", "-."),
    "Gauss points": (COLOURS[4], "v", "--"),
    "best points": (COLOURS[0], "P", "-"),
}
"""Colour, marker and dashes of a way that is drawn as a curve."""

WIDTH = 5.2
"""Width of a figure in inches; its panels are one below the other, so that it fits on a phone."""

Results = dict[str, dict[str, Any]]
Rows = list[dict[str, Any]]


def read_results(folder: Path) -> Results:
    """Returns the results by name, such as ``error_shapes``."""
    return {
        path.stem.removeprefix(PREFIX): unpacked(json.loads(path.read_text()))
        for path in sorted(folder.glob(f"{PREFIX}*.json"))
    }


def take_results(source: Path, folder: Path) -> None:
    """Copies the results from ``source`` to ``folder``, packed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.json")):
        if path.name.split("_")[0] in TAKEN:
            content = json.loads(path.read_text())
            (folder / f"{PREFIX}{path.name}").write_text(packed(content) + "\n")


def packed(content: dict[str, Any]) -> str:
    """Returns JSON where a table is a row of column names and rows of values, one row per line."""
    lines = []
    for key, value in content.items():
        text = json.dumps(value)
        if is_table(value):
            columns = list(value[0])
            rows = [columns, *([row[name] for name in columns] for row in value)]
            text = "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "]"
        lines.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


def is_table(value: Any) -> bool:
    """Returns whether a value is a list of dictionaries with the same keys."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return False
    return all(list(row) == list(value[0]) for row in value)


def unpacked(content: dict[str, Any]) -> dict[str, Any]:
    """Undoes ``packed``: turns its tables back into lists of dictionaries."""
    tables = {
        key: [dict(zip(value[0], row, strict=True)) for row in value[1:]]
        for key, value in content.items()
        if isinstance(value, list) and value and isinstance(value[0], list)
    }
    return {**content, **tables}


def where(rows: Rows, **wanted: Any) -> Rows:
    """Returns the rows that have all the wanted values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def panels(heights: Sequence[float]) -> tuple[Figure, list[Any]]:
    """Returns a figure with panels of these heights, one below the other, and their axes."""
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))
    return figure, list(axes[:, 0])


def curve(axes: Any, rows: Rows, x: str, y: str, label: str, band: tuple[str, str] | None) -> None:
    """Draws rows as a curve, with a band for its interval."""
    colour, marker, dashes = STYLES[label]
    places = [row[x] for row in rows]
    style = {"color": colour, "marker": marker, "markersize": 4, "linestyle": dashes}
    axes.plot(places, [row[y] for row in rows], label=label, **style)
    if band:
        low, high = ([row[end] for row in rows] for end in band)
        axes.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)


def cases_of(results: Results, prefix: str) -> list[dict[str, Any]]:
    """Returns the results whose names begin with ``prefix``, those on shapes first."""
    names = sorted((x for x in results if x.startswith(prefix)), key=lambda x: "shapes" not in x)
    return [results[name] for name in names]


def plot_error(results: Results) -> Figure:
    """Draws errors relative to four samples on real maps, and the share of cells not read."""
    found = cases_of(results, "error_")
    figure, axes = panels([2.6] * (len(found) + 1))
    for panel, content in zip(axes, found, strict=False):
        rows = where(content["sizes"], level=0)
        for method in STYLES:
            band = ("ratio low", "ratio high")
            curve(panel, where(rows, method=method), "width", "ratio", method, band)
        panel.set(yscale="log", yticks=(0.1, 0.2, 0.5, 1, 2, 5), ylabel="error / four samples'")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        title = f"{content['name']}, {content['images']} images, stride {content['strides'][0]}"
        panel.set_title(title, fontsize=10)
    for method in STYLES:
        if rows := where(found[0]["unread"], method=method):
            curve(axes[-1], rows, "width", "unread", method, None)
    axes[-1].set(ylabel="unread cells, %", xlim=(0, 8))
    axes[-1].set_title("cells of a bin that no sample reads", fontsize=10)
    axes[-1].set_xlabel("width of a bin, cells")
    return finish(figure, axes, 3)


def plot_offsets(results: Results) -> Figure:
    """Draws errors by the distance of the two points from the middle of the bin."""
    found = cases_of(results, "error_")
    figure, axes = panels([2.5] * len(found))
    for panel, content in zip(axes, found, strict=True):
        widths = sorted({row["width"] for row in content["offsets"]})
        for colour, marker, width in zip(COLOURS, "os^", widths, strict=False):
            rows = where(content["offsets"], width=width)
            places = [0.25 if row["method"] == BASELINE else float(row["method"]) for row in rows]
            label = f"{width:g} cell" + "s" * (width != 1)
            values = [row["ratio"] for row in rows]
            panel.plot(places, values, color=colour, marker=marker, markersize=4, label=label)
        for place, name in ((0.25, "four samples"), (0.2753, "best"), (0.2887, "Gauss")):
            panel.axvline(place, color="#6b6b6b", lw=0.8, ls=":")
            style = {"fontsize": 8, "rotation": 90, "va": "top", "ha": "right", "color": "#6b6b6b"}
            panel.annotate(name, (place, 1.0), xycoords=("data", "axes fraction"), **style)
        panel.set(ylabel="error / four samples'")
        panel.set_title(content["name"], fontsize=10)
    axes[-1].set_xlabel("distance of the points from the middle, in bins")
    return finish(figure, axes, 3)


def forest(axes: Any, series: dict[str, Rows], ends: tuple[str, str], xlabel: str) -> None:
    """Draws the differences of ways with their intervals.

    Args:
        axes: the axes of a panel.
        series: rows by label, all with the same ways; each label gets a colour.
        ends: the columns of the intervals. Rows with "differences by seed" also get a tick for each
            seed.
        xlabel: label of the x axis.
    """
    ways = [row["way"] for row in next(iter(series.values()))]
    step = 0.8 / len(series)
    for k, (label, rows) in enumerate(series.items()):
        for row in rows:
            line = ways.index(row["way"]) + step * (k - (len(series) - 1) / 2)
            value, low, high = (row[key] for key in ("difference", *ends))
            style = {"fmt": "osD^"[k], "color": COLOURS[k], "capsize": 3, "markersize": 5}
            is_first = row is rows[0]
            reach = [[value - low], [high - value]]
            axes.errorbar([value], [line], xerr=reach, label=label if is_first else None, **style)
            if seeds := row.get("differences by seed"):
                axes.plot(
                    seeds, [line] * len(seeds), "|", color=COLOURS[k], markersize=9, alpha=0.7
                )
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(ways)), ways, fontsize=9)
    axes.set_ylim(len(ways) - 0.5, -0.5)
    axes.set_xlabel(xlabel, fontsize=9)


def split(rows: Rows) -> tuple[Rows, Rows]:
    """Returns the rows of ways that read in the right place, and of MISPLACED, without BASELINE."""
    others = [row for row in rows if row["way"] != BASELINE]
    return (
        [row for row in others if row["way"] not in MISPLACED],
        [row for row in others if row["way"] in MISPLACED],
    )


def plot_whole_models(results: Results) -> Figure:
    """Draws mask and box AP of whole trainings."""
    content = results["whole_models"]
    series = {}
    for metric in ("mask AP", "box AP"):
        rows = where(content["rows"], metric=metric)
        base = next(row["value"] for row in rows if row["way"] == content["baseline"])
        changes = []
        for row in rows:
            if row["way"] != content["baseline"]:
                seeds = [x - base for x in row["by seed"]]
                way = NAMES.get(row["way"], row["way"])
                changes.append({**row, "way": way, "differences by seed": seeds})
        series[metric] = sorted(changes, key=lambda row: row["way"] in MISPLACED)
    figure, axes = panels([3.0])
    forest(axes[0], series, ("low", "high"), "AP minus that of four samples")
    return finish(figure, axes, 2)


def plot_exchange(results: Results) -> Figure:
    """Draws mask and box AP of one model with every way to pool."""
    found = cases_of(results, "exchange_")
    figure, axes = panels([3.4, 2.2] * len(found))
    for number, content in enumerate(found):
        tasks = {"mask AP": "segm", "box AP": "bbox"}
        parts = {what: split(where(content[task], metric="AP")) for what, task in tasks.items()}
        for k, panel in enumerate(axes[2 * number : 2 * number + 2]):
            series = {what: x[k] for what, x in parts.items()}
            forest(panel, series, ("low", "high"), "AP minus that of four samples")
            panel.set_title(f"{content['name']}, {content['images']} images", fontsize=10)
    return finish(figure, axes, 2)


def plot_training(results: Results) -> Figure:
    """Draws the mean IoU of heads that were trained on each way's features."""
    found = cases_of(results, "training_")
    figure, axes = panels([2.9] * len(found) + [2.5])
    last = {}
    for panel, content in zip(axes, found, strict=False):
        rows = where(content["rows"], statistic="mean IoU")
        base = next(row for row in rows if row["way"] == BASELINE)["by seed"]
        for row in rows:
            seeds = [a - b for a, b in zip(row["by seed"], base, strict=True)]
            row["differences by seed"] = seeds
        right, last[content["name"]] = split(rows)
        shown = {content["name"]: [x for x in right if not x["way"].startswith("noise")]}
        forest(panel, shown, ("paired low", "paired high"), "mean IoU (%) minus four samples")
        bins, images = content["bins"], content["images"]
        title = f"{content['name']}, {bins} x {bins} bins, {images} test images"
        panel.set_title(title, fontsize=10)
    shared = {name: rows for name, rows in last.items() if rows}
    forest(axes[-1], shared, ("paired low", "paired high"), "mean IoU (%) minus four samples")
    axes[-1].set_title("ways that read in the wrong place", fontsize=10)
    axes[-1].legend(fontsize=8, loc="center right")
    return finish(figure, axes, 0)


def plot_equivariance(results: Results) -> Figure:
    """Draws how a move of the maps by half a cell changes masks and boxes, minus four samples."""
    found = cases_of(results, "equivariance_")
    figure, axes = panels([3.0, 2.0] * 2)
    for number, (measure, what) in enumerate(
        (("IoU", "mask IoU with itself (%)"), ("box", "movement of box edges (px)"))
    ):
        parts = {
            content["name"]: split(where(content["rows"], moved="map", by=0.5, measure=measure))
            for content in found
        }
        for k, panel in enumerate(axes[2 * number : 2 * number + 2]):
            series = {name: x[k] for name, x in parts.items()}
            ends = "difference low", "difference high"
            forest(panel, series, ends, f"{what} minus four samples'")
    return finish(figure, axes, 2)


def finish(figure: Figure, axes: Any, columns: int) -> Figure:
    """Adds grids and, unless ``columns`` is 0, one legend with that many columns."""
    for panel in axes:
        panel.grid(alpha=0.3)
    if columns:
        lines, labels = axes[0].get_legend_handles_labels()
        place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        figure.legend(lines, labels, fontsize=9, **place)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Results], Figure]]] = {
    "whole_models": ("whole_", plot_whole_models),
    "error": ("error_", plot_error),
    "offsets": ("error_", plot_offsets),
    "exchange": ("exchange_", plot_exchange),
    "training": ("training_", plot_training),
    "equivariance": ("equivariance_", plot_equivariance),
}
"""For each figure: how the names of its results begin, and the function that draws it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--take", type=Path, metavar="FOLDER", help="copy the results in this folder first"
    )
    parser.add_argument("--results", type=Path, default=DOCS / "results")
    parser.add_argument("--output", type=Path, default=DOCS)
    args = parser.parse_args()
    if args.take:
        take_results(args.take, args.results)
    results = read_results(args.results)
    for name, (prefix, plot) in FIGURES.items():
        if any(key.startswith(prefix) for key in results):
            path = args.output / f"{PREFIX}{name}.png"
            plot(results).savefig(path, dpi=110)
            print(path)


if __name__ == "__main__":
    main()
