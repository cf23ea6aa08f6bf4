"""The device that a config is for, and how large an image it can train on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

BYTES_PER_PIXEL = 3000
"""Bytes per pixel of the image in a training step with float32. EfficientNet-Lite0 takes as much on
a CPU, R50-FPN half of it on a GPU (3.4 GB for two images, by detectron2's model zoo).
"""
USABLE = 0.6
"""Share of the memory that a step may take; the rest is for crowded images, which need more."""
UNKNOWN_GPU = 8e9
"""Assumed bytes of a GPU that is not in this machine: most have more."""
MOST_CORES = 16
"""More would hardly make a CPU's small model faster."""


@dataclass(frozen=True)
class Device:
    """Where a config will be trained.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        is_here: whether this machine has it.
        memory: bytes of the GPU or of the machine.
        cores: how many this process may use.
    """

    kind: str
    is_here: bool
    memory: float
    cores: int

    @property
    def batch_size(self) -> int:
        """Images in a step, if memory allows: on a CPU, more would only make steps longer."""
        return 8 if self.kind == "cuda" else 2

    @property
    def usual_short_edge(self) -> int:
        """The shorter side of images if no object needs more; on a GPU, detectron2's."""
        return 800 if self.kind == "cuda" else 448

    @property
    def view_pixels(self) -> float:
        """The most pixels of an image, or of a crop, in training."""
        usual = 1.6e6 if self.kind == "cuda" else 512.0**2
        return min(usual, self.memory * USABLE / BYTES_PER_PIXEL / 2)

    @property
    def crop_side(self) -> int:
        """The side of a crop that is fast but still has context."""
        return 800 if self.kind == "cuda" else 320

    @property
    def image_pixels(self) -> float:
        """The most pixels of a whole image in evaluation, which keeps no activations."""
        return 4 * self.view_pixels

    def fitting_batch(self, view_pixels: float) -> int:
        """Returns how many images of that many pixels a training step can have."""
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
        kind: ``cpu`` or ``cuda``; None for the GPU if there is one.
    """
    cores = min(len(os.sched_getaffinity(0)), MOST_CORES)
    has_gpu = torch.cuda.is_available()
    if kind == "cpu" or (kind is None and not has_gpu):
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return Device("cpu", True, memory, cores)
    memory = torch.cuda.get_device_properties(0).total_memory if has_gpu else UNKNOWN_GPU
    return Device("cuda", has_gpu, memory, cores)
