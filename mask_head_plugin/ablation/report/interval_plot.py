"""Draws the picture of report.md: differences from the baseline with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...pages.plots import COLOURS, save_plot
from .study import Study, metric_words

ROW_INCHES = 0.42


def plot_intervals(study: Study, path: Path) -> bool:
    """Draws each variant's difference in the main metric, its interval and its individual seeds.

    Args:
        study: the ablation.
        path: path of the PNG; SVG and PDF are written next to it.

    Returns:
        Whether there was anything to draw.
    """
    compared = [(v, c) for v in study.variants if (c := study.comparison(v)) is not None]
    if not compared:
        return False
    figure = Figure(figsize=(8, 1.2 + ROW_INCHES * len(compared)), layout="constrained")
    axes = figure.subplots()
    baseline, paper = study.baseline, study.baseline.paper.get(study.metric)
    for row, (variant, comparison) in enumerate(compared):
        interval = [
            [comparison.difference - comparison.low],
            [comparison.high - comparison.difference],
        ]
        label = "95% interval, seeds and images" if row == 0 else None
        style: dict[str, Any] = {"fmt": "o", "color": COLOURS[0], "capsize": 4, "label": label}
        axes.errorbar([comparison.difference], [row], xerr=interval, **style)
        # Pair trials by seed, because the same seed gives all variants the same batches.
        seeds = {t.seed: t.result(study.metric) for t in baseline.finished}
        single = [
            t.result(study.metric) - seeds[t.seed] for t in variant.finished if t.seed in seeds
        ]
        label = "individual seeds" if row == 0 else None
        axes.plot(single, [row + 0.22] * len(single), "|", color=COLOURS[0], label=label)
        if paper is not None and study.metric in variant.paper:
            label = None if any(study.metric in v.paper for v, _ in compared[:row]) else "paper"
            published = variant.paper[study.metric] - paper
            axes.plot([published], [row], "D", color=COLOURS[1], mfc="none", label=label)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(compared)), [variant.name for variant, _ in compared])
    axes.invert_yaxis()
    axes.margins(y=0.3 / len(compared))
    axes.set_xlabel(f"{metric_words(study.metric)} minus that of {baseline.name}")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    save_plot(figure, path)
    return True
