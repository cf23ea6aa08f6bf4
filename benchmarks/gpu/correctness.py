#!/usr/bin/env python3
"""Compares the RoI pooling kernel with torchvision's, in all types and layouts.

Both passes, forward and backward, are compared. For each k in Sizes.exact_sides, some RoIs have
sides of exactly k times the pooled side, in cells. For these RoIs, a division that is rounded twice
would add a sample. The other RoIs have random sizes, cross the border or lie outside the map.
torchvision pools the same values in float32, level by level.
"""

from __future__ import annotations

import argparse
import itertools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Sizes, add_tiny_argument, machine, write_json
from torch import Tensor
from torchvision.ops import roi_align

from mask_head_plugin.ops import roi_pooling_operator

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous_format", "channels_last")
RATIOS = (0, 2)
SCALES = (1 / 4, 1 / 8)
NUM_IMAGES = 2


def make_rois(size: int, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns (R, 5) RoIs in pixels, and their levels (R,)."""
    rois, levels = [], []
    for level, scale in enumerate(SCALES):
        for k in sizes.exact_sides:
            # Scales are powers of 2 and sides are integers, so only the division can round.
            width, height = k * size / scale, (1 + k % 4) * size / scale
            rois.append([k % NUM_IMAGES, 4.0, 4.0, 4.0 + width, 4.0 + height])
            levels.append(level)
    least, greatest = sizes.roi_sides
    shape = sizes.rois_per_image, 2
    sides = least + (greatest - least) * torch.rand(shape, generator=generator)
    corner = torch.rand(shape, generator=generator) * sides - sides / 4
    index = torch.arange(len(sides))[:, None] % NUM_IMAGES
    others = torch.cat([index, corner, corner + sides], dim=1)
    far = torch.tensor([[0.0, 1e4, 1e4, 1e4 + 8, 1e4 + 4], [1, -500, -500, -496, -492]])
    strange = torch.cat([others, far])
    of_others = torch.arange(len(strange)) % len(SCALES)
    return torch.cat([torch.tensor(rois), strange]), torch.cat([torch.tensor(levels), of_others])


def make_maps(
    size: int, sizes: Sizes, dtype: torch.dtype, layout: str, device: str
) -> list[Tensor]:
    """Returns a map for each level, large enough for the widest RoI with an exact side."""
    hw = 4 * size + 3, max(sizes.exact_sides) * size + 3
    shape = NUM_IMAGES, sizes.num_channels, *hw
    memory_format = getattr(torch, layout)
    return [
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format)
        for _ in SCALES
    ]


def by_torchvision(
    maps: list[Tensor], rois: Tensor, levels: Tensor, size: int, ratio: int
) -> Tensor:
    pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for level, (feature, scale) in enumerate(zip(maps, SCALES, strict=True)):
        chosen = torch.where(levels == level)[0]
        found = roi_align(feature, rois[chosen], size, scale, ratio, True)
        pooled = pooled.index_put((chosen,), found)
    return pooled


def with_gradients(
    pool: Callable[[list[Tensor]], Tensor], maps: list[Tensor], weights: Tensor
) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in maps]
    pooled = pool(inputs)
    return [pooled.detach(), *torch.autograd.grad(pooled, inputs, weights.to(pooled))]


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the largest difference, relative to the largest expected value in the same tensor.

    The result is NaN if a tensor contains NaN, which Python's ``max`` might hide.
    """
    errors = [
        (mine.float() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
        for mine, theirs in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def compare(
    dtype: torch.dtype, layout: str, size: int, ratio: int, sizes: Sizes, device: str
) -> dict[str, Any]:
    """Returns the errors of one case, and whether they are within the tolerance of its type."""
    rois, levels = (x.to(device) for x in make_rois(size, sizes, torch.Generator().manual_seed(0)))
    maps = make_maps(size, sizes, dtype, layout, device)
    # The gradient from the next layer would have the type of the maps.
    weights = torch.randn(len(rois), sizes.num_channels, size, size, device=device).to(dtype)
    ours = with_gradients(
        lambda x: roi_pooling_operator.multilevel_roi_align(
            x, rois, levels, (size, size), SCALES, ratio, True
        ),
        maps,
        weights,
    )
    wide = [x.float() for x in maps]
    theirs = with_gradients(
        lambda x: by_torchvision(x, rois, levels, size, ratio), wide, weights.float()
    )
    # In float32, sample positions some hundred cells from the origin are rounded to 3e-5 cells,
    # once in nvcc's code and twice in our kernel. With two samples per bin, this changes a result
    # by 1.5e-5 of the largest value.
    tolerance = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    errors = largest_error(ours[:1], theirs[:1]), largest_error(ours[1:], theirs[1:])
    return {
        "RoIs": len(rois),
        "forward error": f"{errors[0]:.1e}",
        "backward error": f"{errors[1]:.1e}",
        "allowed": f"{tolerance:.1e}",
        "agrees": all(error <= tolerance for error in errors),  # False if one is NaN
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    add_tiny_argument(parser)
    args = parser.parse_args()
    cases = list(itertools.product(TYPES, LAYOUTS, args.sizes.pooled_sides, RATIOS))
    results: dict[str, Any] = {**machine(args.device), "cases": len(cases), "rows": []}
    for dtype, layout, size, ratio in cases:
        row: dict[str, Any] = {
            "type": str(dtype).removeprefix("torch."),
            "layout": layout.removesuffix("_format"),
            "P": size,
            "ratio": ratio,
        }
        torch.manual_seed(0)
        try:
            row |= compare(dtype, layout, size, ratio, args.sizes, args.device)
        except Exception as error:  # the other cases still run
            traceback.print_exc()
            row |= {"agrees": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        results["rows"].append(row)
        print(row, flush=True)
        write_json(results, args.output)


if __name__ == "__main__":
    main()
