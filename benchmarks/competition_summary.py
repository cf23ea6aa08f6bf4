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
from made_objects import TEST, make_objects

from mask_head_plugin.evaluation.bootstrap import image_weights
from mask_head_plugin.evaluation.difference import difference_of

FloatArray = npt.NDArray[np.float64]
Key = tuple[str, int, float, float, int]
"""Arm, number of classes, confusion, learning rate, iterations."""
Settings = list[tuple[int, float]]
"""Pairs of (number of classes, confusion)."""

NUM_DRAWS = 1000
READ_CLASSES = 10
OWN, SOFTMAX, LARGEST = "own class against background", "softmax at 0.5", "largest"
ANY = "any class against background"
OWN_TUNED, SOFTMAX_TUNED = "own class, tuned", "softmax, tuned"
BACKGROUNDS = ("softmax, even start", "softmax, learned background")
COMPETING = ("softmax", *BACKGROUNDS)
EVERY = ("sigmoid of every class", "sigmoid of every class, even start")
EMPTY = 0.05
"""IoU below which a mask counts as having missed its object."""


class Results:
    """The training results in a folder.

    Args:
        folder: the ``--output`` of mask_competition.py.
    """

    def __init__(self, folder: Path) -> None:
        self.trainings: dict[Key, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.json")):
            found = json.loads(path.read_text())
            setting = (found["num_classes"], found["confusion"], found["rate"])
            key = (found["arm"], *setting, found["iterations"])
            self.trainings.setdefault(key, []).append(found)

    def ious(self, key: Key, reading: str) -> FloatArray:
        """Returns (N, I) IoUs in percent."""
        return 100 * np.array([x["ious"][reading] for x in self.trainings[key]])

    def num_objects(self, key: Key) -> int:
        """Returns I, the number of test objects."""
        return self.ious(key, OWN).shape[1]

    def threshold(self, key: Key, reading: str) -> dict[str, float]:
        """Returns the mean threshold of a tuned reading, or {} for a reading that is not tuned."""
        found = [x.get("thresholds", {}).get(reading) for x in self.trainings[key]]
        return {} if None in found else {"threshold": round(statistics.mean(found), 3)}

    def has(self, key: Key, reading: str) -> bool:
        found = self.trainings.get(key, [])
        return bool(found) and all(reading in x["ious"] for x in found)


def drawn_means(ious: FloatArray) -> FloatArray:
    """Returns (N, 1 + S) means: first over all objects, then over S resamples of them."""
    num_objects = ious.shape[1]
    weights = image_weights(num_objects, NUM_DRAWS, seed=0)
    return np.concatenate([ious.mean(1, keepdims=True), ious @ weights.T / num_objects], 1)


Row = tuple[dict[str, Any], Key, str, Key, str]
"""Labels of a row; key of the trainings and their reading; key of the baseline and its reading."""


def compared(results: Results, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns the differences of a table, with intervals that hold jointly.

    An IoU cannot be below 0, so a difference cannot be below minus the baseline's IoU. Intervals
    are cut off there.
    """
    present = [r for r in rows if results.has(r[1], r[2]) and results.has(r[3], r[4])]
    table = []
    for labels, key, reading, base, base_reading in present:
        variant = drawn_means(results.ious(key, reading))
        baseline = drawn_means(results.ious(base, base_reading))
        values, base_value = variant[:, 0], float(baseline[:, 0].mean())
        if key == base:  # the same training read in two ways, so its seeds are paired
            variant, baseline = variant - baseline, np.zeros_like(baseline)
        found = difference_of("IoU", variant, baseline, results.num_objects(key), len(present))
        table.append(
            {
                **labels,
                "arm": key[0],
                "reading": reading,
                "against": f"{base[0]}: {base_reading}",
                "seeds": [round(float(x), 2) for x in values],
                "iou": round(float(values.mean()), 2),
                "baseline": round(base_value, 2),
                "difference": round(found.difference, 2),
                "low": round(max(found.low, -base_value), 2),
                "high": round(found.high, 2),
                **results.threshold(key, reading),
            }
        )
    return table


def summarise(folder: Path, rate: float, short: int, long: int) -> dict[str, Any]:
    """Returns all tables of the study, without rows for missing trainings."""
    results = Results(folder)
    settings = sorted({(key[1], key[2]) for key in results.trainings})
    rates = sorted({key[3] for key in results.trainings})
    return {
        "gap": compared(results, _gap(settings, rate, short)),
        "arms": [
            row
            for setting in settings
            for row in compared(results, _arms(setting, results, rate, short))
        ],
        "readings": compared(results, _readings(settings, rate, (short, long))),
        "ends": compared(results, _ends(settings, rate, long)),
        "causes": compared(results, _causes(settings, rate, (short, long))),
        "backgrounds": compared(results, _backgrounds(settings, rate, short)),
        "rates": compared(results, _rates(settings, rates, short)),
        "certainty": _by_certainty(results, rate, short),
        "curves": _curves(results, rate, long),
        "gradients": _gradients(results, rate, short),
        "seconds": round(sum(x["seconds"] for of in results.trainings.values() for x in of)),
    }


def _gap(settings: Settings, rate: float, short: int) -> Iterable[Row]:
    """Yields rows that compare softmax and sigmoid for each number of classes."""
    for num_classes, confusion in settings:
        setting = (num_classes, confusion, rate, short)
        pairs = ((SOFTMAX, OWN), (OWN, OWN), (SOFTMAX_TUNED, OWN_TUNED))
        for reading, base_reading in pairs if confusion == 0 else ():
            labels = {"classes": num_classes, "confusion": confusion}
            yield labels, ("softmax", *setting), reading, ("sigmoid", *setting), base_reading


def _arms(setting: tuple[int, float], results: Results, rate: float, short: int) -> Iterable[Row]:
    """Yields rows that compare each arm with the sigmoid, as trained and with tuned thresholds."""
    others = [
        key[0]
        for key in results.trainings
        if key[1:] == (*setting, rate, short) and key[0] != "sigmoid"
    ]
    for arm in others if len(others) > 1 else ():
        trained = SOFTMAX if arm in COMPETING else OWN
        tuned = SOFTMAX_TUNED if arm in COMPETING else OWN_TUNED
        labels = {"classes": setting[0], "confusion": setting[1]}
        key, base = (arm, *setting, rate, short), ("sigmoid", *setting, rate, short)
        yield labels, key, trained, base, OWN
        yield labels, key, tuned, base, OWN_TUNED


def _readings(settings: Settings, rate: float, lengths: tuple[int, int]) -> Iterable[Row]:
    """Yields rows that compare each reading with the one that the model was trained for."""
    others = {"sigmoid": (SOFTMAX, OWN_TUNED), "softmax": (OWN, ANY, LARGEST, SOFTMAX_TUNED)}
    trained = {"sigmoid": OWN, "softmax": SOFTMAX}
    for length, (num_classes, confusion) in itertools.product(lengths, settings):
        for arm, readings in others.items() if num_classes == READ_CLASSES else ():
            key = (arm, num_classes, confusion, rate, length)
            for reading in readings:
                labels = {"confusion": confusion, "iterations": length}
                yield labels, key, reading, key, trained[arm]


def _ends(settings: Settings, rate: float, long: int) -> Iterable[Row]:
    """Yields rows for the gaps that remain after the long schedule."""
    for num_classes, confusion in settings:
        setting = (num_classes, confusion, rate, long)
        labels = {"classes": num_classes, "confusion": confusion}
        sigmoid, softmax = ("sigmoid", *setting), ("softmax", *setting)
        yield labels, softmax, SOFTMAX, sigmoid, OWN
        yield labels, softmax, SOFTMAX_TUNED, sigmoid, OWN_TUNED
        yield labels, (EVERY[0], *setting), OWN, sigmoid, OWN
        yield labels, (EVERY[0], *setting), OWN_TUNED, sigmoid, OWN_TUNED
        yield labels, sigmoid, SOFTMAX, softmax, SOFTMAX
        yield labels, sigmoid, SOFTMAX_TUNED, softmax, SOFTMAX_TUNED


def _causes(settings: Settings, rate: float, lengths: tuple[int, int]) -> Iterable[Row]:
    """Yields rows that compare the softmax with sigmoids that classify but do not compete."""
    for length, (num_classes, confusion), arm in itertools.product(lengths, settings, EVERY):
        setting = (num_classes, confusion, rate, length)
        for reading, base_reading in ((SOFTMAX, OWN), (OWN, OWN), (SOFTMAX_TUNED, OWN_TUNED)):
            labels = {"classes": num_classes, "confusion": confusion, "iterations": length}
            yield labels, ("softmax", *setting), reading, (arm, *setting), base_reading


def _backgrounds(settings: Settings, rate: float, short: int) -> Iterable[Row]:
    """Yields rows that compare the softmax whose background has logit 0 with other backgrounds."""
    for (num_classes, confusion), arm in itertools.product(settings, BACKGROUNDS):
        setting = (num_classes, confusion, rate, short)
        for reading in (SOFTMAX, SOFTMAX_TUNED):
            labels = {"classes": num_classes, "confusion": confusion}
            yield labels, (arm, *setting), reading, ("softmax", *setting), reading


def _rates(settings: Settings, rates: list[float], short: int) -> Iterable[Row]:
    """Yields rows that compare two arms with the sigmoid for each learning rate."""
    for (num_classes, confusion), rate in itertools.product(settings, rates):
        setting = (num_classes, confusion, rate, short)
        base = ("sigmoid", *setting)
        wanted = num_classes == READ_CLASSES and confusion == 0 and len(rates) > 1
        for arm in ("softmax", EVERY[0]) if wanted else ():
            trained = SOFTMAX if arm in COMPETING else OWN
            tuned = SOFTMAX_TUNED if arm in COMPETING else OWN_TUNED
            yield {"rate": rate}, (arm, *setting), trained, base, OWN
            yield {"rate": rate}, (arm, *setting), tuned, base, OWN_TUNED


def _by_certainty(results: Results, rate: float, short: int) -> list[dict[str, Any]]:
    """Returns the results for objects whose colour makes their class likely, and for the others.

    "sure" are the objects whose true class has a probability above one half, given the colour.
    ``missed`` is the percentage of objects with an IoU below EMPTY.
    """
    table = []
    for key in results.trainings:
        arm, num_classes, confusion, of_rate, iterations = key
        if not confusion or of_rate != rate or iterations != short:
            continue
        test = make_objects(TEST, results.num_objects(key), num_classes, confusion)
        reading = SOFTMAX if arm in COMPETING else OWN
        ious = results.ious(key, reading)
        for name, chosen in (("sure", test.posterior > 0.5), ("unsure", test.posterior <= 0.5)):
            row = {"arm": arm, "classes": num_classes, "reading": reading, "objects": name}
            row["share"] = round(float(100 * chosen.mean()), 1)
            missed = 100.0 * (ious[:, chosen] < 100 * EMPTY)
            table.append({**row, **mean_of(ious[:, chosen]), **mean_of(missed, "missed")})
    return table


def mean_of(values: FloatArray, name: str = "iou") -> dict[str, float]:
    """Returns the mean of (N, I) values and its 95% interval over training and objects."""
    drawn = drawn_means(values)
    found = difference_of(name, drawn, np.zeros_like(drawn), values.shape[1])
    return {
        name: round(found.difference, 2),
        f"{name} low": round(max(found.low, 0.0), 2),
        f"{name} high": round(found.high, 2),
    }


def _curves(results: Results, rate: float, long: int) -> list[dict[str, Any]]:
    table = []
    for key, found in results.trainings.items():
        if key[3:] != (rate, long) or key[1] != READ_CLASSES:
            continue
        for number, point in enumerate(found[0]["curve"]):
            for reading in (OWN, SOFTMAX):
                values = [100 * x["curve"][number][reading] for x in found]
                labels = {"arm": key[0], "confusion": key[2], "reading": reading}
                labels["iteration"] = point["iteration"]
                table.append({**labels, **_mean_and_std(values)})
    return table


def _gradients(results: Results, rate: float, short: int) -> list[dict[str, Any]]:
    """Returns the mean of each gradient over seeds, and its standard deviation."""
    table = []
    for key, found in results.trainings.items():
        if key[1:] != (READ_CLASSES, 0.0, rate, short):
            continue
        for number, point in enumerate(found[0]["curve"]):
            row: dict[str, Any] = {"arm": key[0], "iteration": point["iteration"]}
            for part in point["gradients"]:
                values = [x["curve"][number]["gradients"][part] for x in found]
                row[part] = round(statistics.mean(values), 4)
                row[f"{part}, std"] = round(float(np.std(values, ddof=1)), 4)
            table.append(row)
    return table


def _mean_and_std(values: list[float]) -> Mapping[str, float]:
    std = statistics.stdev(values) if len(values) > 1 else float("nan")
    return {"iou": round(statistics.mean(values), 2), "std": round(std, 2)}
