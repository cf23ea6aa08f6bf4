#!/usr/bin/env python3
"""Writes a config that fits your COCO files, with a reason for each value."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import flags  # noqa: F401  # imports the package of this checkout, not an installed one

EXAMPLES = """
Examples:
  From one file; a fifth of its photographs becomes validation data:
    python tools/new_config.py --train all.json --train-images images/ \\
        --output configs/mine/cells.yaml
  With your own validation data:
    python tools/new_config.py --train train.json --train-images train/ \\
        --val val.json --val-images val/ --output configs/mine/cells.yaml
  Then:
    python train_net.py --config-file configs/mine/cells.yaml

The files are checked as by tools/check_dataset.py, and no config is written if they have errors. A
comment at each key explains its value. Before the config is written, it is loaded, checked and
tried for a few iterations to estimate time and memory. docs/new_config.md has the rules.

Without --val, the images of --train are split, and the two parts are written next to the config as
cells.train.json and cells.val.json.
Exit code: 0; 2 if the arguments or the files are wrong.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train", type=Path, required=True, metavar="FILE", help="COCO instances file"
    )
    parser.add_argument(
        "--train-images",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder that file_name is relative to",
    )
    parser.add_argument("--val", type=Path, metavar="FILE", help="COCO file for validation")
    parser.add_argument(
        "--val-images", type=Path, metavar="DIR", help="images of --val (default: --train-images)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the config to write, .yaml"
    )
    parser.add_argument(
        "--split",
        type=float,
        metavar="SHARE",
        help="without --val: share of the images to use for validation (default: 0.2)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="device to train on (default: the GPU of this machine, if it has one)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    if args.val is None and args.val_images is not None:
        parser.error("--val-images needs --val")
    if args.val is not None and args.split is not None:
        parser.error("--split and --val both define the validation data; use only one of them")
    if args.split is not None and not 0 < args.split < 1:
        parser.error("--split takes a share between 0 and 1, such as 0.2")
    return args


def main() -> int:
    args = parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.new_config import DataFiles, Request, summary, write_new_config

    logging.basicConfig(level=logging.WARNING, format="new_config.py: %(message)s")
    # PyTorch's advice concerns detectron2's code, which you cannot change.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    val = args.val and DataFiles(args.val, args.val_images or args.train_images)
    request = Request(
        DataFiles(args.train, args.train_images),
        val,
        args.output,
        split_share=args.split or 0.2,
        seed=args.seed,
        device=args.device,
        overwrite=args.overwrite,
    )
    try:
        print(summary(write_new_config(request)))
    except (ConfigError, OSError) as error:
        print(f"new_config.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
