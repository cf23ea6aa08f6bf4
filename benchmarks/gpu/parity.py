#!/usr/bin/env python3
"""Checks that this repository's checkpoint finds the same objects in detectron2 and the plugin.

Runs the comparison of tools/compare_zoo.py on the embedded data set. The comparison writes its page
and pictures to a folder next to the JSON file.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from measure import machine, write_json

from mask_head_plugin.comparison import compare_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "shapes" / "mask_rcnn_shapes.yaml"
CHECKPOINT = ROOT / "checkpoints" / "mask_rcnn_shapes.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--num-images", type=int, metavar="N", help="default: all of shapes_val")
    args = parser.parse_args()
    opts = ["MODEL.DEVICE", args.device]
    folder = args.output.with_suffix("")
    found = compare_config(str(CONFIG), str(CHECKPOINT), None, folder, args.num_images, opts)
    rows = [{"what": name, "value": value} for name, value in asdict(found.agreement).items()]
    rows += [
        {"what": f"{task} AP of {side}", "value": round(getattr(ap, side), 3)}
        for task, ap in found.ap.items()
        for side in ("stock", "plugin")
    ]
    costs = {side: asdict(cost) for side, cost in found.costs.items()}
    write_json(
        {**machine(args.device), "verdict": found.verdict, "costs": costs, "rows": rows},
        args.output,
    )
    print(f"{found.verdict}; see {folder}")


if __name__ == "__main__":
    main()
