#!/usr/bin/env python3
"""Draws the figures of docs/independent_masks.md from the results in docs/results/."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from competition_summary import BACKGROUNDS, EVERY, OWN, SOFTMAX, SOFTMAX_TUNED
from matplotlib.figure import Figure

from mask_head_plugin.pages.plots import COLOURS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "docs/results", ROOT / "docs"
WIDTH = 7.4
CONFUSIONS = {0.0: "colours identify the class", 0.5: "colours overlap"}
CERTAIN = 0.0
READINGS = {
    SOFTMAX: (COLOURS[1], "s", "as trained: threshold 0.5"),
    OWN: (COLOURS[0], "o", "own class against background, for both"),
    SOFTMAX_TUNED: (COLOURS[2], "^", "threshold tuned on other objects, for both"),
}
CURVES = (
    ("sigmoid", OWN, COLOURS[0], "-", "sigmoid"),
    ("sigmoid", SOFTMAX, COLOURS[0], ":", "sigmoid, read as a softmax"),
    (EVERY[0], OWN, COLOURS[2], "-.", "sigmoid of every class"),
    ("softmax", SOFTMAX, COLOURS[1], "--", "softmax"),
)
ORDER = ("softmax", EVERY[0], BACKGROUNDS[0], EVERY[1], BACKGROUNDS[1], "class-agnostic")
SCHEDULES = (2600, 8000)
"""Numbers of iterations that whole models were trained for."""
GAPS = (
    "as trained",
    "both: own class\nagainst background",
    "softmax: any class\nagainst background",
    "both: own class\nfrom 0.3 on",
)

Rows = list[dict[str, Any]]


def draw_gap(rows: Rows) -> Figure:
    """Draws softmax minus sigmoid by number of classes, for colours that do not overlap."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (reading, (colour, marker, label)) in enumerate(READINGS.items()):
        found = [r for r in rows if r["confusion"] == CERTAIN and r["reading"] == reading]
        found.sort(key=lambda row: row["classes"])
        x = [row["classes"] * 1.05 ** (number - 1) for row in found]
        y = [row["difference"] for row in found]
        style: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3, "label": label}
        axes.errorbar(x, y, yerr=_reach(found), markersize=5, linewidth=1.2, **style)
    axes.axhline(0, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="classes", ylabel="mask IoU, softmax minus sigmoid")
    axes.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
    return figure


def _reach(rows: Rows) -> list[list[float]]:
    """Returns how far each interval reaches below and above its difference."""
    return [
        [row["difference"] - row["low"] for row in rows],
        [row["high"] - row["difference"] for row in rows],
    ]


def draw_arms(rows: Rows) -> Figure:
    """Draws how each arm differs from the sigmoid, as trained and with a tuned threshold."""
    arms = [arm for arm in ORDER if arm in {row["arm"] for row in rows}]
    figure = Figure(figsize=(WIDTH, 1.5 + 0.5 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(CONFUSIONS), sharex=True, sharey=True)
    for axes, (confusion, title) in zip(panels, CONFUSIONS.items(), strict=True):
        for is_tuned in (False, True):
            found = [
                row
                for row in rows
                if row["confusion"] == confusion and ("tuned" in row["reading"]) == is_tuned
            ]
            y = [arms.index(row["arm"]) + 0.15 * (1 if is_tuned else -1) for row in found]
            style: dict[str, Any] = {
                "fmt": "^" if is_tuned else "s",
                "color": COLOURS[2 if is_tuned else 1],
                "label": "threshold tuned, for both" if is_tuned else "as trained",
            }
            x = [row["difference"] for row in found]
            axes.errorbar(x, y, xerr=_reach(found), capsize=3, markersize=5, **style)
        axes.axvline(0, color="black", linewidth=1)
        axes.set(title=title, xlabel="mask IoU minus the sigmoid's")
        axes.set_yticks(range(len(arms)), arms)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_curves(rows: Rows) -> Figure:
    """Draws learning curves with the long schedule, and their standard deviation over seeds."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for arm, reading, colour, line, label in CURVES:
        found = [row for row in rows if (row["arm"], row["reading"]) == (arm, reading)]
        x = [row["iteration"] for row in found]
        y = [row["iou"] for row in found]
        axes.plot(x, y, color=colour, linestyle=line, marker="o", markersize=3, label=label)
        low, high = ([row["iou"] + sign * row["std"] for row in found] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(xscale="log", xlabel="iterations", ylabel="mask IoU (%)", ylim=(0, 100))
    axes.set_xticks([62, 250, 1000, 4000, 8000], ["62", "250", "1000", "4000", "8000"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    return figure


def draw_whole(trained: Rows, readouts: dict[int, Rows]) -> Figure:
    """Draws each seed's AP during training of whole models, and softmax minus sigmoid at the end.

    Args:
        trained: the "curves" that whole_models.py wrote for the longest schedule.
        readouts: the "gaps" that mask_readouts.py wrote, by number of iterations.
    """
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, colour, line in (("sigmoid", COLOURS[0], "-"), ("softmax", COLOURS[1], "--")):
        found = [row for row in trained if row["way"] == arm]
        for number, row in enumerate(found):
            label = arm if number == 0 else None
            style: dict[str, Any] = {"color": colour, "linestyle": line, "label": label}
            left.plot(row["iterations"], row["segm/AP"], marker="o", markersize=3, **style)
    left.set(xlabel="iterations", ylabel="mask AP", title="8000 iterations, each seed")
    left.legend(loc="lower right", frameon=False)
    for number, (iterations, rows) in enumerate(readouts.items()):
        y = [place + 0.15 * (2 * number - 1) for place in range(len(rows))]
        x = [row["difference"] for row in rows]
        reach = [
            [row["difference"] - row["interval"][0] for row in rows],
            [row["interval"][1] - row["difference"] for row in rows],
        ]
        style = {"color": COLOURS[2 + number], "fmt": "s^"[number], "capsize": 3, "markersize": 5}
        right.errorbar(x, y, xerr=reach, label=f"{iterations} iterations", **style)
    right.axvline(0, color="black", linewidth=1)
    right.set_yticks(range(len(GAPS)), GAPS)
    right.invert_yaxis()
    right.set(xlabel="mask AP, softmax minus sigmoid", title="in boxes found, by reading")
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower right", frameon=False, ncols=2
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder for the PNGs")
    args = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in args.results.glob("mask_*.json")}
    study = found["mask_competition"]
    readouts = {
        iterations: found[f"mask_readouts_{iterations}"]["boxes found"]["gaps"]
        for iterations in SCHEDULES
    }
    pictures = {
        "mask_competition_gap": draw_gap(study["gap"]),
        "mask_competition_arms": draw_arms(study["arms"]),
        "mask_competition_curves": draw_curves(study["curves"]),
        "mask_whole_models": draw_whole(
            found[f"mask_whole_models_{SCHEDULES[-1]}"]["curves"], readouts
        ),
    }
    for name, figure in pictures.items():
        figure.savefig(args.output / f"{name}.png", dpi=120)
        print(args.output / f"{name}.png")


if __name__ == "__main__":
    main()
