#!/usr/bin/env python3
"""Rewrites an ablation's report: report.md, report.html and their figures and tables."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import flags

EXAMPLES = """
tools/ablate.py writes the report when all trials have ended. Use this tool for a report on the
trials finished so far, or to change the number of draws.

Examples:
  python tools/report.py output/ablations/mask_loss
  Faster, with less precise intervals:
    python tools/report.py output/ablations/mask_loss --draws 200

Files in the folder (earlier reports are replaced):
  report.md    For a paper or a README: findings, the table with costs, the results in the Mask
               R-CNN paper.
  report.html  One file that works offline: a table that you can sort, differences with their
               intervals, learning curves, classes, precision and recall, and the images on which
               the variants disagree most. Needs pip install -e '.[report]'.
  report.csv, report.tex            The table for programs and for LaTeX (booktabs).
  intervals, other-metrics, learning, classes, precision-recall   The figures as .svg and .pdf.

With two or more seeds, the interval of a difference covers the noise of the validation images and
of training. With one seed, it covers only the images (docs/ablations.md). The report lists missing
and failed trials. It has no pictures if the images are not on this machine.

Exit code: 0; 2 if no report can be written.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="an ablation's folder, with ablation.json"
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=1000,
        metavar="N",
        help="number of times that images are resampled for an interval (default 1000)",
    )
    flags.add_code(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.ablation.report import write_report
    from mask_head_plugin.config_imports import resolve_imports
    from mask_head_plugin.user_code import import_modules

    logging.basicConfig(level=logging.WARNING, format="report.py: %(message)s")
    logging.getLogger("mask_head_plugin").setLevel(
        logging.INFO
    )  # shows progress: COCO takes minutes
    try:
        import_modules(resolve_imports(args.imports, "--import"))
        write_report(args.directory, args.draws)
    except (ConfigError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.directory / 'report.md'}, {args.directory / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
