"""What an ablation has left in its folder, as the report reads it; parts of it may be missing."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import statistics
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..evaluation.bootstrap import METRICS, PairedDifference, compare_all
from ..evaluation.matching import Matches

logger = logging.getLogger(__name__)

ABLATION_FILE = "ablation.json"
TRIAL_FILE = "trial.json"


@dataclass(frozen=True, eq=False)
class Trial:
    """One training: a variant with a seed.

    Attributes:
        variant: its name.
        seed: its seed.
        folder: where its files are, or would be.
        dataset: the test set.
        record: content of trial.json, ``{}`` if there is none.
    """

    variant: str
    seed: int
    folder: Path
    dataset: str
    record: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        return self.record.get("status") == "finished"

    @property
    def state(self) -> str:
        """What a reader has to know of a trial that is not finished."""
        if self.is_finished:
            return "finished"
        if self.record.get("status") == "failed":
            return "failed"
        rows = self.log()
        last = max((int(row["iteration"]) + 1 for row in rows), default=0)
        return f"not ended, {last} iterations logged" if rows else "not run"

    @property
    def error(self) -> str:
        return str(self.record.get("error") or "")

    @property
    def inference(self) -> Path:
        """The folder of the evaluation; of several test sets each has one of its own."""
        own = self.folder / "inference" / self.dataset
        return own if own.is_dir() else self.folder / "inference"

    def result(self, key: str) -> float:
        """Returns a metric such as ``segm/AP`` in percent, nan if there is none."""
        task, _, metric = key.partition("/")
        return _number(((self.record.get("results") or {}).get(task) or {}).get(metric))

    def cost(self, key: str) -> float:
        """Returns a number of trial.json, nan if there is none."""
        return _number(self.record.get(key))

    def log(self) -> list[dict[str, Any]]:
        """Returns what detectron2 logged at iterations, in their order."""
        rows: dict[int, dict[str, Any]] = {}
        for row in read_json_lines(self.folder / "metrics.json"):
            if isinstance(
                row.get("iteration"), int
            ):  # of iterations that a resumed training did twice the last
                rows[row["iteration"]] = rows.get(row["iteration"], {}) | row
        return [rows[iteration] for iteration in sorted(rows)]

    def matches(self, task: str) -> Matches | None:
        """Returns who found what, None (and a warning) where the file is missing or broken."""
        path = self.inference / f"matches_{task}.npz"
        try:
            return Matches.load(path)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("%s: no interval for this trial (%s)", path, error)
            return None


@dataclass(frozen=True, eq=False)
class Variant:
    """A row of the report.

    Attributes:
        name: of the variant.
        differs: config values by flattened key where it differs from the baseline.
        trials: one for each seed, in the order of the seeds, run or not.
        paper: published figures by metric, in percent.
    """

    name: str
    differs: dict[str, Any]
    trials: tuple[Trial, ...]
    paper: dict[str, float]

    @property
    def finished(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.is_finished)

    def values(self, key: str) -> list[float]:
        """Returns a metric of the finished trials that have it."""
        return [x for x in (t.result(key) for t in self.finished) if math.isfinite(x)]

    def mean(self, key: str) -> float:
        return mean(self.values(key))

    def std(self, key: str) -> float:
        """Returns the standard deviation over seeds, nan where there are fewer than two."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def costs(self, key: str) -> list[float]:
        return [x for x in (t.cost(key) for t in self.finished) if math.isfinite(x)]


@dataclass(frozen=True)
class Study:
    """An ablation's folder.

    Attributes:
        description: content of ablation.json.
        variants: in the order of the ablation's file.
        num_draws: of the bootstrap.
    """

    description: dict[str, Any]
    variants: tuple[Variant, ...]
    num_draws: int
    _matches: dict[str, dict[str, list[Matches]]] = field(default_factory=dict, repr=False)

    @property
    def metric(self) -> str:
        """The main result, such as ``segm/AP``."""
        return str(self.description["metric"])

    @property
    def task(self) -> str:
        return self.metric.partition("/")[0]

    @property
    def dataset(self) -> str:
        return str(self.description["dataset"])

    @property
    def seeds(self) -> list[int]:
        return list(self.description["seeds"])

    @cached_property
    def baseline(self) -> Variant:
        return next(v for v in self.variants if v.name == self.description["baseline"])

    @property
    def trials(self) -> list[Trial]:
        return [trial for variant in self.variants for trial in variant.trials]

    @property
    def finished(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.is_finished]

    def matches(self, task: str) -> dict[str, list[Matches]]:
        """Returns, of the variants that have any, the matches of their finished trials."""
        if task not in self._matches:
            found = {
                variant.name: [m for t in variant.finished if (m := t.matches(task)) is not None]
                for variant in self.variants
            }
            self._matches[task] = {name: matches for name, matches in found.items() if matches}
        return self._matches[task]

    @cached_property
    def comparisons(self) -> dict[str, dict[str, PairedDifference]]:
        """Comparisons with the baseline, by variant and by metric such as ``segm/AP50``.

        Of the main task's metrics and of those that the paper gives; the baseline has none.
        """
        found: dict[str, dict[str, PairedDifference]] = {v.name: {} for v in self.variants}
        wanted = [f"{self.task}/{name}" for name in METRICS]
        wanted += [key for variant in self.variants for key in variant.paper]
        for task in dict.fromkeys(key.partition("/")[0] for key in wanted):
            names = [name for name in METRICS if f"{task}/{name}" in wanted]
            for variant, comparisons in self._compare(task, names).items():
                found[variant] |= {f"{task}/{name}": c for name, c in comparisons.items()}
        return found

    def comparison(self, variant: Variant, key: str = "") -> PairedDifference | None:
        """Returns how a variant differs from the baseline, by default in the main metric."""
        return self.comparisons[variant.name].get(key or self.metric)

    def _compare(self, task: str, names: list[str]) -> dict[str, dict[str, PairedDifference]]:
        matches = self.matches(task)
        if not names or self.baseline.name not in matches or len(matches) < 2:
            return {}
        logger.info("drawing images anew %d times to compare %s", self.num_draws, task)
        try:
            compared = compare_all(matches, self.baseline.name, tuple(names), self.num_draws)
        except ValueError as error:  # not of the same images
            raise ConfigError(f"{task} of the variants cannot be compared: {error}") from error
        return {name: c for name, c in compared.items() if name != self.baseline.name}


def read_study(directory: Path, num_draws: int) -> Study:
    """Reads an ablation's folder.

    Args:
        directory: has ablation.json and the folders of the trials.
        num_draws: of the bootstrap.

    Raises:
        ConfigError: if there is no ablation.json, it lacks something, nothing is finished, or there
            are less than two draws.
    """
    if num_draws < 2:
        raise ConfigError(f"{num_draws} draws make no interval; take 2 at least, better 1000")
    path = directory / ABLATION_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        study = Study(description, tuple(_variants(directory, description)), num_draws)
        baseline = study.baseline.name
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; is {directory} an ablation?") from error
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ConfigError(f"{path} does not describe an ablation: {error!r}") from error
    if not study.finished:
        states = "; ".join(f"{t.variant}, seed {t.seed}: {t.state}" for t in study.trials[:3])
        raise ConfigError(f"{directory} has no finished trial to report ({states})")
    if not study.baseline.finished:
        logger.warning("the baseline %r has no finished trial: nothing is compared", baseline)
    return study


def _variants(directory: Path, description: dict[str, Any]) -> Iterable[Variant]:
    missing = {"title", "metric", "baseline", "dataset", "seeds", "variants"} - set(description)
    if missing:
        raise KeyError(", ".join(sorted(missing)))
    for entry in description["variants"]:
        name = entry["name"]
        trials = []
        for seed in description["seeds"]:
            folder = directory / entry["folder"] / f"seed_{seed}"
            record = read_object(folder / TRIAL_FILE)
            trials.append(Trial(name, seed, folder, description["dataset"], record))
        paper = (description.get("paper") or {}).get(name, {})
        yield Variant(name, entry.get("differs") or {}, tuple(trials), paper)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines, without a last line that is half written."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) else []
    return rows


def _number(value: Any) -> float:
    """Returns a number of a JSON file, nan if it is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def mean(values: Iterable[float]) -> float:
    """Returns the mean, nan of nothing."""
    values = list(values)
    return statistics.mean(values) if values else math.nan


def machine(trial: Trial) -> str:
    """Returns on what a trial ran, as far as it is known."""
    environment = ""
    with contextlib.suppress(OSError):
        environment = (trial.folder / "environment.txt").read_text(encoding="utf-8")
    gpu = re.search(r"^GPU 0\S*\s+(.+?)\s*$", environment, re.MULTILINE)
    device = str(trial.record.get("device") or "unknown")
    return f"{device} ({gpu[1]})" if gpu and "cuda" in device else device


def read_object(path: Path) -> dict[str, Any]:
    """Returns a JSON object, ``{}`` where there is none or only half of it."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
