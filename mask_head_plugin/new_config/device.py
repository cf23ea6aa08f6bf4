"""The device on which a config will be trained, and the limits that it sets for image sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

BYTES_PER_PIXEL = 3000
"""Memory in bytes per image pixel for a training step in float32. EfficientNet-Lite0 needs this
much on a CPU. R50-FPN needs half as much on a GPU (3.4 GB for two images, according to detectron2's
model zoo).
"""
USABLE = 0.6
"""Share of the memory that an average training step may use; crowded images need more."""
UNKNOWN_GPU = 8e9
"""Memory in bytes assumed for a GPU that is not in this machine; most GPUs have more."""
MOST_CORES = 16
"""Maximum number of cores to count; more would hardly speed up a small model."""


@dataclass(frozen=True)
class Device:
    """The device on which a config will be trained.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        is_here: whether this machine has the device.
        memory: memory of the GPU or the machine, in bytes.
        cores: number of CPU cores that this process may use.
    """

    kind: str
    is_here: bool
    memory: float
    cores: int

    @property
    def batch_size(self) -> int:
        """Images per batch, if memory allows. On a CPU, more would only make iterations longer."""
        return 8 if self.kind == "cuda" else 2

    @property
    def usual_short_edge(self) -> int:
        """The shorter side of images, unless objects need more; detectron2's default on a GPU."""
        return 800 if self.kind == "cuda" else 448

    @property
    def view_pixels(self) -> float:
        """Maximum number of pixels in a training image or crop."""
        usual = 1.6e6 if self.kind == "cuda" else 512.0**2
        return min(usual, self.memory * USABLE / BYTES_PER_PIXEL / 2)

    @property
    def crop_side(self) -> int:
        """The side of a training crop that is fast to train on but still includes context."""
        return 800 if self.kind == "cuda" else 320

    @property
    def image_pixels(self) -> float:
        """Maximum number of pixels of an image in evaluation, which stores no activations."""
        return 4 * self.view_pixels

    def fitting_batch(self, view_pixels: float) -> int:
        """Returns the largest batch of images with ``view_pixels`` pixels that fits into memory."""
        batch = self.batch_size
        while batch > 1 and batch * view_pixels * BYTES_PER_PIXEL > USABLE * self.memory:
            batch //= 2
        return batch

    def __str__(self) -> str:
        if self.kind == "cpu":
            return f"{self.cores} CPU cores"
        name = torch.cuda.get_device_name() if self.is_here else "a GPU"
        return f"{name} with {self.memory / 1e9:.0f} GB"


def find_device(kind: str | None) -> Device:
    """Returns a device.

    Args:
        kind: ``cpu`` or ``cuda``; None for a GPU if there is one, otherwise the CPU.
    """
    cores = min(len(os.sched_getaffinity(0)), MOST_CORES)
    has_gpu = torch.cuda.is_available()
    if kind == "cpu" or (kind is None and not has_gpu):
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return Device("cpu", True, memory, cores)
    memory = torch.cuda.get_device_properties(0).total_memory if has_gpu else UNKNOWN_GPU
    return Device("cuda", has_gpu, memory, cores)
