#!/usr/bin/env python3
"""Profiles a training step of detectron2's model and of the plugin's.

On CUDA, the plugin's model with channels-last weights is profiled as well. The rows are the kernels
that take the most device time according to PyTorch's profiler. Traces for chrome://tracing or
https://ui.perfetto.dev are written next to the JSON file. The model is R50-FPN with K = 80, on two
images of 512 px.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mask_branch import step_sides
from measure import add_tiny_argument, machine, synchronizer, write_json
from torch.profiler import ProfilerActivity, profile

NUM_CLASSES, NUM_ROWS = 80, 20


def profile_step(
    step: Callable[[], object], num_steps: int, device: str, trace: Path
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Returns the longest kernels of a step, and the times of the step in milliseconds."""
    wait = synchronizer(device)
    for _ in range(3):
        step()
    wait()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(num_steps):
            step()
        wait()
        seconds = time.perf_counter() - start
    profiler.export_chrome_trace(str(trace))
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # On CUDA, the time of an operator includes that of its kernels, so only kernels are counted.
    events = [
        x
        for x in profiler.key_averages()
        if device != "cuda" or str(x.device_type).endswith("CUDA")
    ]
    milliseconds = {x.key: getattr(x, attribute) / 1e3 / num_steps for x in events}
    total = sum(milliseconds.values())
    longest = sorted(events, key=lambda x: -milliseconds[x.key])[:NUM_ROWS]
    rows = [
        {
            "kernel": x.key[:120],
            "calls a step": round(x.count / num_steps, 1),
            "ms a step": round(milliseconds[x.key], 3),
            "share": f"{milliseconds[x.key] / max(total, 1e-9):.1%}",
        }
        for x in longest
    ]
    launches = sum(x.count for x in events) / num_steps
    times = {
        "ms of a step, profiled": round(1e3 * seconds / num_steps, 2),
        "ms of all kernels of a step": round(total, 2),
        "kernels of a step": round(launches),
    }
    return rows, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    add_tiny_argument(parser)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {**machine(args.device), "amp": args.amp, "steps": [], "rows": []}
    for side, step in step_sides(NUM_CLASSES, args.amp, args.sizes, args.device).items():
        trace = args.output.with_name(f"{args.output.stem}_{side}.trace.json.gz")
        rows, times = profile_step(step, args.sizes.profiled_steps, args.device, trace)
        results["steps"].append({"side": side, **times, "trace": trace.name})
        results["rows"] += [{"side": side, **row} for row in rows]
        print(results["steps"][-1], flush=True)
        write_json(results, args.output)


if __name__ == "__main__":
    main()
