#!/usr/bin/env python3
"""Describes the environment of gpu_campaign.py: GPU, driver, versions, code."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import torch
from measure import machine, write_json

ROOT = Path(__file__).resolve().parents[2]


def output_of(*command: str) -> str:
    """Returns the output of a program, "none" if it is empty, or the reason why it failed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    if done.returncode != 0:
        return f"unknown: exit code {done.returncode}: {(done.stdout or done.stderr).strip()}"
    return done.stdout.strip() or "none"


def describe(device: str) -> dict[str, Any]:
    try:
        import triton

        version = triton.__version__
    except ImportError as error:
        version = f"not installed: {error}"
    found: dict[str, Any] = {
        **machine(device),
        "triton": version,
        "cuda": torch.version.cuda,
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed files": output_of("git", "status", "--porcelain", "--untracked-files=no"),
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "TF32 in matrix products": torch.backends.cuda.matmul.allow_tf32,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
        found |= {
            "gpus": torch.cuda.device_count(),
            "compute capability": f"{gpu.major}.{gpu.minor}",
            "memory of the GPU, GB": round(gpu.total_memory / 1e9, 1),
            "multiprocessors": gpu.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
            query: output_of(
                "nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"
            ),
            "other processes": output_of(
                "nvidia-smi",
                "-i",
                "0",
                "--query-compute-apps=pid,used_memory",
                "--format=csv,noheader",
            ),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    args = parser.parse_args()
    rows = [{"what": what, "value": value} for what, value in describe(args.device).items()]
    for row in rows:
        print(f"{row['what']}: {row['value']}")
    write_json({"rows": rows}, args.output)


if __name__ == "__main__":
    main()
