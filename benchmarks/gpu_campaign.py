#!/usr/bin/env python3
"""Runs all measurements of this project that need a GPU.

Every part runs in a separate process, so a part that fails, hangs or loses the GPU does not stop
the others. The page always lists what was measured and what was not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.page import verdicts, write_page
from gpu.parts import BENCHMARKS, PARTS, Part

ROOT = BENCHMARKS.parent
DONE, FAILED, CUT_OFF, STOPPED = "done", "failed", "cut off", "stopped"

EPILOG = """
Parts:
{parts}

Examples:
  All parts, at most 25 minutes on one GPU (make gpu does this):
    python benchmarks/gpu_campaign.py
  The most important figures, at most 8 minutes:
    python benchmarks/gpu_campaign.py --quick
  Run two parts again and keep the results of the other parts:
    python benchmarks/gpu_campaign.py --part pooler --part kernel_variants
  Check without a GPU that everything runs, with tiny sizes and kernels in Triton's
  interpreter; the times are meaningless:
    python benchmarks/gpu_campaign.py --device cpu

Files in the folder of --output:
  campaign.md     verdict for each promise of the project, then the tables of all parts
  campaign.json   the same results in machine-readable form
  NAME.json, NAME.log, and traces, plots and pictures of the parts

Use an idle GPU. To report the results, attach campaign.md and campaign.json to an issue.
Exit codes: 0 all parts have finished; 1 a part failed or was cut off; 2 no GPU; 130 Ctrl-C.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    width = max(map(len, names))
    listed = "\n".join(
        f"  {x.name:{width}}  {x.what} (about {x.seconds} s, quick {x.quick_seconds} s)"
        for x in PARTS
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG.format(parts=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer measurements, 8 minutes")
    parser.add_argument(
        "--part", action="append", choices=names, metavar="NAME", help="only this part; repeatable"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/gpu"), metavar="DIR", help="created if missing"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args(argv)


def environment(device: str) -> dict[str, str]:
    """Returns the environment variables for the parts."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    paths = [str(BENCHMARKS), str(ROOT), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    variables.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return variables


def run_command(command: list[str], variables: dict[str, str], log: Path, seconds: float) -> int:
    """Runs a program and writes its output to a file.

    Returns:
        The exit code.

    Raises:
        subprocess.TimeoutExpired: if it takes too long; the program and its children are killed.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_part(part: Part, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Runs a part and returns its status and results. The results may be incomplete or None."""
    path, log = part.results(args.output), args.output / f"{part.name}.log"
    path.unlink(missing_ok=True)
    start, told = time.monotonic(), ""
    try:
        command = part.command(args.output, args.device, quick=args.quick)
        code = run_command(command, environment(args.device), log, seconds)
        status = DONE if code == 0 else FAILED
        if code != 0:
            told = f"exit code {code}: {last_line(log)}"
    except subprocess.TimeoutExpired:
        status, told = CUT_OFF, f"after {seconds:.0f} s: {last_line(log)}"
    except OSError as error:
        status, told = FAILED, str(error)
    except KeyboardInterrupt:
        status, told = STOPPED, "by Ctrl-C"
    results = None
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        if status == DONE:
            status, told = FAILED, f"no results: {error}"
    taken = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": taken, "told": told, "results": results}


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n") if log.is_file() else []
    return next((x.strip()[:300] for x in reversed(lines) if x.strip()), "no output")


def write(campaign: dict[str, Any], folder: Path) -> None:
    campaign["verdicts"] = verdicts(campaign["parts"])
    (folder / "campaign.json").write_text(json.dumps(campaign, indent=1) + "\n")
    (folder / "campaign.md").write_text(write_page(campaign))


def earlier_parts(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the results of an earlier campaign in the folder, if only some parts run now."""
    path = args.output / "campaign.json"
    if not (args.part and path.is_file()):
        return {}
    earlier = json.loads(path.read_text())
    return earlier["parts"] if earlier["device"] == args.device else {}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.output = args.output.resolve()
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(
                "gpu_campaign.py: PyTorch finds no GPU; check nvidia-smi and torch.version.cuda, "
                "or try --device cpu",
                file=sys.stderr,
            )
            return 2
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if not args.part or part.name in args.part]
    campaign: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["gpu_campaign.py", *(sys.argv[1:] if argv is None else argv)]),
        "device": args.device,
        "parts": earlier_parts(args),
    }
    shares = [part.quick_seconds if args.quick else part.seconds for part in chosen]
    end = time.monotonic() + sum(shares)
    for index, part in enumerate(chosen):
        # A part may also use the time that earlier parts did not need.
        seconds = end - time.monotonic() - sum(shares[index + 1 :])
        left = int(end - time.monotonic())
        print(
            f"[{index + 1}/{len(chosen)}] {part.name}: {part.what}; at most {seconds:.0f} s, "
            f"{left // 60}:{left % 60:02} left in total",
            flush=True,
        )
        outcome = campaign["parts"][part.name] = run_part(part, args, seconds)
        print(f"    {outcome['status']} in {outcome['seconds']} s {outcome['told']}", flush=True)
        write(campaign, args.output)
        if outcome["status"] == STOPPED:
            break
    for row in campaign["verdicts"]:
        print(f"{row['verdict']:12}  {row['promise']}: {row['figure']}")
    print(
        f"to report the results, attach {args.output / 'campaign.md'} and campaign.json to an issue"
    )
    found = [campaign["parts"][x.name]["status"] for x in chosen if x.name in campaign["parts"]]
    return 130 if STOPPED in found else int(any(x != DONE for x in found))


if __name__ == "__main__":
    sys.exit(main())
