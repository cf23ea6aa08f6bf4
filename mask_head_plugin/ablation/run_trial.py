"""Runs one trial, either in a separate process or in the current one."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import time
import traceback
from pathlib import Path
from typing import Any

import submitit
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info

from ..config import ConfigError
from ..durable_files import locked, write_durably
from ..engine import Trainer
from ..engine.launch import launch
from ..engine.run import join_run
from .trial_code import check_code, store_code
from .trial_folder import (
    ENVIRONMENT_FILE,
    FAILED,
    FINISHED,
    HASH_FILE,
    LOCK_FILE,
    METRICS_FILE,
    TRIAL_FILE,
    Trial,
    check_hash,
    config_hash,
    read_json_lines,
    seconds_per_iteration,
    started_trials,
    write_record,
)

PARAMETERS_FILE, ITERATIONS_FILE = "num_parameters.txt", "num_iterations.txt"


class TrialJob(submitit.helpers.Checkpointable):
    """The job that submitit pickles and calls. After a preemption, submitit calls it again."""

    def __init__(self, trial: Trial, num_gpus: int, threads: int) -> None:
        self.trial, self.num_gpus, self.threads = trial, num_gpus, threads

    def __call__(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        run_trial(self.trial, self.num_gpus)


def run_trial(trial: Trial, num_gpus: int = 0) -> None:
    """Trains and evaluates a trial, resuming from its last checkpoint if it has one.

    Writes trial.json with these entries: variant, seed, status ("finished" or "failed"), error,
    iterations (that were trained), stopped_early, seconds (of this call), seconds_per_iteration
    (median), peak_memory_mb (memory that PyTorch allocates on CUDA; without CUDA, memory of the
    process), num_parameters, results (by task, in percent), device, versions, commit, finished_at.
    Errors are recorded in trial.json instead of being raised.

    If another process is running the same trial, waits until that process is done.
    """
    trial.folder.mkdir(parents=True, exist_ok=True)
    with locked(trial.folder / LOCK_FILE):
        if trial.is_finished:
            return
        start = time.monotonic()
        try:
            check_hash(trial)
            # Again, because the user may have edited a file since the study was started.
            check_code(started_trials(trial.folder.parent.parent), trial.cfg.IMPORTS)
            (trial.folder / TRIAL_FILE).unlink(missing_ok=True)  # left by an earlier failure
            _check_gpus(num_gpus)
            store_code(trial)
            write_durably(trial.folder / HASH_FILE, config_hash(trial.cfg) + "\n")
            launch(_train, max(num_gpus, 1), args=(trial.cfg,), device=trial.cfg.MODEL.DEVICE)
            record = _measure(trial)
        except Exception as error:  # an error in one trial must not stop the others
            last = traceback.format_exception_only(error)[-1].strip()
            record = {"status": FAILED, "error": last, "traceback": traceback.format_exc()}
        record["seconds"] = round(time.monotonic() - start, 1)
        write_record(trial, record)


def _check_gpus(num_gpus: int) -> None:
    """Raises ConfigError if this machine has fewer GPUs than the trial needs."""
    if num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {num_gpus}: PyTorch finds only {torch.cuda.device_count()} on "
            f"{socket.gethostname()}"
        )


def _train(cfg: CfgNode) -> None:
    """Trains the model in one of the trial's processes, as train_net.py does."""
    cfg = cfg.clone()
    join_run(cfg)
    cfg.freeze()
    default_setup(cfg, None)
    if comm.is_main_process():
        environment = f"{collect_env_info()}\ncommit {commit() or 'unknown'}\n"
        (Path(cfg.OUTPUT_DIR) / ENVIRONMENT_FILE).write_text(environment)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    if comm.is_main_process():
        count = sum(p.numel() for p in trainer.model.parameters())
        (Path(cfg.OUTPUT_DIR) / PARAMETERS_FILE).write_text(str(count))
        # With SOLVER.EARLY_STOPPING, this may be less than SOLVER.MAX_ITER.
        (Path(cfg.OUTPUT_DIR) / ITERATIONS_FILE).write_text(str(trainer.max_iter))


def _measure(trial: Trial) -> dict[str, Any]:
    """Collects the results and costs of a finished trial."""
    rows = read_json_lines(trial.folder / METRICS_FILE)
    on_cuda = [float(x["max_mem_mb"]) for x in rows if x.get("max_mem_mb")]
    found = json.loads((trial.inference / METRICS_FILE).read_text())
    tasks = [task for task, values in found.items() if isinstance(values, dict)]
    iterations = int((trial.folder / ITERATIONS_FILE).read_text())
    return {
        "status": FINISHED,
        "error": None,
        "iterations": iterations,
        "stopped_early": iterations < trial.cfg.SOLVER.MAX_ITER,
        "seconds_per_iteration": seconds_per_iteration(trial.folder),
        "peak_memory_mb": max(on_cuda)
        if on_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "num_parameters": int((trial.folder / PARAMETERS_FILE).read_text()),
        "results": {
            task: {k: v for k, v in found[task].items() if k != "by_class"} for task in tasks
        },
        "device": str(trial.cfg.MODEL.DEVICE),
        "versions": {"torch": torch.__version__},
        "commit": commit(),
    }


def commit() -> str | None:
    """Returns the commit of this code, or None if it is not in a git repository.

    A + at the end marks uncommitted changes.
    """
    folder = Path(__file__).parent
    try:
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.check_output(status, cwd=folder, text=True).strip()
        return head.strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
