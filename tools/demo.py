#!/usr/bin/env python3
"""Runs a trained model on images and videos; writes overlays, a COCO file and semantic maps."""

from __future__ import annotations

import argparse
import sys

import flags

EXAMPLES = """
Examples:
  A folder of images with the checkpoint of this repository:
    python tools/demo.py --config-file configs/shapes/mask_rcnn_shapes.yaml \\
        --input datasets/shapes_v1/val --output output/demo \\
        --opts MODEL.WEIGHTS checkpoints/mask_rcnn_shapes.safetensors
  Images, patterns and videos together, confident detections only, with semantic maps:
    python tools/demo.py --config-file ... --input a.jpg 'photos/**/*.png' street.mp4 \\
        --output output/demo --confidence-threshold 0.8 --semantic --opts MODEL.WEIGHTS ...

Files in the folder of --output, where nothing is overwritten:
  NAME               The image or video with masks, outlines and labels (boxes if the model has no
                     masks). Labels that would hide small objects are left out. If two inputs have
                     the same name, the second becomes NAME_2. A video is .avi if the input is .avi
                     or has an odd size, otherwise .mp4; it has no sound and a constant frame rate.
                     Class names come from the weights; you do not need a data set.
  predictions.json   A COCO file that pycocotools' COCO opens: "images" with file_name and, for a
                     video, frame (from 0); "categories"; "annotations" with category_id,
                     category_name, score, mask_score (if the model has mask scoring), bbox
                     [x, y, width, height], segmentation (run lengths) and area.
  semantic/NAME.png  With --semantic; for a video, semantic/NAME/FRAME.png. A pixel is 0
                     (background) or the "semantic_value" of a category. Where objects overlap, the
                     category with the best score is used. Files have 8 bits, or 16 bits with more
                     than 255 classes.
Exit code: 0; 1 if some inputs have no result or only part of one (the tool names them); 2 if the
demo could not run.
"""


def parse_args() -> argparse.Namespace:
    parser = flags.FlagsFirst(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_config_file(parser)
    flags.add_inputs(parser)
    flags.add_code(parser)
    flags.add_opts(parser)
    parser.add_argument(
        "pairs",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys, as after --opts",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.config_imports import import_options
    from mask_head_plugin.demo import run_demo

    opts = [*import_options(args.imports), *args.opts, *args.pairs]
    try:
        problems = run_demo(
            args.config_file,
            opts,
            args.input,
            args.output,
            args.confidence_threshold,
            thresholds=args.class_thresholds,
            semantic=args.semantic,
        )
    except (ConfigError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"demo.py: stopped; results so far are in {args.output}", file=sys.stderr)
        return 130
    for problem in problems:
        print(f"demo.py: {problem}", file=sys.stderr)
    print(f"results are in {args.output}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
