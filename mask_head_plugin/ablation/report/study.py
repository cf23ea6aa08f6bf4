"""Reads an ablation's folder, which may be incomplete, for the report."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...config import ConfigError
from ...evaluation.bootstrap import compare_all
from ...evaluation.coco_ap import METRICS
from ...evaluation.difference import PairedDifference
from ...evaluation.matching import Matches
from ..trial_folder import ABLATION_FILE, ENVIRONMENT_FILE, TRIAL_FILE, Trial, read_object

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Variant:
    """A variant of an ablation, shown as a row of the report.

    Attributes:
        name: name of the variant.
        differs: config values that differ from the baseline's, by flattened key.
        trials: one for each seed, in the order of the seeds, including trials not yet run.
        paper: published results by metric, in percent.
    """

    name: str
    differs: dict[str, Any]
    trials: tuple[Trial, ...]
    paper: dict[str, float]

    @property
    def finished(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.is_finished)

    def values(self, key: str) -> list[float]:
        """Returns the values of a metric from all finished trials that measured it."""
        return [x for x in (t.result(key) for t in self.finished) if math.isfinite(x)]

    def mean(self, key: str) -> float:
        return mean(self.values(key))

    def std(self, key: str) -> float:
        """Returns the standard deviation over seeds; nan for fewer than two seeds."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def costs(self, key: str) -> list[float]:
        return [x for x in (t.cost(key) for t in self.finished) if math.isfinite(x)]


TASK_WORDS = {"bbox": "box", "segm": "mask", "boundary": "boundary"}


def metric_words(key: str) -> str:
    """Returns the name of a metric for readers: "mask AP50" for ``segm/AP50``."""
    task, _, name = key.partition("/")
    return f"{TASK_WORDS[task]} {name}" if task in TASK_WORDS else key


ENTRIES = {
    **dict.fromkeys(("title", "metric", "baseline", "dataset"), str),
    **dict.fromkeys(("seeds", "variants"), list),
}
"""Entries that ablation.json must have, with their types."""


@dataclass(frozen=True)
class Study:
    """The content of an ablation's folder.

    Attributes:
        description: content of ablation.json.
        variants: all variants, in the order of the ablation file.
        num_draws: number of bootstrap draws for the intervals.
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

    @property
    def stopped_early(self) -> list[Trial]:
        """The trials that SOLVER.EARLY_STOPPING ended."""
        return [trial for trial in self.finished if trial.record().get("stopped_early") is True]

    def matches(self, task: str) -> dict[str, list[Matches]]:
        """Returns the matches of finished trials by variant; omits variants without matches."""
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

        Covers the metrics of the main task and all metrics with published results. The baseline's
        entry is empty.
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
        """Returns a variant's difference from the baseline, by default in the main metric."""
        return self.comparisons[variant.name].get(key or self.metric)

    def _compare(self, task: str, names: list[str]) -> dict[str, dict[str, PairedDifference]]:
        matches = self.matches(task)
        if not names or self.baseline.name not in matches or len(matches) < 2:
            return {}
        logger.info("resampling the images %d times to compare %s", self.num_draws, task)
        try:
            compared = compare_all(matches, self.baseline.name, tuple(names), self.num_draws)
        except ValueError as error:  # the variants were evaluated on different images
            raise ConfigError(f"{task} of the variants cannot be compared: {error}") from error
        return {name: c for name, c in compared.items() if name != self.baseline.name}


def read_study(directory: Path, num_draws: int) -> Study:
    """Reads an ablation's folder.

    Args:
        directory: folder with ablation.json and the trials' folders.
        num_draws: number of bootstrap draws for the intervals; at least 2.

    Raises:
        ConfigError: if ablation.json is missing or incomplete, no trial has finished, or there are
            fewer than two draws.
    """
    if num_draws < 2:
        raise ConfigError(
            f"{num_draws} draws are too few for an interval; use at least 2, better 1000"
        )
    path = directory / ABLATION_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        study = Study(description, tuple(_variants(directory, description)), num_draws)
        baseline = study.baseline.name
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; is {directory} an ablation's folder?"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ConfigError(f"{path} does not describe an ablation: {error!r}") from error
    if not study.finished:
        states = "; ".join(f"{t.variant}, seed {t.seed}: {t.state}" for t in study.trials[:3])
        raise ConfigError(f"{directory} has no finished trial to report ({states})")
    if not study.baseline.finished:
        logger.warning(
            "the baseline %r has no finished trial, so nothing can be compared", baseline
        )
    return study


def _variants(directory: Path, description: dict[str, Any]) -> Iterable[Variant]:
    missing = set(ENTRIES) - set(description)
    if missing:
        raise KeyError(", ".join(sorted(missing)))
    for key, kind in ENTRIES.items():
        if not isinstance(description[key], kind):
            raise TypeError(f"{key} is {description[key]!r}")
    published = description.get("paper") or {}
    if not isinstance(published, dict):
        raise TypeError(f"paper is {published!r}")
    for entry in description["variants"]:
        name = entry["name"]
        trials = []
        for seed in description["seeds"]:
            folder = directory / entry["folder"] / f"seed_{seed}"
            record = read_object(folder / TRIAL_FILE)
            trials.append(Trial(name, seed, folder, description["dataset"], snapshot=record))
        paper = published.get(name, {})
        yield Variant(name, entry.get("differs") or {}, tuple(trials), paper)


def mean(values: Iterable[float]) -> float:
    """Returns the mean; nan if there are no values."""
    values = list(values)
    return statistics.mean(values) if values else math.nan


def machine(trial: Trial) -> str:
    """Returns the device that a trial ran on, or ``unknown``."""
    environment = ""
    with contextlib.suppress(OSError):
        environment = (trial.folder / ENVIRONMENT_FILE).read_text(encoding="utf-8")
    gpu = re.search(r"^GPU 0\S*\s+(.+?)\s*$", environment, re.MULTILINE)
    device = str(trial.record().get("device") or "unknown")
    return f"{device} ({gpu[1]})" if gpu and "cuda" in device else device
