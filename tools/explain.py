#!/usr/bin/env python3
"""Draws what Mask R-CNN's stages do and what RoI pooling reads, on your image."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import flags

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "shapes" / "mask_rcnn_shapes.yaml"
WEIGHTS = ROOT / "checkpoints" / "mask_rcnn_shapes.safetensors"

EXAMPLES = """
Examples:
  The model of this repository on an embedded image:
    python tools/explain.py
  Your model on your image, with the second-best detection:
    python tools/explain.py --config-file configs/mine/photos.yaml \\
        --weights output/run1/model_final.pth --input photo.jpg --detection 2 \\
        --output output/explained

Files in the folder of --output, as PNG and SVG, as wide as a page (see docs/explain.md):
  stages         From region proposals to a mask: the paper's Figure 1 on your image.
  roi_pooling    What RoIPool, RoIWarp, RoIAlign and PrROIPool read from the map for one box, and
                 how far rounding moves it, in pixels: the paper's Figure 3 on your image.
  competition    With --softmax-weights: the probability of each class at a pixel if masks are
                 independent, and if they compete (the paper's Table 2b).
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="the model's config")
    parser.add_argument("--weights", metavar="FILE", help="the model's weights")
    parser.add_argument("--input", metavar="IMAGE", help="your image (default: an embedded one)")
    folder = Path("output/explain")
    parser.add_argument(
        "--output", type=flags.path, default=folder, metavar="FOLDER", help=f"default {folder}"
    )
    parser.add_argument(
        "--detection",
        type=int,
        default=1,
        metavar="N",
        help="show the N-th best detection (default 1)",
    )
    parser.add_argument(
        "--bins",
        type=int,
        default=0,
        metavar="N",
        help="bins along each side in roi_pooling, 1 to 14 (default: bins about two cells wide)",
    )
    parser.add_argument(
        "--softmax-weights",
        default="",
        metavar="FILE",
        help="weights of a model whose masks compete",
    )
    flags.add_code(parser)
    flags.add_opts(parser)
    args = parser.parse_args()
    if bool(args.config_file) != bool(args.weights):
        parser.error("--config-file and --weights belong together: give both or neither")
    if args.input == "":  # for example "$image" in a shell where the variable is not set
        parser.error("--input is empty: name an image, or leave it out for an embedded one")
    return args


def main() -> int:
    args = parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.analysis.explanation.explain import explain
    from mask_head_plugin.config_imports import import_options

    try:
        written = explain(
            args.config_file or str(CONFIG),
            args.weights or str(WEIGHTS),
            args.input or "",
            args.output,
            opts=[*import_options(args.imports), *args.opts],
            detection=args.detection,
            num_bins=args.bins,
            softmax_weights=args.softmax_weights,
        )
    except (ConfigError, OSError) as error:
        print(f"explain.py: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    if not args.softmax_weights:
        print(
            "for competition.png, add --softmax-weights; "
            "docs/explain.md shows how to train that model"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
