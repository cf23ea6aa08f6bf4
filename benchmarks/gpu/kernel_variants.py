#!/usr/bin/env python3
"""Times variants of the RoI pooling kernel, and torchvision's kernel, without launch overhead.

A variant changes one thing: the size of a program (its number of warps, and the number of bytes
that it reads from each cell), the number of rows in a tile, the layout of the maps, or the number
of launches (one per level instead of one for all levels). Times for contiguous maps include copying
them. "samples one by one" is torchvision's kernel, which does not merge samples and requires
contiguous maps. The sampling ratio is 0. Times are medians from triton.testing.do_bench, which
clears the L2 cache before each run and waits only at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from detectron2.structures import Boxes
from measure import Sizes, add_tiny_argument, machine, write_json
from roi_pooling import STRIDES, make_boxes, make_map
from torch import Tensor
from torchvision.ops import roi_align

from mask_head_plugin.modeling import MultiLevelRoIPooler
from mask_head_plugin.modeling.pooler import boxes_to_rois
from mask_head_plugin.ops import roi_pooling_operator

NUM_IMAGES = 2
SCALES = tuple(1 / stride for stride in STRIDES)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Pool = Callable[[list[Tensor]], list[Tensor]]


class Poolings:
    """Different ways to pool the same RoIs."""

    def __init__(self, size: int, sizes: Sizes, device: str) -> None:
        boxes = make_boxes(NUM_IMAGES, sizes, torch.Generator().manual_seed(0))
        box_lists = [Boxes(x.to(device)) for x in boxes]
        self.size = size
        self.rois = boxes_to_rois(box_lists)
        pooler = MultiLevelRoIPooler(size, SCALES, 0, "ROIAlignV2")
        self.levels = pooler._assign_levels(box_lists).int()
        # Computed in advance, because finding the RoIs of a level waits for the device.
        self.by_level = [torch.where(self.levels == level)[0] for level in range(len(SCALES))]

    def at_once(self, maps: list[Tensor]) -> list[Tensor]:
        return [self._operator(maps, self.rois, self.levels, SCALES)]

    def level_by_level(self, maps: list[Tensor]) -> list[Tensor]:
        return [
            self._operator([feature], self.rois[chosen], self.levels[chosen] * 0, [scale])
            for feature, scale, chosen in zip(maps, SCALES, self.by_level, strict=True)
        ]

    def one_by_one(self, maps: list[Tensor]) -> list[Tensor]:
        rois = self.rois.to(maps[0].dtype)
        return [
            roi_align(feature, rois[chosen], self.size, scale, 0, True)
            for feature, scale, chosen in zip(maps, SCALES, self.by_level, strict=True)
        ]

    def _operator(self, maps: list[Tensor], rois: Tensor, levels: Tensor, scales: Any) -> Tensor:
        size = self.size, self.size
        return roi_pooling_operator.multilevel_roi_align(maps, rois, levels, size, scales, 0, True)


@contextlib.contextmanager
def kernel_with(**changes: Any) -> Iterator[None]:
    """Replaces constants of ops.roi_pooling_triton; the kernel is recompiled for them."""
    kernels = roi_pooling_operator.kernels
    before = {name: getattr(kernels, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(kernels, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)


def variants(poolings: Poolings) -> Iterator[tuple[str, Pool, str, dict[str, Any]]]:
    """Yields the name, function, layout of the maps and changed constants of each variant."""
    options = roi_pooling_operator.kernels.COMPILER_OPTIONS
    yield "unchanged", poolings.at_once, "channels_last", {}
    yield "samples one by one", poolings.one_by_one, "contiguous_format", {}
    yield "contiguous maps", poolings.at_once, "contiguous_format", {}
    yield "one launch per level", poolings.level_by_level, "channels_last", {}
    for num_bytes, num_warps in ((512, 2), (512, 4), (256, 1), (1024, 1), (1024, 2), (2048, 4)):
        changes = {
            "MAX_BLOCK_BYTES": num_bytes,
            "COMPILER_OPTIONS": {**options, "num_warps": num_warps},
        }
        name = f"{num_bytes} bytes per cell, warps: {num_warps}"
        yield name, poolings.at_once, "channels_last", changes
    for num_rows in (1, 2, 8):
        changes = {"TILE_ROWS": num_rows}
        yield f"tiles of {num_rows} rows", poolings.at_once, "channels_last", changes


def measure(pool: Pool, maps: list[Tensor], device: str) -> dict[str, Any]:
    """Returns the times of a forward and a backward pass in milliseconds."""
    pooled = pool(maps)
    grads = [torch.ones_like(x) for x in pooled]

    def backward() -> None:
        torch.autograd.grad(pooled, maps, grads, retain_graph=True)

    backward()
    if device != "cuda":
        return {"forward ms": "not measured: no CUDA", "backward ms": "not measured: no CUDA"}
    ahead, back = (
        triton.testing.do_bench(step, return_mode="median")
        for step in (lambda: pool(maps), backward)
    )
    return {"forward ms": round(ahead, 4), "backward ms": round(back, 4)}


def measure_all(dtype: str, size: int, sizes: Sizes, device: str) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    poolings = Poolings(size, sizes, device)
    maps = {
        layout: [
            make_map(NUM_IMAGES, stride, layout, sizes, device).detach().to(TYPES[dtype])
            for stride in STRIDES
        ]
        for layout in ("channels_last", "contiguous_format")
    }
    for name, pool, layout, changes in variants(poolings):
        row: dict[str, Any] = {"type": dtype, "P": size, "variant": name}
        inputs = [x.requires_grad_() for x in maps[layout]]
        try:
            with kernel_with(**changes):
                yield row | measure(pool, inputs, device)
        except Exception as error:  # a variant may not compile; the others still run
            traceback.print_exc()
            yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--types", choices=list(TYPES), nargs="+", default=["fp32", "fp16"])
    parser.add_argument(
        "--seconds", type=float, default=180, help="do not start a variant after this time"
    )
    add_tiny_argument(parser)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    results: dict[str, Any] = {**machine(args.device), "rows": []}
    for size in args.sizes.pooled_sides:
        for dtype in args.types:
            for row in measure_all(dtype, size, args.sizes, args.device):
                results["rows"].append(row)
                print(row, flush=True)
                write_json(results, args.output)
                if time.monotonic() > end:
                    print(f"{args.seconds:.0f} s have passed; the remaining variants are skipped")
                    return


if __name__ == "__main__":
    main()
