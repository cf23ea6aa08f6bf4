#!/usr/bin/env python3
"""Trains or evaluates the model of a config file, with the flags of detectron2's train_net.py."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

EXAMPLES = """
Examples:
  Train on the embedded data set, on a GPU if there is one:
    python train_net.py --config-file configs/shapes/mask_rcnn_shapes.yaml
  Train on COCO with 8 GPUs (either command):
    python train_net.py --num-gpus 8 --config-file configs/coco/mask_rcnn_R_50_FPN_1x.yaml
    torchrun --nproc-per-node 8 train_net.py --config-file configs/coco/mask_rcnn_R_50_FPN_1x.yaml
  Continue after an interruption:
    python train_net.py --resume --config-file ... OUTPUT_DIR output/run1
  Evaluate weights (.pth, .pkl or .safetensors):
    python train_net.py --eval-only --config-file ... MODEL.WEIGHTS output/run1/model_final.pth
Any config key may follow the flags: SOLVER.BASE_LR 0.005 SOLVER.MAX_ITER 20000
Results are in OUTPUT_DIR: log.txt, metrics.json, TensorBoard events, model_final.pth, inference/
and contact_sheet_*.png (validation images, ground truth next to predictions).
To see what the model gets wrong, and why: python tools/analyze.py OUTPUT_DIR
"""


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of detectron2's train_net.py: what to do, and in how many processes."""
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs on each machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="machines in total (default 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    port = 2**15 + 2**14 + hash(os.getuid()) % 2**14  # as in detectron2: one for each user
    url = f"tcp://127.0.0.1:{port}"
    parser.add_argument("--dist-url", default=url, help="tcp://host:port of the first machine")


def add_code(parser: argparse.ArgumentParser) -> None:
    """Adds ``--import``, whose values are in ``imports``; see config_imports.import_options."""
    code: dict[str, Any] = {"dest": "imports", "action": "append", "default": [], "metavar": "CODE"}
    parser.add_argument("--import", **code, help="your module or .py file to run; repeatable")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="your file, or one of configs/"
    )
    add_run(parser)
    add_code(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        # Imported after the flags are parsed: --help must not import PyTorch, which is slow.
        from mask_head_plugin.engine.run import run

        return run(args)
    except KeyboardInterrupt as stop:  # Ctrl-C
        print(f"train_net.py: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
