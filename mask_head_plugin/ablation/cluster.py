"""Starts the trials of an ablation as processes on this machine or as Slurm jobs."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import submitit
import torch
from submitit.core.utils import FailedJobError, FailedSubmissionError

from ..config import ConfigError
from ..messages import one_line

SLURM_COMMANDS = ("sbatch", "srun")


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Lets processes that are started meanwhile write their errors to a file.

    submitit's controller of a local trial prints a traceback for each Ctrl-C. The errors of the
    trial itself have their own file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@dataclass(frozen=True)
class Cluster:
    """Where trials run.

    Attributes:
        kind: "local" (in processes on this machine), "slurm" (as Slurm jobs) or "debug" (in the
            current process).
        jobs: how many trials run at the same time.
        num_gpus: number of GPUs for each trial; 0 to use the CPU.
        partition: Slurm partition; empty for Slurm's default.
        account: account that Slurm charges; empty for Slurm's default.
        qos: Slurm's quality of service; empty for Slurm's default.
        minutes: time limit of a Slurm job. A job that reaches the limit or is preempted is
            requeued and resumes from its last checkpoint.
    """

    kind: str = "local"
    jobs: int = 1
    num_gpus: int = 0
    partition: str = ""
    account: str = ""
    qos: str = ""
    minutes: int = 24 * 60

    @property
    def threads(self) -> int:
        """Number of threads for each trial: an equal share of this machine's cores.

        0 if OMP_NUM_THREADS is set or trials run on Slurm. PyTorch then chooses the number.
        """
        if self.kind == "slurm" or os.environ.get("OMP_NUM_THREADS"):
            return 0
        return max(len(os.sched_getaffinity(0)) // self.jobs, 1)

    def check(self) -> None:
        """Raises ConfigError if the number of jobs or GPUs is impossible on this machine."""
        if self.jobs < 1:
            raise ConfigError(f"--jobs {self.jobs}: must be at least 1")
        gpus = torch.cuda.device_count()
        if self.num_gpus < 0 or (self.kind != "slurm" and self.num_gpus * self.jobs > gpus):
            raise ConfigError(
                f"--num-gpus {self.num_gpus} with --jobs {self.jobs}: this machine has only {gpus} "
                "GPUs"
            )

    def check_commands(self) -> None:
        """Raises ConfigError if trials run on Slurm and this machine lacks Slurm's commands."""
        missing = [command for command in SLURM_COMMANDS if shutil.which(command) is None]
        if self.kind == "slurm" and missing:
            raise ConfigError(
                f"--cluster slurm: {' and '.join(missing)} not found on PATH; run this on a login "
                "node of the cluster, or use --cluster local"
            )

    def submit(self, job: Callable[[], None], folder: Path, slot: int) -> submitit.Job[None]:
        """Starts one trial.

        Args:
            job: picklable function that runs the trial.
            folder: folder for the logs.
            slot: number from 0 to jobs - 1 that decides which GPUs the trial gets. Trials that run
                at the same time on this machine need different slots.

        Raises:
            ConfigError: if Slurm refuses the job. The message includes Slurm's reason.
        """
        executor = self._slurm(folder) if self.kind == "slurm" else self._local(folder, slot)
        try:
            with _stderr_to(folder / "controller.txt"):
                return executor.submit(job)
        except (FailedJobError, FailedSubmissionError) as error:
            raise ConfigError(f"sbatch refused a job: {one_line(error)}") from error

    def _local(self, folder: Path, slot: int) -> submitit.Executor:
        executor = submitit.LocalExecutor(folder)
        first = slot * self.num_gpus
        visible = tuple(range(first, first + self.num_gpus))
        # Local jobs need no time limit, but submitit requires one.
        year = 60 * 24 * 365
        executor.update_parameters(
            timeout_min=year, visible_gpus=visible, gpus_per_node=self.num_gpus
        )
        return executor

    def _slurm(self, folder: Path) -> submitit.Executor:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=100)
        wanted = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "gpus_per_node": self.num_gpus,
        }
        given = {name: value for name, value in wanted.items() if value}
        executor.update_parameters(time=self.minutes, **given)
        return executor
