"""Runs the trials of an ablation on this machine or on a Slurm cluster.

Trials that were interrupted are resumed. trial_folder.py describes the folders of trials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from ..config import ConfigError, flatten
from ..config_check.chosen_metrics import VALIDATION, evaluated_metrics
from ..data import register_coco_files
from ..durable_files import lock_holder, write_durably
from ..engine import Trainer
from ..engine.evaluators import check_objects
from ..engine.run import check_and_register
from ..messages import counted, nearest_name, one_line, silenced
from ..progress import progress_bar, tell
from ..user_code import import_modules
from .ablation_file import Ablation
from .cluster import Cluster
from .run_trial import TrialJob
from .trial_code import check_code
from .trial_folder import (
    ABLATION_FILE,
    FAILED,
    LOCK_FILE,
    Trial,
    check_hash,
    folder_name,
    read_object,
    seconds_per_iteration,
    started_trials,
    write_record,
)

POLL_SECONDS = 1.0
ESTIMATE_ITERATIONS = 8
"""Number of iterations that a dry run trains to measure the speed if no trial has run yet.

The first half is warm-up and is not measured.
"""


def plan(ablation: Ablation, output: Path, num_gpus: int = 0) -> list[Trial]:
    """Returns the trials of an ablation, seed by seed, and checks that all of them can run.

    Trials may run on another machine, so this function chooses the device from ``num_gpus`` and
    ignores this machine's GPUs. The machine that runs a trial checks whether it has enough GPUs.

    Args:
        ablation: result of ``load_ablation``.
        output: folder that will contain the trials' folders.
        num_gpus: number of GPUs for each trial; 0 to use the CPU.

    Raises:
        ConfigError: if a config cannot be used, a data set is missing, a module in IMPORTS fails,
            or the output folder contains a trial, of any seed, that was started with a different
            config or with another version of a file in IMPORTS.
    """
    trials = []
    for seed in ablation.seeds:
        for variant, config in ablation.configs.items():
            cfg = _with_seed(config, seed)
            with _naming(variant):
                cfg.MODEL.DEVICE = _device(cfg.MODEL.DEVICE, num_gpus)
            folder = output / folder_name(variant) / f"seed_{seed}"
            cfg.OUTPUT_DIR = str(folder)
            dataset = next(iter(cfg.DATASETS.TEST), "")
            trials.append(Trial(variant, seed, folder, dataset, cfg))
    import_modules(trials[0].cfg.IMPORTS)
    for trial in trials[: len(ablation.configs)]:
        with _naming(trial.variant):
            cfg = trial.cfg.clone()
            cfg.OUTPUT_DIR = str(output)
            check_and_register(cfg, train=True, own=ablation.own_keys[trial.variant])
            _check_metric(cfg, ablation.metric)
    started = started_trials(output)
    check_code(started, trials[0].cfg.IMPORTS)
    for trial in trials[: len(ablation.configs)]:
        for other in started:
            if other.folder.parent == trial.folder.parent:
                check_hash(
                    dataclasses.replace(
                        other, variant=trial.variant, cfg=_with_seed(trial.cfg, other.seed)
                    )
                )
    # Once, because it reads the annotations, and all variants use the same test set.
    with _naming(trials[0].variant):
        _check_objects(trials[0], ablation.metric)
    return trials


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    cfg = cfg.clone()
    cfg.SEED = seed
    return cfg


def _check_metric(cfg: CfgNode, metric: str) -> None:
    """Raises ConfigError if the trials will not measure METRIC.

    Accepts any metric if our evaluator is not used, because its metrics are then unknown.
    """
    given = evaluated_metrics(cfg, next(iter(cfg.DATASETS.TEST), ""))
    known = [x for x in given if "/AP-" not in x and not x.startswith(VALIDATION)]
    if known and metric not in (*known, *(f"{x.partition('/')[0]}/AR" for x in known)):
        nearest = nearest_name(metric, known)
        hint = f"did you mean {nearest!r}?" if nearest else f"trials have {', '.join(known)}"
        raise ConfigError(f"METRIC {metric!r} is not measured in the trials; {hint}")


def _check_objects(trial: Trial, metric: str) -> None:
    """Raises ConfigError if the test set has no objects that count for METRIC."""
    if not trial.dataset:
        return
    cfg = trial.cfg.clone()
    # An evaluator writes the annotations of data sets that have no COCO file.
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR, silenced(logging.INFO):
        try:
            check_objects(cfg, trial.dataset, metric, f"METRIC {metric!r}")
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigError(f"{trial.dataset} cannot be read: {one_line(error)}") from error


def _device(device: str, num_gpus: int) -> str:
    """Returns the value of MODEL.DEVICE for a trial."""
    is_cuda = device.startswith("cuda")
    if num_gpus and not is_cuda:
        raise ConfigError(
            f"MODEL.DEVICE {device} does not use the GPUs of --num-gpus {num_gpus}; set "
            "MODEL.DEVICE to cuda, or remove --num-gpus"
        )
    return "cpu" if is_cuda and not num_gpus else device


def write_description(output: Path, description: dict[str, Any]) -> None:
    """Writes ablation.json; keeps the variants and seeds that are already in the file.

    Raises:
        ConfigError: if the folder belongs to an ablation with another file, size or baseline.
    """
    path = output / ABLATION_FILE
    known = read_object(path)
    for key in ("file", "size", "baseline") if known else ():
        if known.get(key) != description[key]:
            raise ConfigError(
                f"{path} belongs to the {key} {known.get(key)!r}, not {description[key]!r}: choose "
                "another --output"
            )
    named = {x["name"]: x for x in [*known.get("variants", []), *description["variants"]]}
    seeds = {*known.get("seeds", []), *description["seeds"]}
    merged = {**description, "variants": list(named.values()), "seeds": sorted(seeds)}
    merged["paper"] = {**known.get("paper", {}), **description["paper"]}
    write_durably(path, json.dumps(merged, indent=1) + "\n")


def describe(ablation: Ablation, *, file: str, size: str, command: str) -> dict[str, Any]:
    """Returns the content of ablation.json, which reports read together with the trials."""
    baseline = flatten(ablation.configs[ablation.baseline])
    variants = [
        {
            "name": name,
            "folder": folder_name(name),
            "differs": {k: v for k, v in flatten(cfg).items() if baseline.get(k) != v},
        }
        for name, cfg in ablation.configs.items()
    ]
    return {
        "title": ablation.title,
        "metric": ablation.metric,
        "baseline": ablation.baseline,
        "file": file,
        "size": size,
        "command": command,
        "dataset": ablation.configs[ablation.baseline].DATASETS.TEST[0],
        "seeds": list(ablation.seeds),
        "variants": variants,
        "paper": ablation.paper,
    }


def run(
    trials: Sequence[Trial], cluster: Cluster, report: Callable[[Trial], None] = lambda _: None
) -> None:
    """Runs the trials that have not finished.

    Shows a progress bar with the iterations of all trials and the time left. A trial that fails
    does not stop the others. An interruption stops the running trials; they resume from their
    checkpoints when you start the ablation again.

    Args:
        trials: result of ``plan``.
        cluster: where to run the trials.
        report: called with each trial when it ends.

    Raises:
        ConfigError: if Slurm refuses a job.
    """
    waiting = [trial for trial in trials if not trial.is_finished]
    total = sum(int(trial.cfg.SOLVER.MAX_ITER) for trial in trials)
    done = sum(trial.iteration() for trial in trials)
    running: dict[int, tuple[Trial, submitit.Job[None]]] = {}
    with progress_bar(counted(len(trials), "trial"), "it", total, done) as advance:
        try:
            while waiting or running:
                free = [slot for slot in range(cluster.jobs) if slot not in running]
                for slot, trial in zip(free, waiting[: len(free)], strict=False):
                    waiting.remove(trial)
                    _tell_if_running(trial)
                    job = TrialJob(trial, cluster.num_gpus, cluster.threads)
                    if cluster.kind == "debug":
                        job()
                        report(trial)
                        continue
                    folder = trial.folder / "submitit"
                    running[slot] = trial, cluster.submit(job, folder, slot)
                for slot, (trial, submitted) in list(running.items()):
                    if submitted.done():
                        del running[slot]
                        _note_lost_job(trial, submitted)
                        report(trial)
                before, done = done, sum(trial.iteration() for trial in trials)
                advance(done - before)
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for _, submitted in running.values():
                submitted.cancel()


def _tell_if_running(trial: Trial) -> None:
    """Says so if the process of a command that was killed still runs the trial."""
    holder = lock_holder(trial.folder / LOCK_FILE)
    if holder is not None:
        tell(f"{trial.name} is still running in process {holder}; waiting for it")


def estimate_seconds(trials: Sequence[Trial], cluster: Cluster) -> float | None:
    """Estimates how long the unfinished trials will take.

    Uses the speed of trials that have run. If there are none, trains the first trial for a few
    iterations and measures their speed; returns None if that needs GPUs that this machine lacks.
    """
    left = sum(int(t.cfg.SOLVER.MAX_ITER) - t.iteration() for t in trials if not t.is_finished)
    speeds = [seconds_per_iteration(t.folder) for t in trials]
    known = [x for x in speeds if x is not None]
    if not known and cluster.num_gpus > torch.cuda.device_count():
        return None
    return left * (statistics.mean(known) if known else _try_speed(trials[0])) / cluster.jobs


def _note_lost_job(trial: Trial, job: submitit.Job[None]) -> None:
    """Records a failure in trial.json if the process died before it could write the file."""
    if trial.is_finished or trial.has_failed:
        return
    lines = [line.strip() for line in (job.stderr() or "").splitlines() if line.strip()]
    error = lines[-1] if lines else "the process was killed"
    write_record(trial, {"status": FAILED, "error": error})


def _try_speed(trial: Trial) -> float:
    """Measures the seconds per training step, without evaluation."""
    cfg = trial.cfg.clone()
    cfg.SOLVER.MAX_ITER = ESTIMATE_ITERATIONS
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(silenced(logging.INFO))  # detectron2 prints the whole model
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        cfg.OUTPUT_DIR = folder
        register_coco_files(cfg)
        trainer = Trainer(cfg)
        warm_up, start = ESTIMATE_ITERATIONS // 2, 0.0
        with EventStorage(0):
            for trainer.iter in range(ESTIMATE_ITERATIONS):
                if trainer.iter == warm_up:
                    start = time.monotonic()
                trainer.run_step()
    return (time.monotonic() - start) / (ESTIMATE_ITERATIONS - warm_up)


@contextlib.contextmanager
def _naming(variant: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"variant {variant!r}: {error}") from error
