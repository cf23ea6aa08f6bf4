"""Runs the trials of an ablation, on this machine or on a Slurm cluster, and takes them up again.

A trial is one variant with one seed. It has a folder of its own, ``<variant>/seed_<n>``, with what
a training leaves there (config.yaml, log.txt, metrics.json, TensorBoard events, checkpoints,
inference/) and

- ``trial.json``: how it ended, its metrics and its cost, see run_trial;
- ``environment.txt``: versions and hardware;
- ``submitit/``: the logs of the process that ran it.

The ablation's folder has ``ablation.json``, see describe, from which the report is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import resource
import socket
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from ..config import ConfigError, flatten
from ..data import check_datasets, register_coco_files
from ..durable_files import locked, write_durably
from ..engine import Trainer, check_config
from ..engine.config_unread import warn_of_unread_keys
from ..engine.launch import launch
from ..user_code import import_modules
from .ablation import Ablation
from .cluster import Cluster
from .report_data import read_json_lines, read_object

FINISHED, FAILED = "finished", "failed"
HASH_FILE = "config_hash.txt"
POLL_SECONDS = 1.0
ESTIMATE_ITERATIONS = 8
"""Steps that a dry run takes where no trial has run yet; the first half warms up."""


@dataclass(frozen=True)
class Trial:
    """One variant with one seed.

    Attributes:
        variant: its name.
        seed: its seed.
        cfg: its complete config; OUTPUT_DIR is the trial's folder.
    """

    variant: str
    seed: int
    cfg: CfgNode

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def record(self) -> dict[str, Any]:
        """Returns what trial.json says, ``{}`` if the trial has not ended yet."""
        return read_object(self.folder / "trial.json")

    @property
    def known_hash(self) -> str:
        """The hash of the config that the folder's training was started with, if any was."""
        with contextlib.suppress(OSError):
            return (self.folder / HASH_FILE).read_text().strip()
        return ""

    @property
    def is_finished(self) -> bool:
        return self.record().get("status") == FINISHED

    def iteration(self) -> int:
        """Returns how many iterations are done, as far as it was logged."""
        total = int(self.cfg.SOLVER.MAX_ITER)
        if self.is_finished:
            return total
        rows = read_json_lines(self.folder / "metrics.json")
        iterations = [x["iteration"] for x in rows if isinstance(x.get("iteration"), int)]
        done = max(iterations, default=-1) + 1
        return min(done, total)  # an evaluation that is repeated counts on


def plan(ablation: Ablation, output: Path, num_gpus: int = 0) -> list[Trial]:
    """Returns the trials of an ablation, seed by seed, and checks that all of them can run.

    The machine that plans need not be the one that trains: the device follows from ``num_gpus``,
    and whether it is there is looked at where the trial runs.

    Args:
        ablation: of ``load_ablation``.
        output: for the trials' folders.
        num_gpus: of each trial; 0 for the CPU.

    Raises:
        ConfigError: if a config cannot be used, a data set is missing, or a trial in the folder was
            run with another config, with the variant's name; or IMPORTS fails.
    """
    trials = []
    for seed in ablation.seeds:
        for variant, config in ablation.configs.items():
            cfg = config.clone()
            cfg.SEED = seed
            with _naming(variant):
                cfg.MODEL.DEVICE = _device(cfg.MODEL.DEVICE, num_gpus)
            cfg.OUTPUT_DIR = str(output / folder_name(variant) / f"seed_{seed}")
            trials.append(Trial(variant, seed, cfg))
    import_modules(trials[0].cfg.IMPORTS)
    for trial in trials[: len(ablation.configs)]:
        with _naming(trial.variant):
            cfg = trial.cfg.clone()
            cfg.OUTPUT_DIR = str(output)
            check_config(cfg, train=True, trainer=Trainer)
            warn_of_unread_keys(cfg, train=True)
            register_coco_files(cfg)
            check_datasets(cfg)
    for trial in trials:
        _check_hash(trial)
    return trials


def _device(device: str, num_gpus: int) -> str:
    """Returns what MODEL.DEVICE a trial trains with."""
    is_cuda = device.startswith("cuda")
    if num_gpus and not is_cuda:
        raise ConfigError(
            f"MODEL.DEVICE {device} does not use the GPUs of --num-gpus {num_gpus}; set it to "
            "cuda, or leave --num-gpus out"
        )
    return "cpu" if is_cuda and not num_gpus else device


def _check_gpus(num_gpus: int) -> None:
    """Raises ConfigError unless the machine that a trial runs on has its GPUs."""
    if num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {num_gpus}, but PyTorch finds {torch.cuda.device_count()} on "
            f"{socket.gethostname()}"
        )


def _check_hash(trial: Trial) -> None:
    if trial.known_hash not in ("", config_hash(trial.cfg)):
        raise ConfigError(
            f"{trial.folder} was run with another config than {trial.name} has now: choose "
            "another --output, or delete that folder"
        )


def folder_name(variant: str) -> str:
    """Returns a variant's name as it can stand in a path, distinct for distinct names."""
    safe = re.sub(r"[^\w.-]+", "_", variant).strip("_.") or "variant"
    if safe == variant:
        return safe
    return f"{safe}-{hashlib.blake2b(variant.encode(), digest_size=3).hexdigest()}"


def config_hash(cfg: CfgNode) -> str:
    """Returns a hash of all that a trial's result may depend on."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = ""
    return hashlib.blake2b(cfg.dump().encode(), digest_size=12).hexdigest()


def write_description(output: Path, description: dict[str, Any]) -> None:
    """Writes ablation.json; variants and seeds that it had stay.

    Raises:
        ConfigError: if the folder is of another ablation, size or baseline.
    """
    path = output / "ablation.json"
    known = read_object(path)
    for key in ("file", "size", "baseline") if known else ():
        if known.get(key) != description[key]:
            raise ConfigError(
                f"{path} is of the {key} {known.get(key)!r}, not {description[key]!r}: choose "
                "another --output"
            )
    named = {x["name"]: x for x in [*known.get("variants", []), *description["variants"]]}
    seeds = {*known.get("seeds", []), *description["seeds"]}
    merged = {**description, "variants": list(named.values()), "seeds": sorted(seeds)}
    merged["paper"] = {**known.get("paper", {}), **description["paper"]}
    write_durably(path, json.dumps(merged, indent=1) + "\n")


def describe(ablation: Ablation, *, file: str, size: str, command: str) -> dict[str, Any]:
    """Returns what ablation.json says of an ablation: all that a report needs beside the trials."""
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


class TrialJob(submitit.helpers.Checkpointable):
    """What submitit pickles and calls; called again with the same trial after a preemption."""

    def __init__(self, trial: Trial, num_gpus: int, threads: int) -> None:
        self.trial, self.num_gpus, self.threads = trial, num_gpus, threads

    def __call__(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        run_trial(self.trial, self.num_gpus)


def run_trial(trial: Trial, num_gpus: int = 0) -> None:
    """Trains and evaluates a trial, from its last checkpoint if it has one.

    Leaves trial.json: variant, seed, status ("finished" or "failed"), error,
    iterations, seconds (of this run), seconds_per_iteration (median), peak_memory_mb (on CUDA what
    PyTorch allocates, otherwise the process's), num_parameters, results (by task, in percent),
    device, versions, commit, finished_at. An error is written there and not raised.

    Where another process is at the same trial, waits for it.
    """
    trial.folder.mkdir(parents=True, exist_ok=True)
    with locked(trial.folder / "lock"):
        if trial.is_finished:
            return
        (trial.folder / "trial.json").unlink(missing_ok=True)  # of an earlier failure
        start = time.monotonic()
        try:
            _check_hash(trial)
            _check_gpus(num_gpus)
            write_durably(trial.folder / HASH_FILE, config_hash(trial.cfg) + "\n")
            launch(_train, max(num_gpus, 1), args=(trial.cfg,), device=trial.cfg.MODEL.DEVICE)
            record = _measure(trial)
        except Exception as error:  # of any kind: the other trials go on
            last = traceback.format_exception_only(error)[-1].strip()
            record = {"status": FAILED, "error": last, "traceback": traceback.format_exc()}
        record["seconds"] = round(time.monotonic() - start, 1)
        write_record(trial, record)


def write_record(trial: Trial, record: dict[str, Any]) -> None:
    """Writes trial.json, whole or not at all."""
    content = {
        "variant": trial.variant,
        "seed": trial.seed,
        "finished_at": time.strftime("%Y-%m-%d %H:%M:%S"),
        **record,
    }
    write_durably(trial.folder / "trial.json", json.dumps(content, indent=1) + "\n")


def run(
    trials: Sequence[Trial], cluster: Cluster, report: Callable[[Trial], None] = lambda _: None
) -> None:
    """Runs the trials that are not finished.

    Shows the iterations of all trials with the time left. A trial that fails does not stop the
    others. On an interruption, trials that run are stopped; they go on from their checkpoints when
    the ablation is started again.

    Args:
        trials: of ``plan``.
        cluster: where to.
        report: called with each trial that has ended.

    Raises:
        ConfigError: if Slurm does not take a job.
    """
    waiting = [trial for trial in trials if not trial.is_finished]
    total = sum(int(trial.cfg.SOLVER.MAX_ITER) for trial in trials)
    running: dict[int, tuple[Trial, submitit.Job[None]]] = {}
    with tqdm(total=total, unit="it", desc=f"{len(trials)} trials", smoothing=0.05) as progress:
        progress.update(sum(trial.iteration() for trial in trials))
        progress.initial = progress.n  # the time left counts what this run does
        try:
            while waiting or running:
                free = [slot for slot in range(cluster.jobs) if slot not in running]
                for slot, trial in zip(free, waiting[: len(free)], strict=False):
                    waiting.remove(trial)
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
                progress.update(sum(trial.iteration() for trial in trials) - progress.n)
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for _, submitted in running.values():
                submitted.cancel()


def estimate_seconds(trials: Sequence[Trial], cluster: Cluster) -> float | None:
    """Returns about how long the trials that are not finished will take.

    From the speed of those that have run; where none has, from a few steps of the first one. None
    where those would need GPUs that this machine does not have.
    """
    left = sum(int(t.cfg.SOLVER.MAX_ITER) - t.iteration() for t in trials if not t.is_finished)
    speeds = [seconds_per_iteration(t.folder) for t in trials]
    known = [x for x in speeds if x is not None]
    if not known and cluster.num_gpus > torch.cuda.device_count():
        return None
    return left * (statistics.mean(known) if known else _try_speed(trials[0])) / cluster.jobs


def seconds_per_iteration(folder: Path) -> float | None:
    """Returns the median of what a training logged, None if it has logged nothing."""
    times = [x.get("time") for x in read_json_lines(folder / "metrics.json")]
    known = [x for x in times if isinstance(x, float)]
    return statistics.median(known) if known else None


def _train(cfg: CfgNode) -> None:
    """Trains in one of a trial's processes; see train_net.py."""
    cfg = cfg.clone()
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="mask_head_plugin")
    import_modules(cfg.IMPORTS)
    register_coco_files(cfg)
    cfg.freeze()
    default_setup(cfg, None)
    if comm.is_main_process():
        environment = f"{collect_env_info()}\ncommit {commit() or 'unknown'}\n"
        (Path(cfg.OUTPUT_DIR) / "environment.txt").write_text(environment)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    if comm.is_main_process():
        count = sum(p.numel() for p in trainer.model.parameters())
        (Path(cfg.OUTPUT_DIR) / "num_parameters.txt").write_text(str(count))


def _measure(trial: Trial) -> dict[str, Any]:
    """Returns what a finished training has reached and cost."""
    rows = read_json_lines(trial.folder / "metrics.json")
    on_cuda = [float(x["max_mem_mb"]) for x in rows if x.get("max_mem_mb")]
    names = trial.cfg.DATASETS.TEST
    folder = trial.folder / "inference" / (names[0] if len(names) > 1 else "")
    found = json.loads((folder / "metrics.json").read_text())
    tasks = [task for task, values in found.items() if isinstance(values, dict)]
    return {
        "status": FINISHED,
        "error": None,
        "iterations": int(trial.cfg.SOLVER.MAX_ITER),
        "seconds_per_iteration": seconds_per_iteration(trial.folder),
        "peak_memory_mb": max(on_cuda)
        if on_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "num_parameters": int((trial.folder / "num_parameters.txt").read_text()),
        "results": {
            task: {k: v for k, v in found[task].items() if k != "by_class"} for task in tasks
        },
        "device": str(trial.cfg.MODEL.DEVICE),
        "versions": {"torch": torch.__version__},
        "commit": commit(),
    }


def commit() -> str | None:
    """Returns the commit of this code, with a + if files differ from it; None outside of git."""
    folder = Path(__file__).parent
    try:
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.check_output(status, cwd=folder, text=True).strip()
        return head.strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _note_lost_job(trial: Trial, job: submitit.Job[None]) -> None:
    """Writes trial.json for a process that ended without doing so, e.g. killed for its memory."""
    if trial.is_finished or trial.record().get("status") == FAILED:
        return
    lines = [line.strip() for line in (job.stderr() or "").splitlines() if line.strip()]
    error = lines[-1] if lines else "the process was killed"
    write_record(trial, {"status": FAILED, "error": error})


def _try_speed(trial: Trial) -> float:
    """Returns the seconds of a training step, without evaluation."""
    cfg = trial.cfg.clone()
    cfg.SOLVER.MAX_ITER = ESTIMATE_ITERATIONS
    with tempfile.TemporaryDirectory() as folder:
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
