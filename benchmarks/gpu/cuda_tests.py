#!/usr/bin/env python3
"""Runs the tests that need a GPU, and reports how many pass, which fail, and why."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from measure import machine, write_json

ROOT = Path(__file__).resolve().parents[2]
MARK = "cuda"


def files_with_gpu_tests() -> list[str]:
    """Returns the test files that use the marker, so pytest need not import all the others."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(x.relative_to(ROOT)) for x in files if f"mark.{MARK}" in x.read_text()]


def read_report(path: Path) -> list[dict[str, Any]]:
    """Reads a JUnit file and returns the outcome of each test, with the reason in one line."""
    rows = []
    for case in ElementTree.parse(path).iter("testcase"):
        outcome, told = "passed", ""
        for kind in ("failure", "error", "skipped"):
            found = case.find(kind)
            if found is not None:
                outcome = {"failure": "failed", "error": "failed"}.get(kind, kind)
                told = (found.get("message") or found.text or "").strip().split("\n")[0][:300]
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        rows.append({"test": name, "outcome": outcome, "told": told})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument(
        "--files", nargs="+", metavar="FILE", help="default: all files with tests that need a GPU"
    )
    args = parser.parse_args()
    report = args.output.with_suffix(".xml").resolve()
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", MARK]
    command += ["--junit-xml", str(report), *(args.files or files_with_gpu_tests())]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not report.is_file():
        sys.exit(f"pytest wrote no report; exit code {code}")
    tests = read_report(report)
    counts = {
        outcome: sum(x["outcome"] == outcome for x in tests)
        for outcome in ("passed", "failed", "skipped")
    }
    failed = [x for x in tests if x["outcome"] == "failed"]
    write_json(
        {**machine(args.device), "counts": counts, "tests": tests, "rows": failed}, args.output
    )
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


if __name__ == "__main__":
    main()
