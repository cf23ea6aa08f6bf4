#!/usr/bin/env python3
"""Writes the weights of a .pth checkpoint as .safetensors, without optimizer state or code."""

from __future__ import annotations

import argparse
from pathlib import Path

from mask_head_plugin import ConfigError
from mask_head_plugin.engine import export_safetensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="e.g. output/shapes/model_final.pth")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--half", action="store_true", help="store matrices and kernels as float16")
    args = parser.parse_args()
    try:
        if args.output.suffix != ".safetensors":
            raise ConfigError(f"{args.output}: the name of the output must end in .safetensors")
        export_safetensors(args.checkpoint, args.output, half=args.half)
    except (ConfigError, OSError) as error:
        parser.exit(1, f"export_weights.py: {error}\n")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
