"""Summarises the results of mask_competition.py, with intervals over training and images.

Shape alphabet: N seeds, I test objects, S draws.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from made_objects import make_objects

from mask_head_plugin.evaluation.bootstrap import image_weights
from mask_head_plugin.evaluation.difference import difference_of

FloatArray = npt.NDArray[np.float64]
Key = tuple[str, int, float, float, int]
"""Arm, number of classes, confusion, learning rate, iterations."""

NUM_DRAWS = 1000
READ_CLASSES = 10
OWN, SOFTMAX, LARGEST = "own class against background", "softmax at 0.5", "largest"
OWN_TUNED, SOFTMAX_TUNED = "own class, tuned", "softmax, tuned"
COMPETING = ("softmax", "softmax, even start", "softmax, learned background")


class Results:
    """The training results in a folder.

    Args:
        folder: the ``--output`` of mask_competition.py.
    """

    def __init__(self, folder: Path) -> None:
        self.trainings: dict[Key, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.json")):
            found = json.loads(path.read_text())
            names = ("arm", "num_classes", "confusion", "rate", "iterations")
            key = tuple(found[name] for name in names)
            self.trainings.setdefault(key, []).append(found)  # type: ignore[arg-type]

    def ious(self, key: Key, reading: str) -> FloatArray:
        """Returns (N, I) IoUs in percent."""
        return 100 * np.array([x["ious"][reading] for x in self.trainings[key]])

    def has(self, key: Key, reading: str) -> bool:
        found = self.trainings.get(key, [])
        return bool(found) and all(reading in x["ious"] for x in found)


def drawn_means(ious: FloatArray) -> FloatArray:
    """Returns (N, 1 + S) means: first over all objects, then over S resamples of them."""
    num_objects = ious.shape[1]
    weights = image_weights(num_objects, NUM_DRAWS, seed=0)
    return np.concatenate([ious.mean(1, keepdims=True), ious @ weights.T / num_objects], 1)


Row = tuple[dict[str, Any], Key, str, Key, str]
"""Labels; a training and its reading; the baseline and its reading."""


def compared(results: Results, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns the differences of a table, with intervals that are valid together."""
    present = [r for r in rows if results.has(r[1], r[2]) and results.has(r[3], r[4])]
    table = []
    for labels, key, reading, base, base_reading in present:
        ious, base_ious = results.ious(key, reading), results.ious(base, base_reading)
        variant, baseline = drawn_means(ious), drawn_means(base_ious)
        value, std = float(variant[:, 0].mean()), float(variant[:, 0].std(ddof=1))
        base_value = float(baseline[:, 0].mean())
        if key == base:  # the same training read in two ways, so its seeds are paired
            variant, baseline = variant - baseline, np.zeros_like(baseline)
        found = difference_of("IoU", variant, baseline, ious.shape[1], len(present))
        table.append(
            {
                **labels,
                "arm": key[0],
                "reading": reading,
                "seeds": len(ious),
                "iou": round(value, 2),
                "std": round(std, 2),
                "baseline": round(base_value, 2),
                "difference": round(found.difference, 2),
                "low": round(found.low, 2),
                "high": round(found.high, 2),
            }
        )
    return table


def summarise(folder: Path, rate: float, short: int, long: int) -> dict[str, Any]:
    """Returns all tables of the study, without rows for missing trainings."""
    results = Results(folder)
    settings = sorted({(key[1], key[2]) for key in results.trainings})
    return {
        "gap": compared(results, _gap(settings, rate, short)),
        "arms": compared(results, _arms(settings, results, rate, short)),
        "readings": compared(results, _readings(settings, rate, (short, long))),
        "ends": compared(results, _ends(settings, rate, long)),
        "causes": compared(results, _causes(settings, rate, short)),
        "sure": _by_certainty(results, rate, short),
        "curves": _curves(results, rate, long),
        "gradients": _gradients(results, rate, short),
        "seconds": round(sum(x["seconds"] for of in results.trainings.values() for x in of)),
    }


def _gap(settings: list[tuple[int, float]], rate: float, short: int) -> Iterable[Row]:
    for num_classes, confusion in settings:
        setting = (num_classes, confusion, rate, short)
        for reading in (SOFTMAX, OWN, SOFTMAX_TUNED):
            labels = {"classes": num_classes, "confusion": confusion}
            yield labels, ("softmax", *setting), reading, ("sigmoid", *setting), OWN


def _arms(
    settings: list[tuple[int, float]], results: Results, rate: float, short: int
) -> Iterable[Row]:
    for num_classes, confusion in settings:
        setting = (num_classes, confusion, rate, short)
        others = [key[0] for key in results.trainings if key[1:] == setting and key[0] != "sigmoid"]
        if len(others) < 2:
            continue
        for arm in others:
            trained = SOFTMAX if arm in COMPETING else OWN
            tuned = SOFTMAX_TUNED if arm in COMPETING else OWN_TUNED
            for reading, base_reading in ((trained, OWN), (tuned, OWN_TUNED)):
                labels = {"classes": num_classes, "confusion": confusion}
                yield labels, (arm, *setting), reading, ("sigmoid", *setting), base_reading


def _readings(
    settings: list[tuple[int, float]], rate: float, lengths: tuple[int, int]
) -> Iterable[Row]:
    """Yields rows that compare each reading with the one that the model was trained for."""
    trained = {"sigmoid": OWN, "softmax": SOFTMAX}
    for length, (num_classes, confusion) in itertools.product(lengths, settings):
        for arm, usual in trained.items():
            key = (arm, num_classes, confusion, rate, length)
            for reading in (OWN, OWN_TUNED, SOFTMAX, LARGEST, SOFTMAX_TUNED):
                if reading != usual and num_classes == READ_CLASSES:
                    labels = {"confusion": confusion, "iterations": length}
                    yield labels, key, reading, key, usual


def _ends(settings: list[tuple[int, float]], rate: float, long: int) -> Iterable[Row]:
    """Yields rows for the gap that remains after the long schedule."""
    for num_classes, confusion in settings:
        setting = (num_classes, confusion, rate, long)
        for reading, base_reading in ((SOFTMAX, OWN), (SOFTMAX_TUNED, OWN_TUNED)):
            labels = {"classes": num_classes, "confusion": confusion}
            yield labels, ("softmax", *setting), reading, ("sigmoid", *setting), base_reading


def _causes(settings: list[tuple[int, float]], rate: float, short: int) -> Iterable[Row]:
    """Yields rows that compare the softmax with sigmoids that classify but do not compete."""
    for num_classes, confusion in settings:
        setting = (num_classes, confusion, rate, short)
        base = ("sigmoid of every class", *setting)
        for reading, base_reading in ((OWN, OWN), (SOFTMAX_TUNED, OWN_TUNED)):
            labels = {"classes": num_classes, "confusion": confusion}
            yield labels, ("softmax", *setting), reading, base, base_reading


def _by_certainty(results: Results, rate: float, short: int) -> list[dict[str, Any]]:
    """Returns the mean IoU of objects that the best classifier gets right, and of the others."""
    table = []
    for arm, num_classes, confusion, of_rate, iterations in results.trainings:
        key = (arm, num_classes, confusion, of_rate, iterations)
        if not confusion or of_rate != rate or iterations != short:
            continue
        test = make_objects(3, results.ious(key, OWN).shape[1], num_classes, confusion)
        is_sure = test.nearest == test.classes
        for reading in (OWN, SOFTMAX, SOFTMAX_TUNED):
            ious = results.ious(key, reading)
            row = {"arm": arm, "classes": num_classes, "reading": reading}
            row |= {"sure": round(float(ious[:, is_sure].mean()), 2)}
            table.append({**row, "unsure": round(float(ious[:, ~is_sure].mean()), 2)})
    return table


def _curves(results: Results, rate: float, long: int) -> list[dict[str, Any]]:
    table = []
    for key, found in results.trainings.items():
        if key[3:] != (rate, long):
            continue
        for number, point in enumerate(found[0]["curve"]):
            for reading in (OWN, SOFTMAX):
                values = [100 * x["curve"][number][reading] for x in found]
                labels = {"arm": key[0], "confusion": key[2], "reading": reading}
                labels["iteration"] = point["iteration"]
                table.append({**labels, **_mean_and_std(values)})
    return table


def _gradients(results: Results, rate: float, short: int) -> list[dict[str, Any]]:
    table = []
    for key, found in results.trainings.items():
        if key[1:] != (10, 0.0, rate, short):
            continue
        for number, point in enumerate(found[0]["curve"]):
            row: dict[str, Any] = {"arm": key[0], "iteration": point["iteration"]}
            for part in point["gradients"]:
                values = [x["curve"][number]["gradients"][part] for x in found]
                row[part] = round(statistics.mean(values), 4)
            table.append(row)
    return table


def _mean_and_std(values: list[float]) -> Mapping[str, float]:
    std = statistics.stdev(values) if len(values) > 1 else float("nan")
    return {"iou": round(statistics.mean(values), 2), "std": round(std, 2)}
