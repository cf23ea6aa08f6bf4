#!/usr/bin/env python3
"""Shows what a trained model gets wrong and why, and how much AP a better branch could gain."""

from __future__ import annotations

import argparse
import gc
import logging
import sys

import flags

EXAMPLES = """
Examples:
  A run of train_net.py, after its evaluation:
    python tools/analyze.py output/run1
  Any file in COCO's result format, from detectron2 or another tool:
    python tools/analyze.py results.json --annotations instances_val2017.json --images val2017
  What got better and worse compared with another run, with intervals:
    python tools/analyze.py output/run2 --compare output/run1

Files in the folder of --output (earlier files are replaced):
  analysis.html  One page that works offline: findings in words, the cost of each kind of error,
                 what perfect masks, boxes or classes would add, mask quality, curves, confusions,
                 pictures of the worst images and of each kind of error.
                 The page and the figures need pip install -e '.[report]'.
  analysis.md    Findings and tables, for a README.
  analysis.json  All numbers.
  analysis_tables/   Each table as .csv, and as .tex for a paper.
  analysis_figures/  Each figure as .svg and .pdf, for a paper.

Exit code: 0; 2 if files are missing or do not match.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=flags.path, metavar="RUN", help="a run's folder or a results file"
    )
    parser.add_argument(
        "--annotations", type=flags.path, metavar="FILE", help="COCO file (default: the run's file)"
    )
    parser.add_argument(
        "--images",
        type=flags.path,
        metavar="FOLDER",
        help="image folder for the pictures (default: found through the data set)",
    )
    parser.add_argument(
        "--dataset", default="", metavar="NAME", help="data set to analyse, if there are several"
    )
    parser.add_argument(
        "--output", type=flags.path, metavar="FOLDER", help="default: the folder of the results"
    )
    parser.add_argument(
        "--compare",
        type=flags.path,
        metavar="OTHER_RUN",
        help="the earlier run to compare with, on the same images",
    )
    parser.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="number of times that --compare resamples the images for its intervals (default 300)",
    )
    args = parser.parse_args()
    if args.draws is not None and args.compare is None:
        parser.error("--draws has no effect without --compare OTHER_RUN: add it, or remove --draws")
    return args


def main() -> int:
    args = parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.analysis import run_analysis

    logging.basicConfig(level=logging.WARNING, format="analyze.py: %(message)s")
    # No reference cycle keeps anything large in memory, and the search for cycles among the
    # millions of small objects from a large file would take a tenth of the time.
    gc.disable()
    try:
        folder = run_analysis(
            args.run,
            args.output,
            args.annotations,
            args.images,
            args.dataset,
            other=args.compare,
            num_draws=300 if args.draws is None else args.draws,
        )
    except (ConfigError, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    finally:
        gc.enable()
    print(f"{folder / 'analysis.md'}, {folder / 'analysis.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
