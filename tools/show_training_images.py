#!/usr/bin/env python3
"""Draws training images with a config's augmentation, with and without their masks, in one PNG."""

from __future__ import annotations

import argparse
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flags import FlagsFirst, add_code, add_config_file

if TYPE_CHECKING:
    from detectron2.config import CfgNode

EXAMPLES = """
Example:
  python tools/show_training_images.py --config-file configs/shapes/mask_rcnn_shapes.yaml \\
      INPUT.COPY_PASTE.PROBABILITY 1.0
Any config key may follow the flags. The images are those of a run with the config's SEED (0 if it
has none), in the same order: --iteration 1000 shows the images from iteration 1000 on.
"""
NUM_IMAGES = 12


def main() -> None:
    parser = FlagsFirst(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_file(parser)
    parser.add_argument("--iteration", type=int, default=0, help="first to show (default 0)")
    parser.add_argument(
        "--image", metavar="NAME", help="show only this image (file_name in the annotation file)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="default: training_images.png in OUTPUT_DIR"
    )
    add_code(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args()
    if args.iteration < 0:
        parser.error(f"--iteration {args.iteration} is below 0")
    if args.output and args.output.suffix.lower() != ".png":
        parser.error(f"--output {args.output}: name a file that ends in .png")
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError

    try:
        print(f"wrote {write_sheet(args)}")
    except (ConfigError, OSError) as error:
        parser.exit(2, f"show_training_images.py: {error}\n")


def write_sheet(args: argparse.Namespace) -> Path:
    """Writes the picture and returns its path."""
    from mask_head_plugin.config_check.unread_keys import own_keys
    from mask_head_plugin.config_imports import import_options
    from mask_head_plugin.data import check_and_leave_out
    from mask_head_plugin.data.training_sheet import write_training_sheet
    from mask_head_plugin.engine import Trainer
    from mask_head_plugin.engine.run import check_and_register
    from mask_head_plugin.user_code import load_config_and_code

    cfg = load_config_and_code(args.config_file, [*import_options(args.imports), *args.opts])
    check_and_register(cfg, train=True, own=own_keys(args.config_file, args.opts[::2]))
    check_and_leave_out(cfg)
    if args.image is None:
        loader = Trainer.build_train_loader(cfg)
        loader.go_to(max(cfg.SEED, 0), args.iteration)
        samples = list(islice(chain.from_iterable(loader), NUM_IMAGES))
    else:
        samples = [one_sample(cfg, args.image)]
    path: Path = args.output or Path(cfg.OUTPUT_DIR) / "training_images.png"
    write_training_sheet(cfg, samples, path)
    return path


def one_sample(cfg: CfgNode, name: str) -> dict[str, Any]:
    """Returns the sample of the training image whose file has this name."""
    from detectron2.data import DatasetCatalog

    from mask_head_plugin import ConfigError
    from mask_head_plugin.data import ImageNamingMapper
    from mask_head_plugin.image_file_mapper import ImageFileMapper

    for record in (x for source in cfg.DATASETS.TRAIN for x in DatasetCatalog.get(source)):
        if Path("/", record["file_name"]).match(name):
            sample: dict[str, Any] = ImageNamingMapper(ImageFileMapper(cfg))(record)
            return sample
    raise ConfigError(f"--image {name}: no image of DATASETS.TRAIN {cfg.DATASETS.TRAIN} has it")


if __name__ == "__main__":
    main()
