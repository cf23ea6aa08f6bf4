"""What the benchmarks share: times, peak memory, and what they were measured on."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision

from mask_head_plugin.machine import cpu_name

SPIN = "import os\nwhile os.getppid() == {}: sum(range(10**6))"
"""A program that keeps one processor busy until its parent ends."""


def add_busy_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--busy",
        type=int,
        default=0,
        metavar="N",
        help="measure while N other processes keep a processor busy each",
    )


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Runs processes that compute without a pause, as a loader's worker or another job does."""
    command = [sys.executable, "-c", SPIN.format(os.getpid())]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def median_times(
    steps: list[Callable[[], object]],
    repeats: int,
    device: str,
    *,
    busy: int = 0,
    warm_up: bool = True,
) -> list[float]:
    """Runs some steps in turn, several times, and returns the median milliseconds of each.

    Args:
        steps: what to time.
        repeats: rounds that count.
        device: ``cpu`` or ``cuda``.
        busy: other processes that compute all the while.
        warm_up: whether a first round does not count.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[list[float]] = [[] for _ in steps]
    with busy_processes(busy):
        for _ in range(repeats + warm_up):
            for step, seconds in zip(steps, times, strict=True):
                wait()
                start = time.perf_counter()
                step()
                wait()
                seconds.append(time.perf_counter() - start)
    return [1e3 * statistics.median(seconds[warm_up:]) for seconds in times]


def peak_resident_megabytes(step: Callable[[], object]) -> float:
    """Returns how much the process's memory grows at most during a step, sampled.

    Sees what libraries other than PyTorch allocate, too; on Linux.
    """
    statm, page, done = Path("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE"), threading.Event()
    sizes = [int(statm.read_text().split()[1])]

    def sample() -> None:
        while not done.wait(0.002):
            sizes.append(int(statm.read_text().split()[1]))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        step()
    finally:
        done.set()
        sampler.join()
    return (max(sizes) - sizes[0]) * page / 1e6


def machine(device: str) -> dict[str, object]:
    """Returns what a reader needs to judge the figures."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
    }


def write_results(
    results: dict[str, Any], path: Path, plot: Callable[[list[dict[str, Any]], Path], None]
) -> None:
    """Writes results as JSON and, by ``plot``, their ``rows`` as a picture beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    picture = path.with_suffix(".png")
    plot(results["rows"], picture)
    print(f"written to {path} and {picture}")
