"""The machine: the name of its processor, the memory that a step uses, and float32 without TF32."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def cpu_name() -> str:
    """Returns the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def peak_megabytes(step: Callable[[], object], device: str) -> float:
    """Returns the peak memory that PyTorch allocates while ``step`` runs, in MB.

    On CUDA, it is read from the allocator; on the CPU, it is read from the profiler.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # hides messages about its start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    kineto: Any = profiler.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events), default=0) / 1e6


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Makes CUDA compute in float32 instead of TF32, which has a mantissa of only 10 bits.

    PyTorch's convolutions use TF32 by default. With TF32, the algorithms for different memory
    layouts agree to only three digits.
    """
    backends: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
