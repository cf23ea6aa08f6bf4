#!/usr/bin/env python3
"""Writes the weights of a checkpoint as .safetensors, without optimizer state or code."""

from __future__ import annotations

import argparse
from pathlib import Path

import flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="e.g. output/shapes/model_final.pth")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--half", action="store_true", help="store matrices and kernels as float16")
    parser.add_argument(
        "--classes-of",
        metavar="DATASET",
        help="take the class names from this registered data set if the checkpoint has none",
    )
    flags.add_code(parser)
    args = parser.parse_args()
    # Imported after the flags are parsed: --help must not wait seconds for PyTorch.
    from mask_head_plugin import ConfigError
    from mask_head_plugin.checkpoint import export_safetensors
    from mask_head_plugin.config_imports import resolve_imports
    from mask_head_plugin.user_code import import_modules

    try:
        import_modules(resolve_imports(args.imports, "--import"))
        if args.output.suffix != ".safetensors":
            raise ConfigError(f"{args.output}: the name of the output must end in .safetensors")
        names = classes_of(args.classes_of) if args.classes_of else None
        if args.classes_of and not names:
            raise ConfigError(
                f"--classes-of {args.classes_of}: no data set of this name, such as "
                "coco_2017_train, is registered, or its annotation file is missing"
            )
        export_safetensors(args.checkpoint, args.output, half=args.half, class_names=names)
    except (ConfigError, OSError) as error:
        status = 2 if isinstance(error, ConfigError) else 1  # the same codes as in the other tools
        parser.exit(status, f"export_weights.py: {error}\n")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


def classes_of(dataset: str) -> list[str]:
    from detectron2.config import CfgNode

    from mask_head_plugin.data import dataset_categories

    return list((dataset_categories(CfgNode({"COCO_FILES": []}), dataset) or {}).values())


if __name__ == "__main__":
    main()
