#!/usr/bin/env python3
"""Draws the figures of docs/independent_masks.md from the results in docs/results/."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from competition_summary import OWN, SOFTMAX, SOFTMAX_TUNED
from matplotlib.figure import Figure

from mask_head_plugin.pages.plots import COLOURS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "docs/results", ROOT / "docs"
WIDTH = 7.4
CONFUSIONS = {0.0: "colours tell the class", 0.5: "colours confuse the classes"}
CERTAIN = 0.0
READINGS = {
    SOFTMAX: (COLOURS[1], "s", "as trained: a pixel is the object's from 0.5 on"),
    OWN: (COLOURS[0], "o", "own class against background"),
    SOFTMAX_TUNED: (COLOURS[2], "^", "softmax, threshold tuned on other objects"),
}
ARM_STYLES = {
    "sigmoid": (COLOURS[0], "-"),
    "softmax": (COLOURS[1], "--"),
}

Rows = list[dict[str, Any]]


def draw_gap(rows: Rows) -> Figure:
    """The difference to the sigmoid against the number of classes that colours tell apart."""
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
    """Returns how far intervals reach below and above."""
    return [
        [row["difference"] - row["low"] for row in rows],
        [row["high"] - row["difference"] for row in rows],
    ]


def draw_arms(rows: Rows) -> Figure:
    """The difference to the sigmoid of each way to train, as trained and with a tuned threshold."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure = Figure(figsize=(WIDTH, 1.5 + 0.5 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(CONFUSIONS), sharey=True)
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
    """Learning curves to the end, with the standard deviation over seeds."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for arm, reading in (("sigmoid", OWN), ("softmax", OWN), ("softmax", SOFTMAX)):
        found = [row for row in rows if (row["arm"], row["reading"]) == (arm, reading)]
        x = [row["iteration"] for row in found]
        y = [row["iou"] for row in found]
        colour, line = ARM_STYLES[arm]
        line = ":" if arm == "softmax" and reading == OWN else line
        label = arm if arm == "sigmoid" else f"softmax, read as {_short(reading)}"
        axes.plot(x, y, color=colour, linestyle=line, marker="o", markersize=3, label=label)
        low, high = ([row["iou"] + sign * row["std"] for row in found] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(xscale="log", xlabel="iterations", ylabel="mask IoU (%)", ylim=(0, 100))
    axes.set_xticks([62, 250, 1000, 4000, 8000], ["62", "250", "1000", "4000", "8000"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    return figure


def _short(reading: str) -> str:
    return "trained" if reading == SOFTMAX else "own class against background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder for the PNGs")
    args = parser.parse_args()
    found = json.loads((args.results / "mask_competition.json").read_text())
    pictures = {
        "mask_competition_gap": draw_gap(found["gap"]),
        "mask_competition_arms": draw_arms(found["arms"]),
        "mask_competition_curves": draw_curves(found["curves"]),
    }
    for name, figure in pictures.items():
        figure.savefig(args.output / f"{name}.png", dpi=120)
        print(args.output / f"{name}.png")


if __name__ == "__main__":
    main()
