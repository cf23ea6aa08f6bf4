"""Functions that the benchmarks share: sizes, times, peak memory, and the machine."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision

from mask_head_plugin.machine import cpu_name


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs that the benchmarks use.

    Attributes:
        image_hw: size of the images for RoI pooling and of bit masks.
        num_channels: channels of the maps.
        rois_per_image: RoIs that are pooled per image.
        roi_sides: smallest and largest side of a RoI, in pixels.
        pooled_sides: sides of the pooled RoIs, in bins.
        head_rois: RoIs in the mask head.
        step_side: side of the square images of a training step and of inference, in pixels.
        large_step_side: side of the images of a training step that keeps a GPU busy.
        output_images: height and width of the images for which masks are encoded.
        output_counts: numbers of masks in one of these images.
        exact_sides: values of k for RoIs whose side is exactly k times the pooled side.
        profiled_steps: training steps in a trace.
        model_opts: options that change the config of R50-FPN.
    """

    image_hw: tuple[int, int] = (800, 1333)
    num_channels: int = 256
    rois_per_image: int = 256
    roi_sides: tuple[int, int] = (16, 600)
    pooled_sides: tuple[int, ...] = (7, 14)
    head_rois: int = 128
    step_side: int = 512
    large_step_side: int = 800
    output_images: tuple[tuple[int, int], ...] = ((480, 640), (1080, 1920), (8000, 8000))
    output_counts: tuple[int, ...] = (100, 700)
    exact_sides: tuple[int, ...] = tuple(range(1, 65))
    profiled_steps: int = 3
    model_opts: tuple[str, ...] = ()


FULL = Sizes()
TINY = Sizes(
    image_hw=(32, 48),
    num_channels=3,
    rois_per_image=1,
    roi_sides=(8, 12),
    pooled_sides=(1,),
    head_rois=2,
    step_side=64,
    large_step_side=96,
    output_images=((48, 64),),
    output_counts=(3,),
    exact_sides=(1,),
    profiled_steps=1,
    model_opts=(
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.FPN.OUT_CHANNELS", "16"),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
        *("MODEL.RPN.PRE_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "5"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
        *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "2"),
        *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "4"),
    ),
)


def add_tiny_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tiny",
        dest="sizes",
        action="store_const",
        const=TINY,
        default=FULL,
        help="tiny sizes, to check quickly that the script works; the times are meaningless",
    )


SPIN = "import os\nwhile os.getppid() == {}: sum(range(10**6))"
"""A program that keeps one processor busy until its parent ends."""


def add_busy_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--busy",
        type=int,
        default=0,
        metavar="N",
        help="measure while N other processes each keep a processor busy",
    )


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Runs processes that compute without a pause, like a data loader worker or another job."""
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
    warm_up: int = 1,
) -> list[float]:
    """Runs the steps in turn for several rounds; returns the median milliseconds of each.

    Args:
        steps: the functions to time.
        repeats: rounds that are measured.
        device: ``cpu`` or ``cuda``.
        busy: number of other processes that compute at the same time.
        warm_up: rounds before the measurement, in which kernels are compiled and cuDNN chooses its
            algorithms.
    """
    wait = synchronizer(device)
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


def synchronizer(device: str) -> Callable[[], None]:
    """Returns a function that waits until the device has finished its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def peak_resident_megabytes(step: Callable[[], object]) -> float:
    """Returns the largest growth of the process's memory during a step.

    The memory is sampled, and includes allocations by libraries other than PyTorch. Linux only.
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
    """Returns the facts about the machine that readers need to interpret the measurements."""
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


def write_json(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def write_results(
    results: dict[str, Any], path: Path, plot: Callable[[list[dict[str, Any]], Path], None]
) -> None:
    """Writes results as JSON and, next to the file, a picture of their ``rows`` by ``plot``."""
    write_json(results, path)
    picture = path.with_suffix(".png")
    plot(results["rows"], picture)
    print(f"written to {path} and {picture}")
