#!/usr/bin/env python3
"""Runs an exported model on images and videos, without PyTorch or detectron2."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import flags

EXAMPLES = """
Examples:
  A folder of images:
    python tools/predict.py --model output/exported --input datasets/shapes_v1/val \\
        --output output/predicted
  Images, patterns and videos together, confident detections only, with semantic maps:
    python tools/predict.py --model output/exported --input a.jpg 'photos/**/*.png' street.mp4 \\
        --output output/predicted --confidence-threshold 0.8 --semantic --batch-size 8

To install the packages that this tool needs, run
    pip install numpy pillow opencv-python-headless pycocotools tqdm onnxruntime
    pip install --no-deps .

Files in the folder of --output, where nothing is overwritten (the same as tools/demo.py writes):
  NAME               The image or video with masks, outlines and labels (boxes if the model has no
                     masks).
  predictions.json   A COCO file with scores and run-length masks.
  semantic/NAME.png  With --semantic; for a video, semantic/NAME/FRAME.png. A pixel is 0
                     (background) or the "semantic_value" of a category. Where objects overlap, the
                     category with the best score is used.
Exit code: 0; 1 if some inputs have no result or only part of one (the tool names them); 2 if the
tool could not run.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the folder that tools/export_model.py --format onnx wrote",
    )
    flags.add_inputs(parser)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="number of images or frames to read at a time (default 1)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of onnxruntime (default: one per core)"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # Importing the package registers it with an installed detectron2, which takes seconds and is
    # not needed here.
    sys.modules.setdefault("detectron2", None)  # type: ignore[arg-type]  # counts as not installed
    try:
        from mask_head_plugin.deploy.predict import run_predict
        from mask_head_plugin.messages import ConfigError
    except ImportError as error:
        print(f"predict.py: {error}; --help shows what to install", file=sys.stderr)
        return 2
    try:
        problems = run_predict(
            args.model,
            args.input,
            args.output,
            args.confidence_threshold,
            thresholds=args.class_thresholds,
            semantic=args.semantic,
            batch_size=args.batch_size,
            threads=args.threads,
        )
    except (ConfigError, ImportError, OSError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"predict.py: stopped; results so far are in {args.output}", file=sys.stderr)
        return 130
    for problem in problems:
        print(f"predict.py: {problem}", file=sys.stderr)
    print(f"results are in {args.output}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
