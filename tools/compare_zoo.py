#!/usr/bin/env python3
"""Compares stock detectron2 with this plugin on the same config, weights and images."""

from __future__ import annotations

import argparse
import logging
import sys

import flags

EXAMPLES = """
Examples:
  A model of the zoo on 500 images of COCO; the weights are downloaded:
    python tools/compare_zoo.py --config COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml \\
        --weights zoo --dataset coco_2017_val --num-images 500 --output output/zoo_R_50_FPN_3x
  The same without a network, with weights that you downloaded before:
    python tools/compare_zoo.py --config COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml \\
        --weights model_final_f10217.pkl --output output/zoo_R_50_FPN_3x
  One of detectron2's new baselines, whose config is Python code (a LazyConfig):
    python tools/compare_zoo.py --config new_baselines/mask_rcnn_R_50_FPN_400ep_LSJ.py \\
        --weights zoo --dataset coco_2017_val --num-images 500 --output output/zoo_R_50_400ep
  The checkpoint of this repository on the embedded data set (no downloads, a minute):
    python tools/compare_zoo.py --config configs/shapes/mask_rcnn_shapes.yaml \\
        --weights checkpoints/mask_rcnn_shapes.safetensors --output output/zoo_shapes
  Your own weights and data:
    python tools/compare_zoo.py --config configs/mine/cells.yaml --weights model_final.pth \\
        --dataset cells_val --output output/zoo_cells
  Every mask baseline of the zoo, each on 500 images of the data set in its config:
    python tools/compare_zoo.py --all --weights zoo --num-images 500 --output output/zoo

Any config key may follow the flags: MODEL.DEVICE cpu TEST.DETECTIONS_PER_IMAGE 300
(for a LazyConfig, only those of evaluation, under the same names)

Files in the folder of --output:
  comparison.md      verdict; detections compared one by one; AP of both with the 95% interval of
                     the difference, next to the published AP; time and memory per image
  comparison.json    the same, and every image that differs, for scripts
  pictures/          the images that differ most, or the first ones if none differs
  stock/, plugin/    metrics.json, coco_instances_results.json and matches of each model
With --all, comparison.md is the table of all baselines, and each has its own folder.

Verdicts and exit codes:
  0  equal: the same detections in the same order (up to ties), scores within 1e-4, boxes within
     1e-3 pixels, mask pixels that differ only close to the threshold
  1  not enough detections: nothing differs, but fewer than 100 detections have a score above
     --score. This happens with random weights, which detect nothing
  2  the comparison failed; one line says why
  3  different
With --all, the exit code is the highest of all comparisons. After Ctrl-C, it is 130.
"""
GIVEN_UP = 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--config", metavar="NAME|FILE", help="a config of detectron2's model zoo, or a file"
    )
    which.add_argument("--all", action="store_true", help="every mask baseline of the zoo")
    parser.add_argument(
        "--weights",
        required=True,
        metavar="zoo|PATH",
        help="'zoo' to download the weights; a file (.pkl, .pth, .safetensors); or a folder of "
        "files named as in the zoo (model_final_f10217.pkl) or by model id (137849600.pkl)",
    )
    parser.add_argument("--dataset", metavar="NAME", help="default: the config's DATASETS.TEST")
    flags.add_output(parser, "DIR")
    parser.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help="number of images to use, spread over the data set (default: all)",
    )
    parser.add_argument(
        "--score",
        type=float,
        default=0.5,
        metavar="S",
        help="the verdict counts detections with a higher score (default 0.5)",
    )
    flags.add_code(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.comparison import compare_all, compare_config
    from mask_head_plugin.comparison.compare import MARKDOWN_FILE
    from mask_head_plugin.comparison.measurement import DIFFERENT, EQUAL, TOO_FEW
    from mask_head_plugin.config_imports import import_options

    exit_codes = {EQUAL: 0, TOO_FEW: 1, DIFFERENT: 3}
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mask_head_plugin.comparison").setLevel(logging.INFO)
    opts = [*import_options(args.imports), *args.opts]
    job = (args.weights, args.dataset, args.output, args.num_images, opts, args.score)
    try:
        if args.all:
            results = compare_all(*job)
        else:
            results = {args.config: compare_config(args.config, *job)}
    except (ConfigError, OSError) as error:
        print(f"compare_zoo.py: {error}", file=sys.stderr)
        return GIVEN_UP
    except KeyboardInterrupt:
        print(f"compare_zoo.py: stopped; results so far are in {args.output}", file=sys.stderr)
        return 130
    codes = []
    for name, result in results.items():
        codes.append(GIVEN_UP if isinstance(result, str) else exit_codes[result.verdict])
        print(f"{name}: {f'not compared, {result}' if isinstance(result, str) else result.verdict}")
    print(f"see {args.output / MARKDOWN_FILE}")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
