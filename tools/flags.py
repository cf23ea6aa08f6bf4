"""Flags that several tools have. It imports nothing heavy: ``--help`` needs no PyTorch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the model's config")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of detectron2's train_net.py: what to do, and in how many processes."""
    parser.add_argument("--resume", action="store_true", help="from the run's last checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs on each machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="machines in total (default 1)")
    parser.add_argument(
        "--machine-rank", type=int, default=0, help="number of this machine, from 0"
    )
    port = 2**15 + 2**14 + hash(os.getuid()) % 2**14  # as detectron2: one for each user
    url = f"tcp://127.0.0.1:{port}"
    parser.add_argument("--dist-url", default=url, help="tcp://host:port of machine 0, if several")


def add_code(parser: argparse.ArgumentParser) -> None:
    """Adds ``--import``, whose values ``config_imports.import_options`` takes as ``imports``."""
    code: dict[str, Any] = {"dest": "imports", "action": "append", "default": [], "metavar": "CODE"}
    parser.add_argument("--import", **code, help="module or .py file of yours to run; repeatable")


def add_opts(parser: argparse.ArgumentParser) -> None:
    rest: dict[str, Any] = {"nargs": argparse.REMAINDER, "default": []}
    parser.add_argument("--opts", **rest, help="KEY VALUE pairs of the config, after all flags")


def add_output(parser: argparse.ArgumentParser, metavar: str = "FOLDER") -> None:
    parser.add_argument(
        "--output", type=Path, required=True, metavar=metavar, help="created if missing"
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Adds what the demo and its counterpart for exported models read and write."""
    parser.add_argument(
        "--input",
        "--video-input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, videos, folders of them, or patterns in quotes",
    )
    add_output(parser)
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="detections need a higher score (0 to 1; default 0.5)",
    )
    parser.add_argument(
        "--class-thresholds",
        nargs="+",
        default=[],
        metavar="NAME=SCORE",
        help="classes that need another score; tools/analyze.py finds the best ones",
    )
    parser.add_argument("--semantic", action="store_true", help="also write semantic maps")
