"""A trial (one variant with one seed) and its folder.

The folder ``<variant>/seed_<n>`` contains the usual files of a run (config.yaml, log.txt,
metrics.json, TensorBoard events, checkpoints, inference/) and:

- ``trial.json``: how the trial ended, its metrics and its cost (see run_trial);
- ``environment.txt``: versions and hardware;
- ``num_parameters.txt``: the size of the model;
- ``num_iterations.txt``: after which iteration the training ended;
- ``config_hash.txt``: ensures that a trial is resumed only with the same config;
- ``code/``: copies of the user's files that the trial ran (see trial_code);
- ``submitit/``: logs of the process that ran the trial.

The ablation's folder also contains ``ablation.json`` (see runner.describe), which the report reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
import statistics
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..config import ConfigError
from ..durable_files import write_durably
from ..evaluation.matching import Matches
from ..messages import counted

logger = logging.getLogger(__name__)

ABLATION_FILE = "ablation.json"
TRIAL_FILE, METRICS_FILE = "trial.json", "metrics.json"
HASH_FILE, ENVIRONMENT_FILE = "config_hash.txt", "environment.txt"
LOCK_FILE = "lock"
"""Locked by the process that runs the trial."""
FINISHED, FAILED = "finished", "failed"


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of an ablation: a variant with a seed.

    Attributes:
        variant: name of the variant.
        seed: random seed.
        folder: folder of the trial's files; need not exist yet.
        dataset: name of the test set.
        cfg: complete config, whose OUTPUT_DIR is the folder; None if the folder is only read.
        snapshot: content of trial.json that ``record`` returns; None to read the file each time.
    """

    variant: str
    seed: int
    folder: Path
    dataset: str
    cfg: CfgNode = None
    snapshot: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def record(self) -> dict[str, Any]:
        """Returns the content of trial.json; ``{}`` until the trial has ended."""
        return read_object(self.folder / TRIAL_FILE) if self.snapshot is None else self.snapshot

    @property
    def known_hash(self) -> str:
        """Hash of the config that the trial was started with; empty if it has not been started."""
        with contextlib.suppress(OSError):
            return (self.folder / HASH_FILE).read_text().strip()
        return ""

    @property
    def is_finished(self) -> bool:
        return self.record().get("status") == FINISHED

    @property
    def has_failed(self) -> bool:
        return self.record().get("status") == FAILED

    @property
    def state(self) -> str:
        """State of the trial in words, for reports."""
        if (status := self.record().get("status")) in (FINISHED, FAILED):
            return str(status)
        logged = self._logged()
        return f"unfinished, {counted(logged, 'iteration')} logged" if logged else "not run"

    @property
    def error(self) -> str:
        return str(self.record().get("error") or "")

    @property
    def inference(self) -> Path:
        """Folder of the evaluation's results. With several test sets, each set has a subfolder."""
        own = self.folder / "inference" / self.dataset
        return own if own.is_dir() else self.folder / "inference"

    def result(self, key: str) -> float:
        """Returns a metric such as ``segm/AP`` in percent; nan if it is missing."""
        task, _, metric = key.partition("/")
        found: Any = self.record().get("results")
        for name in (task, metric):
            found = found.get(name) if isinstance(found, dict) else None
        return _number(found)

    def cost(self, key: str) -> float:
        """Returns a number from trial.json; nan if it is missing."""
        return _number(self.record().get(key))

    def iteration(self) -> int:
        """Returns the number of finished iterations according to the log."""
        total = int(self.cfg.SOLVER.MAX_ITER)
        # A repeated evaluation is logged with an iteration number beyond the last one.
        return total if self.is_finished else min(self._logged(), total)

    def _logged(self) -> int:
        return max((row["iteration"] + 1 for row in self.log()), default=0)

    def log(self) -> list[dict[str, Any]]:
        """Returns detectron2's log records in the order of iterations."""
        rows: dict[int, dict[str, Any]] = {}
        for row in read_json_lines(self.folder / METRICS_FILE):
            # If a resumed run repeated an iteration, the values that were logged later win.
            if isinstance(row.get("iteration"), int):
                rows[row["iteration"]] = rows.get(row["iteration"], {}) | row
        return [rows[iteration] for iteration in sorted(rows)]

    def matches(self, task: str) -> Matches | None:
        """Reads the matches of a task; warns and returns None if the file is missing or broken."""
        path = self.inference / f"matches_{task}.npz"
        try:
            return Matches.load(path)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read, so this trial has no interval: %s", path, error)
            return None


def started_trials(output: Path) -> list[Trial]:
    """Returns all trials in an ablation's folder that were ever started, without their configs."""
    found = []
    for path in sorted(output.glob(f"*/seed_*/{HASH_FILE}")):
        number = path.parent.name.removeprefix("seed_")
        if number.isdigit():
            variant = read_object(path.parent / TRIAL_FILE).get("variant")
            name = str(variant or path.parent.parent.name)
            found.append(Trial(name, int(number), path.parent, dataset=""))
    return found


def check_hash(trial: Trial) -> None:
    """Raises ConfigError if a trial was started with another config."""
    if trial.known_hash not in ("", config_hash(trial.cfg), _hash(trial.cfg)):
        raise ConfigError(
            f"{trial.folder}: the config of {trial.name} has changed since this trial was run; "
            "choose another --output, or delete that folder"
        )


def folder_name(variant: str) -> str:
    """Returns a valid folder name for a variant, different for each variant."""
    safe = re.sub(r"[^\w.-]+", "_", variant).strip("_.") or "variant"
    if safe == variant:
        return safe
    return f"{safe}-{hashlib.blake2b(variant.encode(), digest_size=3).hexdigest()}"


def config_hash(cfg: CfgNode) -> str:
    """Returns a hash of the config without OUTPUT_DIR, which does not affect results.

    IMPORTS is left out as well: trial_code compares the files themselves, and a study may get
    another file for a new variant.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.IMPORTS = []
    return _hash(cfg)


def _hash(cfg: CfgNode) -> str:
    """Returns the hash with IMPORTS, which earlier versions stored."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = ""
    return hashlib.blake2b(cfg.dump().encode(), digest_size=12).hexdigest()


def write_record(trial: Trial, record: dict[str, Any]) -> None:
    """Writes trial.json atomically."""
    content = {
        "variant": trial.variant,
        "seed": trial.seed,
        "finished_at": time.strftime("%Y-%m-%d %H:%M:%S"),
        **record,
    }
    write_durably(trial.folder / TRIAL_FILE, json.dumps(content, indent=1) + "\n")


def seconds_per_iteration(folder: Path) -> float | None:
    """Returns the median of the logged seconds per iteration; None if nothing was logged."""
    times = [x.get("time") for x in read_json_lines(folder / METRICS_FILE)]
    known = [x for x in times if isinstance(x, float)]
    return statistics.median(known) if known else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects in a JSON Lines file; skips incomplete lines."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) else []
    return rows


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; returns ``{}`` if the file is missing or incomplete."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _number(value: Any) -> float:
    """Returns a JSON value as a float; nan if it is not a number."""
    return float(value) if isinstance(value, int | float) else math.nan
