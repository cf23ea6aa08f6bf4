"""Flags that several tools share. Heavy imports are avoided, so ``--help`` is fast.

Importing this module puts its checkout first on the import path. So every tool runs the code next
to it, even if another checkout is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

# train_net.py defines its own flags, so that it also runs when copied on its own.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_net import add_code as add_code
from train_net import add_run as add_run

KEY = re.compile(r"[A-Z0-9_]+(\.[A-Z0-9_]+)+|OUTPUT_DIR|SEED")
"""A key of a config, such as SOLVER.MAX_ITER."""


class FlagsFirst(argparse.ArgumentParser):
    """A parser of flags followed by KEY VALUE pairs, which explains a wrong order."""

    def error(self, message: str) -> NoReturn:
        given = sys.argv[1:]
        keys = [k for k, text in enumerate(given) if KEY.fullmatch(text)]
        late = [text for text in given[keys[0] :] if text.startswith("--")] if keys else []
        super().error(f"{late[0]} must come before the KEY VALUE options" if late else message)


def add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the model's config")


def add_opts(parser: argparse.ArgumentParser) -> None:
    rest: dict[str, Any] = {"nargs": argparse.REMAINDER, "default": []}
    parser.add_argument("--opts", **rest, help="KEY VALUE pairs for the config; must come last")


def path(text: str) -> Path:
    """Returns the path that a flag names; an empty one would mean the current folder."""
    if not text:  # for example "$folder" in a shell where the variable is not set
        raise argparse.ArgumentTypeError("the path is empty; name one, or . for this folder")
    return Path(text)


def add_output(parser: argparse.ArgumentParser, metavar: str = "FOLDER") -> None:
    parser.add_argument(
        "--output", type=path, required=True, metavar=metavar, help="created if missing"
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Adds the input and output flags of the demo and of its counterpart for exported models."""
    parser.add_argument(
        "--input",
        "--video-input",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="images, videos, folders of either, or quoted patterns",
    )
    add_output(parser)
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="keep detections with a score above this (0 to 1; default 0.5)",
    )
    parser.add_argument(
        "--class-thresholds",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=SCORE",
        help="thresholds for single classes; tools/analyze.py finds the best ones",
    )
    parser.add_argument("--semantic", action="store_true", help="also write semantic maps")
