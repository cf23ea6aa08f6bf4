"""Chooses the length of training from the number of images and the speed of the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .device import Device

PASSES = 40
"""Number of passes over the images that suits a few hundred images with pretrained weights."""
LEAST_VIEWS, MOST_VIEWS = 24_000, 1_440_000
"""Limits on how many images or crops training sees. The lower limit allows for the heads, which
always start untrained. The upper limit is that of COCO's 1x schedule.
"""
CPU_MINUTES = 40
LEAST_ITERATIONS = 300
EVALUATIONS = 4
EVALUATION_SHARE = 0.25
"""Maximum time for evaluations, as a share of the training time."""
FORWARD_SHARE = 0.3
"""Time of a forward pass, as a share of the time of a training step."""


@dataclass(frozen=True)
class Schedule:
    """Length and periods of a training run.

    Attributes:
        batch_size: images per iteration.
        iterations: number of iterations.
        passes: number of passes over the images.
        warmup: warm-up iterations.
        period: iterations between evaluations, and between checkpoints.
        is_cut: whether the time limit for CPUs shortened the run.
    """

    batch_size: int
    iterations: int
    passes: float
    warmup: int
    period: int
    is_cut: bool


def choose_schedule(
    device: Device,
    num_images: int,
    view_pixels: float,
    evaluated_pixels: float,
    pixels_per_second: float,
) -> Schedule:
    """Returns the schedule for a data set.

    Args:
        device: the device to train on.
        num_images: number of training images.
        view_pixels: average number of pixels in a training image or crop.
        evaluated_pixels: total number of pixels in an evaluation.
        pixels_per_second: training speed of one core.
    """
    batch_size = device.fitting_batch(view_pixels)
    views = min(max(PASSES * num_images, LEAST_VIEWS), MOST_VIEWS)
    possible = math.inf
    if device.kind == "cpu":
        seconds = CPU_MINUTES * 60
        possible = pixels_per_second * device.cores * seconds / view_pixels
    steps = min(views, possible) / batch_size
    iterations = max(math.ceil(steps / 100) * 100, LEAST_ITERATIONS)
    share = FORWARD_SHARE * evaluated_pixels / (iterations * batch_size * view_pixels)
    evaluations = max(min(EVALUATIONS, int(EVALUATION_SHARE / share)), 1) if share else 1
    return Schedule(
        batch_size=batch_size,
        iterations=iterations,
        passes=iterations * batch_size / num_images,
        warmup=min(1000, iterations // 10),
        period=math.ceil(iterations / evaluations),
        is_cut=possible < views,
    )
