"""Starts the trials of an ablation: in processes of this machine, or as Slurm jobs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import submitit
import torch
from submitit.core.utils import FailedJobError, FailedSubmissionError

from ..config import ConfigError
from ..messages import one_line

SLURM_COMMANDS = ("sbatch", "srun")


@dataclass(frozen=True)
class Cluster:
    """Where trials run.

    Attributes:
        kind: "local" (processes on this machine), "slurm", or "debug" (in this process).
        jobs: how many trials run at once.
        num_gpus: of each trial; 0 for the CPU.
        partition: of Slurm; empty for its default, like the next two.
        account: the one that Slurm charges.
        qos: quality of service, by Slurm's name.
        minutes: time limit of a Slurm job; a job that reaches it, or is preempted, resumes from its
            checkpoint in a new one.
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
        """Threads of each trial: its share of this machine's cores.

        0 leaves it to PyTorch: if OMP_NUM_THREADS is set, and on Slurm's nodes.
        """
        if self.kind == "slurm" or os.environ.get("OMP_NUM_THREADS"):
            return 0
        return max(len(os.sched_getaffinity(0)) // self.jobs, 1)

    def check(self) -> None:
        """Raises ConfigError, naming flags of tools/ablate.py, if the numbers do not fit."""
        if self.jobs < 1:
            raise ConfigError(f"--jobs {self.jobs}: it must be at least 1")
        gpus = torch.cuda.device_count()
        if self.num_gpus < 0 or (self.kind != "slurm" and self.num_gpus * self.jobs > gpus):
            raise ConfigError(
                f"--num-gpus {self.num_gpus} for --jobs {self.jobs} at once: there are {gpus}"
            )

    def check_commands(self) -> None:
        """Raises ConfigError if this machine lacks the cluster's commands."""
        missing = [command for command in SLURM_COMMANDS if shutil.which(command) is None]
        if self.kind == "slurm" and missing:
            raise ConfigError(
                f"--cluster slurm: {' and '.join(missing)} not found on PATH; run this on a login "
                "node of the cluster, or with --cluster local"
            )

    def submit(self, job: Callable[[], None], folder: Path, slot: int) -> submitit.Job[None]:
        """Starts one trial.

        Args:
            job: must be picklable.
            folder: for its logs.
            slot: 0 to jobs - 1; trials that run at the same time on this machine have different
                slots, which decide their GPUs.

        Raises:
            ConfigError: if Slurm refuses the job, with its reason.
        """
        executor = self._slurm(folder) if self.kind == "slurm" else self._local(folder, slot)
        try:
            return executor.submit(job)
        except (FailedJobError, FailedSubmissionError) as error:
            raise ConfigError(f"sbatch refused a job: {one_line(error)}") from error

    def _local(self, folder: Path, slot: int) -> submitit.Executor:
        executor = submitit.LocalExecutor(folder)
        first = slot * self.num_gpus
        visible = tuple(range(first, first + self.num_gpus))
        # Local jobs have no time limit, but submitit wants one.
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
