"""Starts the processes of a run, with detectron2's flags or with torchrun, on GPUs or CPUs.

In each process, the same function reads the environment variables that torchrun sets. With
detectron2's flags, the processes are started by ``torch.distributed.launcher``, which torchrun
itself uses.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from ..config import ConfigError
from .guards import TrainingError
from .interruption import Interrupted

logger = logging.getLogger(__name__)

WORKER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun, and optionally submitit, sets in the processes of a run."""

NO_ID = "none"
"""torchrun's default for --rdzv-id."""

RUN_ID_FILE = "torchrun_id"

FOLLOWERS_DELAY = 2.0
"""Seconds that a failing process waits, so that the launcher first notices the process that failed
before it. The launcher needs only about 0.1 s for this.
"""


class RankError(RuntimeError):
    """A process of a run failed or was killed. The message contains its rank and its error."""


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
    *,
    device: str = "cuda",
) -> None:
    """Calls ``main_func(*args)`` in each process of a run, like detectron2's ``launch``.

    In a process started by torchrun, calls ``main_func`` directly, regardless of the numbers below.
    Otherwise, starts the processes or, if there is only one, calls ``main_func`` in this process.

    Differs from detectron2: it also works without GPUs. If one process fails, all processes end,
    and its error is raised here. On a single machine, a free port is chosen, so that two runs can
    use the same machine.

    Args:
        main_func: the function to call. It must be picklable, and so must ``args``.
        num_gpus_per_machine: number of processes on each machine.
        num_machines: number of machines.
        machine_rank: number of this machine, 0 to num_machines - 1.
        dist_url: ``tcp://host:port`` of machine 0; required for several machines.
        args: arguments of main_func.
        timeout: how long a process waits for the others, at the start and in each exchange.
        device: MODEL.DEVICE. Processes communicate through NCCL on ``cuda``, and through gloo on
            ``cpu`` or without a GPU.

    Raises:
        ConfigError: if the numbers contradict each other or there are too few GPUs. Also if a
            process raised a ConfigError; the message then starts with the process's rank.
        TrainingError: if a process raised it.
        Interrupted: after Ctrl-C. With several processes, no checkpoint is written.
        RankError: if a process was killed, or if it failed for another reason. In the second case,
            the message includes the traceback.
    """
    num_processes = process_count(num_gpus_per_machine, num_machines, device)
    if is_worker():
        record(_work)(main_func, args, device, timeout)
        return
    if num_processes == 1:
        main_func(*args)
        return
    config = _launch_config(num_gpus_per_machine, num_machines, machine_rank, dist_url, timeout)
    logger.info(
        "%d processes on this machine, %d in total, connected through %s",
        num_gpus_per_machine,
        num_processes,
        _backend(device),
    )
    try:
        with _quiet_launcher():
            elastic_launch(config, _work)(main_func, args, device, timeout)
    except ChildFailedError as error:
        raise _explain(error) from None
    except SignalException as error:  # the launcher has already ended the processes
        if error.sigval == signal.SIGINT:
            raise Interrupted from None
        raise SystemExit(128 + error.sigval) from None


def is_worker() -> bool:
    """Returns whether this process is one of several that were started for one run."""
    return all(key in os.environ for key in WORKER_KEYS)


def process_rank() -> int:
    """Returns this process's rank in the run, even before detectron2 is initialised."""
    return int(os.environ["RANK"]) if is_worker() else 0


def process_count(num_gpus_per_machine: int, num_machines: int, device: str) -> int:
    """Returns the number of processes in a run, as given by torchrun or by the flags.

    Raises:
        ConfigError: if this machine cannot run its share of the processes.
    """
    if is_worker():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        if num_gpus_per_machine not in (1, here):
            raise ConfigError(
                f"--num-gpus is {num_gpus_per_machine}, but torchrun has started {here} processes "
                "on this machine; remove the flag"
            )
        _check_processes(f"torchrun --nproc-per-node {here}", here, device)
        return int(os.environ["WORLD_SIZE"])
    _check_processes(f"--num-gpus {num_gpus_per_machine}", num_gpus_per_machine, device)
    return num_gpus_per_machine * num_machines


@contextlib.contextmanager
def first_on_machine() -> Iterator[None]:
    """Lets the first process on each machine run a block of code before the others run it.

    The other processes can then use its results, and an error is printed only once. This works even
    before the processes form a group.
    """
    if not is_worker():
        yield
        return
    machine = int(os.environ["RANK"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    key = f"first_on_machine/{machine}"
    if os.environ["LOCAL_RANK"] != "0":
        _store().wait([key], DEFAULT_TIMEOUT)
    yield
    _store().set(key, "done")


def restarted(output_dir: str) -> bool:
    """Returns whether torchrun has started this run before. If so, the run must resume.

    torchrun restarts processes with the same command after a failure, and when machines join or
    leave. A file in OUTPUT_DIR records the ID that torchrun gave the run. All processes must call
    this function.

    Args:
        output_dir: OUTPUT_DIR, which must exist.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", NO_ID)
    path = Path(output_dir) / RUN_ID_FILE
    # torchrun does not count restarts that it makes because machines joined or left, but the run
    # keeps its ID.
    known = run_id != NO_ID and path.is_file() and path.read_text() == run_id
    # A machine that has just joined counts its restarts from 0.
    again = any(comm.all_gather(known or _restart_count() > 0))
    if comm.is_main_process() and run_id != NO_ID:
        path.write_text(run_id)
    return again


def _restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@functools.cache
def _store() -> Store:
    """Returns the store in which the processes of a run exchange their addresses.

    torchrun's store survives a restart and still contains the addresses of the ended processes, so
    each start uses its own prefix.
    """
    store = next(rendezvous("env://", timeout=DEFAULT_TIMEOUT))[0]
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return PrefixStore(f"start_{_restart_count()}", store) if of_torchrun else store


def _backend(device: str) -> str:
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return "nccl" if on_gpu else "gloo"


def _check_processes(flag: str, num_processes: int, device: str) -> None:
    """Raises ConfigError unless this machine can run that many processes."""
    if num_processes < 1:
        raise ConfigError(f"{flag}: it must be at least 1")
    if num_processes == 1:
        return
    if _backend(device) == "gloo":
        cores = max(os.cpu_count() or 1, 2)  # two processes are always allowed, for testing
        if num_processes > cores:
            raise ConfigError(
                f"{flag}: without GPUs, each process needs a core; this machine can run {cores}"
            )
        return
    if num_processes > torch.cuda.device_count():
        raise ConfigError(
            f"{flag}: this machine has {torch.cuda.device_count()} GPUs; lower the number, or set "
            "MODEL.DEVICE cpu"
        )
    if torch.device(device).index is not None:
        raise ConfigError(
            f"MODEL.DEVICE {device} is a single GPU; set it to cuda for {num_processes} processes"
        )


def _check_machines(world_size: int, on_this_machine: int) -> None:
    """Raises ConfigError unless the machines have equal process counts and can be restarted."""
    if world_size % on_this_machine:
        raise ConfigError(
            f"{on_this_machine} of {world_size} processes are on this machine; give each machine "
            "the same --nproc-per-node"
        )
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if shared and restarts and world_size > on_this_machine:
        # Machines may count restarts differently, so the count cannot identify a restart.
        raise ConfigError(
            f"torchrun --max-restarts {restarts} on several machines needs --rdzv-backend c10d "
            "and, in its environment, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )


def _launch_config(
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str | None,
    timeout: timedelta,
) -> LaunchConfig:
    """Returns the configuration that torch needs to start the processes of this machine."""
    configs = {"timeout": int(timeout.total_seconds())}
    if num_machines == 1:  # like torchrun --standalone
        backend, endpoint, address = "c10d", "localhost:0", "localhost"
    else:
        if not 0 <= machine_rank < num_machines:
            raise ConfigError(
                f"--machine-rank {machine_rank}: it must be 0 to {num_machines - 1} with "
                f"--num-machines {num_machines}"
            )
        scheme, _, endpoint = (dist_url or "").partition("://")
        host, _, port = endpoint.rpartition(":")
        if scheme != "tcp" or not host or not port.isdecimal():
            raise ConfigError(
                f"--dist-url {dist_url}: --num-machines {num_machines} needs tcp://host:port of "
                "machine 0"
            )
        logger.info("machine %d of %d joins the run at %s", machine_rank, num_machines, endpoint)
        backend, address = "static", None
        configs["rank"] = machine_rank
    return LaunchConfig(
        min_nodes=num_machines,
        max_nodes=num_machines,
        nproc_per_node=num_processes,
        run_id=NO_ID,
        rdzv_backend=backend,
        rdzv_endpoint=endpoint,
        rdzv_configs=configs,
        local_addr=address,
        max_restarts=0,
    )


def _work(
    main_func: Callable[..., Any], args: tuple[Any, ...], device: str, timeout: timedelta
) -> None:
    """Joins the process group and calls ``main_func(*args)``."""
    rank, world_size = process_rank(), int(os.environ["WORLD_SIZE"])
    on_this_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    if world_size == 1:
        main_func(*args)
        return
    _check_machines(world_size, on_this_machine)
    backend = _backend(device)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // on_this_machine, 1))
    dist.init_process_group(
        backend, store=_store(), rank=rank, world_size=world_size, timeout=timeout
    )
    comm.create_local_process_group(on_this_machine)
    comm.synchronize()
    try:
        main_func(*args)
    except ConfigError as error:
        raise ConfigError(f"rank {rank}: {error}") from error
    except TrainingError:
        raise
    except RuntimeError:
        # This error may be a consequence of another process's failure, which the launcher must
        # notice first.
        time.sleep(FOLLOWERS_DELAY)
        raise
    dist.destroy_process_group()


def _explain(error: ChildFailedError) -> ConfigError | TrainingError | RankError:
    """Returns the error of the process that failed first."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        memory = " (out of memory?)" if failure.signal_name() == "SIGKILL" else ""
        return RankError(
            f"rank {rank} was killed by {failure.signal_name()}{memory}; continue with --resume"
        )
    if not isinstance(failure.message, dict):
        return RankError(f"rank {rank} ended with exit code {failure.exitcode}")
    name, _, text = failure.message["message"].partition(": ")
    for known in (ConfigError, TrainingError):
        if name == known.__name__:
            return known(text)
    return RankError(f"rank {rank} failed\n{failure.message['extraInfo']['py_callstack'].strip()}")


@contextlib.contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keeps torch from logging a failure that ``launch`` raises, and restores signal handlers."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = [signal.getsignal(number) for number in signals]
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(signals, handlers, strict=True):
                signal.signal(number, handler)
