#!/usr/bin/env python3
"""Draws the figures of docs/roi_align_sampling.md from the results in docs/results/.

With --take FOLDER it first copies results of the other sampling_*.py from there, packed: a table is
a row of names and rows of values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mask_head_plugin.pages.plots import COLOURS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PREFIX = "sampling_"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")

Results = dict[str, dict[str, Any]]
Rows = list[dict[str, Any]]


def read_results(folder: Path) -> Results:
    """Returns the results by name, such as ``error_shapes``."""
    return {
        path.stem.removeprefix(PREFIX): unpacked(json.loads(path.read_text()))
        for path in sorted(folder.glob(f"{PREFIX}*.json"))
    }


def take_results(source: Path, folder: Path) -> None:
    """Copies the results of a folder, packed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.json")):
        if path.name.split("_")[0] in ("error", "exchange", "training", "equivariance"):
            content = json.loads(path.read_text())
            (folder / f"{PREFIX}{path.name}").write_text(packed(content) + "\n")


def packed(content: dict[str, Any]) -> str:
    """Returns JSON with tables as names of columns and rows of values, a row on each line."""
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
    """Whether a value is a list of dictionaries with the same keys."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return False
    return all(list(row) == list(value[0]) for row in value)


def unpacked(content: dict[str, Any]) -> dict[str, Any]:
    """Returns what ``packed`` was given."""
    tables = {
        key: [dict(zip(value[0], row, strict=True)) for row in value[1:]]
        for key, value in content.items()
        if isinstance(value, list) and value and isinstance(value[0], list)
    }
    return {**content, **tables}


def where(rows: Rows, **wanted: Any) -> Rows:
    """Returns the rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def curve(axes: Any, rows: Rows, x: str, label: str, index: int, y: str = "error") -> None:
    """Draws rows as a curve with the band of its interval."""
    colours = (*COLOURS, "#1a1a1a")
    style = {"color": colours[index % len(colours)], "marker": MARKERS[index], "markersize": 4}
    style["linestyle"] = DASHES[index % len(DASHES)]
    places = [row[x] for row in rows]
    axes.plot(places, [row[y] for row in rows], label=label, **style)
    if rows and "low" in rows[0]:
        band = [row["low"] for row in rows], [row["high"] for row in rows]
        axes.fill_between(places, *band, color=style["color"], alpha=0.2, lw=0)


def panels(count: int, width: float = 3.7, height: float = 3.4) -> tuple[Figure, Any]:
    """Returns a figure with panels one below the other in pairs, and their axes."""
    columns = min(count, 2)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False).flatten()


def methods_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def plot_error(results: Results) -> Figure:
    """Error against the width of a bin on real maps, and the share of its cells left unread."""
    found = {name: x for name, x in results.items() if name.startswith("error_")}
    figure, axes = panels(len(found) + 1)
    first = next(iter(found.values()))
    for panel, content in zip(axes, found.values(), strict=False):
        rows = where(content["sizes"], level=0)
        for index, method in enumerate(methods_of(rows)):
            curve(panel, where(rows, method=method), "width", method, index)
        panel.set(yscale="log", xlabel="width of a bin, cells", ylabel="error, % of the signal")
        panel.set_title(f"{content['name']}, stride {content['strides'][0]}", fontsize=10)
    last = axes[len(found)]
    for index, method in enumerate(methods_of(first["sizes"])):
        rows = where(first["unread"], method=method)
        if rows:
            curve(last, rows, "width", method, index, "unread")
    last.set(xlabel="width of a bin, cells", ylabel="cells that no sample reads, %", xlim=(0, 8))
    last.set_title("cells of a bin left unread", fontsize=10)
    return finish(figure, axes)


def plot_offsets(results: Results) -> Figure:
    """Error against the distance of the two points from the middle of the bin."""
    found = {name: x for name, x in results.items() if name.startswith("error_")}
    figure, axes = panels(len(found))
    for panel, content in zip(axes, found.values(), strict=True):
        for index, width in enumerate(sorted({row["width"] for row in content["offsets"]})):
            rows = where(content["offsets"], width=width)
            least = min(row["error"] for row in rows)
            relative = [
                {
                    "offset": float(row["method"]),
                    **{key: row[key] / least for key in ("error", "low", "high")},
                }
                for row in rows
            ]
            curve(
                panel,
                [{k: v for k, v in x.items() if k in ("offset", "error")} for x in relative],
                "offset",
                f"bins of {width:g} cells",
                index,
            )
        for place, name in ((0.25, "paper"), (0.2753, "best"), (0.2887, "Gauss")):
            panel.axvline(place, color="#6b6b6b", lw=0.8, ls=":")
            panel.annotate(
                name,
                (place, 1.0),
                xycoords=("data", "axes fraction"),
                fontsize=7,
                rotation=90,
                va="top",
                ha="right",
                color="#6b6b6b",
            )
        panel.set(xlabel="distance of the points, bins", ylabel="error / least error")
        panel.set_title(content["name"], fontsize=10)
    return finish(figure, axes)


def plot_differences(axes: Any, rows: Rows, xlabel: str, title: str, single: bool = False) -> None:
    """Draws the differences of ways with their intervals."""
    baseline = rows[0].get("by seed", [])
    for line, row in enumerate(rows):
        low, high = (row.get(f"paired {end}", row[end]) for end in ("low", "high"))
        reach = [[row["difference"] - low], [high - row["difference"]]]
        axes.errorbar([row["difference"]], [line], xerr=reach, fmt="o", color=COLOURS[0], capsize=3)
        if single:
            points = [a - b for a, b in zip(row["by seed"], baseline, strict=True)]
            axes.plot(points, [line + 0.25] * len(points), "|", color=COLOURS[1])
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(rows)), [row["way"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_title(title, fontsize=10)


def plot_exchange(results: Results) -> Figure:
    """Mask and box AP of one model with every way to pool."""
    found = [x for name, x in results.items() if name.startswith("exchange_")]
    figure, axes = panels(2 * len(found), 3.7, 3.0)
    for number, content in enumerate(found):
        for k, (task, what) in enumerate((("segm", "mask"), ("bbox", "box"))):
            title = f"{content['name']}, {content['images']} images"
            rows = where(content[task], metric="AP")
            plot_differences(axes[2 * number + k], rows, f"{what} AP minus four samples", title)
    return figure


def plot_training(results: Results) -> Figure:
    """Mean IoU of heads that were trained on each way's features."""
    found = [x for name, x in results.items() if name.startswith("training_")]
    figure, axes = panels(len(found), 3.7, 3.0)
    for panel, content in zip(axes, found, strict=False):
        rows = where(content["rows"], statistic="mean IoU")
        title = f"{content['name']}, {content['bins']} x {content['bins']} bins"
        plot_differences(panel, rows, "mean IoU (%) minus four samples", title, single=True)
    for panel in axes[len(found) :]:
        panel.set_axis_off()
    return figure


def plot_equivariance(results: Results) -> Figure:
    """Mask IoU and box movement when maps or images move."""
    found = [x for name, x in results.items() if name.startswith("equivariance_")]
    figure, axes = panels(2 * len(found))
    settings = (
        ("map", "IoU", "the map moves by, cells"),
        ("image", "box", "the image moves by, px"),
    )
    for number, content in enumerate(found):
        for k, (moved, measure, xlabel) in enumerate(settings):
            panel = axes[2 * number + k]
            rows = where(content["rows"], moved=moved, measure=measure)
            shown = ("four samples", "adaptive", "PrROIPool", "best points", "no half-pixel shift")
            for index, way in enumerate((*shown, "RoIWarp", "RoIPool")):
                curve(panel, where(rows, way=way), "by", way, index, "value")
            ylabel = "mask IoU with itself, %" if measure == "IoU" else "box edges move, px"
            panel.set(xlabel=xlabel, ylabel=ylabel)
            panel.set_title(content["name"], fontsize=10)
    return finish(figure, axes)


def finish(figure: Figure, axes: Any) -> Figure:
    """Adds one legend and a grid."""
    for panel in axes:
        if panel.lines:
            panel.grid(alpha=0.3)
        else:
            panel.set_axis_off()
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Results], Figure]]] = {
    "error": ("error_", plot_error),
    "offsets": ("error_", plot_offsets),
    "exchange": ("exchange_", plot_exchange),
    "training": ("training_", plot_training),
    "equivariance": ("equivariance_", plot_equivariance),
}
"""By name: what the names of the results begin with, and what draws them."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="results to copy first")
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
