#!/usr/bin/env python3
"""Exports a trained model as ONNX, TorchScript or torch.export, to run without its Python code."""

from __future__ import annotations

import argparse
import logging
import sys

import flags

EXAMPLES = """
Examples:
  The checkpoint of this repository as ONNX:
    python tools/export_model.py --config-file configs/shapes/mask_rcnn_shapes.yaml \\
        --weights checkpoints/mask_rcnn_shapes.safetensors --format onnx --output output/onnx
  For a fixed image size and another score threshold, compared on your own images:
    python tools/export_model.py --config-file ... --weights ... --format onnx \\
        --output output/onnx --size 800 1344 --images photos/*.jpg \\
        --opts MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.3
  With 8-bit layers, calibrated on images of DATASETS.TRAIN and compared on DATASETS.TEST:
    python tools/export_model.py --config-file ... --weights ... --format onnx \\
        --output output/int8 --precision int8

Files in the folder of --output:
  model.onnx, model.torchscript.pt or model.pt2
                     The model: takes a resized image; returns boxes, scores, classes, mask
                     probabilities and, with mask scoring, mask scores. See docs/deploy.md.
  model.json         Class names, how to resize images, thresholds, how to paste masks, versions,
                     hashes of the model and of the weights.
The exported model is run on images and compared with the trained one. It is kept only if both
agree.
Exit code: 0; 2 if a setting, a file or the model cannot be used; 130 after Ctrl-C.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_config_file(parser)
    parser.add_argument("--weights", default="", metavar="FILE", help="MODEL.WEIGHTS")
    parser.add_argument(
        "--format", required=True, choices=("onnx", "torchscript", "exported_program")
    )
    flags.add_output(parser)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="pad every image to this size instead of accepting any size; TensorRT needs it",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX opset, 16 to 20 (default 17)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="precision of the layers (default fp32; int8 only with onnx); inputs and outputs stay "
        "float32",
    )
    parser.add_argument(
        "--calibration-images",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="calibrate int8 on these images (default: 64 of DATASETS.TRAIN)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="compare on these images (default: some of DATASETS.TEST, if its files are here)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a model in the folder, of any format, once the new one is complete",
    )
    flags.add_code(parser)
    flags.add_opts(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.config_imports import import_options
    from mask_head_plugin.deploy.export import ExportOptions, export_model

    logging.basicConfig(format="%(message)s")
    logging.getLogger("mask_head_plugin.deploy").setLevel(logging.INFO)
    weights = ["MODEL.WEIGHTS", args.weights] if args.weights else []
    opts = [*import_options(args.imports), *weights, *args.opts]
    size = tuple(args.size) if args.size else None
    options = ExportOptions(args.format, size, args.opset, args.precision, args.calibration_images)
    try:
        parity = export_model(
            args.config_file, opts, args.output, options, args.images, overwrite=args.overwrite
        )
    except (ConfigError, OSError) as error:
        print(f"export_model.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"export_model.py: stopped; {args.output} has no new model", file=sys.stderr)
        return 130
    print(parity)
    print(f"the model is in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
