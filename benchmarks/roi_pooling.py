#!/usr/bin/env python3
"""Compares this plugin's RoI pooling with torchvision's operators and detectron2's ROIPooler.

All of them run in one process on the same inputs: 256 RoIs per image of 800 x 1333, C = 256. The
operators get one map with stride 8; the poolers get an FPN with strides 4 to 32. torchvision has no
exact integral like PrROIPool, so our precise_roi_pool is compared with torchvision's roi_align with
an adaptive grid.

Times are medians of several runs that alternate between stock and ours; ratios are stock / ours.
Memory is the peak that PyTorch allocates during one forward and backward pass, in addition to
inputs and results. The profiler measures it on the CPU, and the allocator on CUDA. With --busy N, N
other processes compute during the measurement.

Writes a table, a JSON file with machine, versions and date, and a plot next to it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from measure import (
    Sizes,
    add_busy_argument,
    add_tiny_argument,
    machine,
    median_times,
    write_results,
)
from torch import Tensor

from mask_head_plugin.machine import peak_megabytes
from mask_head_plugin.modeling import MultiLevelRoIPooler
from mask_head_plugin.ops import precise_roi_pool, roi_align, roi_pool
from mask_head_plugin.progress import progress, tell

STRIDES = (4, 8, 16, 32)


class Comparison(NamedTuple):
    """Two functions with the same inputs and result, and the maps that get gradients."""

    what: str
    stock: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    maps: list[Tensor]


def make_boxes(num_images: int, sizes: Sizes, generator: torch.Generator) -> list[Tensor]:
    """Returns boxes for each image, with sides spread evenly on a logarithmic scale."""
    height, width = sizes.image_hw
    least, greatest = sizes.roi_sides
    shape = (sizes.rois_per_image, 2)
    boxes = []
    for _ in range(num_images):
        sides = least * (greatest / least) ** torch.rand(shape, generator=generator)
        room = (torch.tensor([width, height]) - sides).clamp(min=0)
        corner = torch.rand(shape, generator=generator) * room
        boxes.append(torch.cat([corner, corner + sides], dim=1))
    return boxes


def make_map(num_images: int, stride: int, layout: str, sizes: Sizes, device: str) -> Tensor:
    hw = (side // stride for side in sizes.image_hw)
    features = torch.randn(num_images, sizes.num_channels, *hw, device=device)
    return features.contiguous(memory_format=getattr(torch, layout)).requires_grad_()


def comparisons(
    size: int, ratio: int, layout: str, num_images: int, sizes: Sizes, device: str
) -> Iterator[Comparison]:
    """Yields the comparisons for one output size, sampling ratio and layout of the maps."""
    generator = torch.Generator().manual_seed(0)
    boxes = [b.to(device) for b in make_boxes(num_images, sizes, generator)]
    index = torch.arange(num_images, device=device).repeat_interleave(sizes.rois_per_image)
    rois = torch.cat([index[:, None], torch.cat(boxes)], dim=1)
    pyramid = [make_map(num_images, stride, layout, sizes, device) for stride in STRIDES]
    box_lists = [Boxes(b) for b in boxes]
    arguments = ((size, size), tuple(1 / s for s in STRIDES), ratio, "ROIAlignV2")
    stock, ours = ROIPooler(*arguments), MultiLevelRoIPooler(*arguments)
    yield Comparison(
        "pooler", partial(stock, pyramid, box_lists), partial(ours, pyramid, box_lists), pyramid
    )
    if device != "cpu":  # elsewhere, ours are used only for what torchvision's cannot do
        return
    single = [pyramid[1]]
    arguments = (single[0], rois, size, 1 / 8)
    our_align = partial(roi_align, *arguments, ratio)
    stock_align = partial(torchvision.ops.roi_align, *arguments, ratio, True)
    yield Comparison("roi_align", stock_align, our_align, single)
    if ratio == 0:
        precise = partial(precise_roi_pool, *arguments)
        yield Comparison("precise_roi_pool", stock_align, precise, single)
        stock_pool = partial(torchvision.ops.roi_pool, *arguments)
        yield Comparison("roi_pool", stock_pool, partial(roi_pool, *arguments), single)


def measure(comparison: Comparison, repeats: int, busy: int, device: str) -> dict[str, float]:
    """Returns times, memory and ratios of both sides of a comparison."""
    calls = {"stock": comparison.stock, "ours": comparison.ours}
    # The next layer returns a gradient in the layout of the result.
    gradients = {who: torch.ones_like(call()) for who, call in calls.items()}
    pooled: dict[str, Tensor] = {}

    def forward(who: str) -> None:
        for feature in comparison.maps:
            feature.grad = None
        pooled[who] = calls[who]()

    steps: list[Callable[[], object]] = []
    for who in calls:
        steps += [partial(forward, who), lambda who=who: pooled.pop(who).backward(gradients[who])]
    times = median_times(steps, repeats, device, busy=busy)
    row: dict[str, float] = {}
    results = gradients["ours"].nbytes + sum(x.nbytes for x in comparison.maps)  # and gradients
    for who, ahead, back in zip(calls, times[::2], times[1::2], strict=True):
        row[f"forward_{who}_ms"] = round(ahead, 2)
        row[f"forward_backward_{who}_ms"] = round(ahead + back, 2)
        for feature in comparison.maps:
            feature.grad = None
        peak = peak_megabytes(lambda who=who: calls[who]().backward(gradients[who]), device)
        row[f"memory_{who}_mb"] = round(peak - results / 1e6, 1)
    for part in ("forward", "forward_backward"):
        row[f"{part}_ratio"] = round(row[f"{part}_stock_ms"] / row[f"{part}_ours_ms"], 2)
    return row


HEADER = (
    f"{'':17}{'images':>7}{'layout':>15}{'size':>5}{'ratio':>6}{'threads':>8}"
    f"{'forward ms: stock, ours, x':>32}{'with backward':>30}{'memory MB: stock, ours':>24}"
)


def line(row: dict[str, Any]) -> str:
    text = (
        f"{row['what']:17}{row['images']:>7}{row['layout']:>15}{row['output_size']:>5}"
        f"{row['sampling_ratio']:>6}{row['threads']:>8}"
    )
    for part, width in (("forward", 12), ("forward_backward", 10)):
        text += f"{row[f'{part}_stock_ms']:>{width}}{row[f'{part}_ours_ms']:>10}"
        text += f"{row[f'{part}_ratio']:>9}x"
    return text + f"{row['memory_stock_mb']:>13}{row['memory_ours_mb']:>11}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the ratios of forward + backward for the largest number of threads and images."""
    from matplotlib.figure import Figure

    from mask_head_plugin.pages.plots import COLOURS, label_bars, save_plot

    most = max((row["threads"], row["images"]) for row in rows)
    rows = [row for row in rows if (row["threads"], row["images"]) == most]
    cases = sorted({(r["output_size"], r["sampling_ratio"], r["layout"]) for r in rows})
    whats = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + 1.1 * len(cases)), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLOURS)
    thickness = 0.8 / len(whats)
    for k, what in enumerate(whats):
        found = {
            (r["output_size"], r["sampling_ratio"], r["layout"]): r
            for r in rows
            if r["what"] == what
        }
        places = [n + k * thickness for n, case in enumerate(cases) if case in found]
        ratios = [found[case]["forward_backward_ratio"] for case in cases if case in found]
        bars = axes.barh(places, ratios, height=thickness, label=what)
        label_bars(axes, bars, "%.1fx")
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    middle = 0.4 - thickness / 2
    axes.set_yticks(
        [n + middle for n in range(len(cases))],
        [
            f"{size} x {size}, ratio {ratio or 'adaptive'}\n{layout}"
            for size, ratio, layout in cases
        ],
    )
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel(
        "times as fast as stock, forward + backward (precise_roi_pool: vs. torchvision's roi_align)"
    )
    axes.set_title(f"{most[1]} images, {most[0]} threads")
    axes.legend()
    save_plot(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/roi_pooling.json"))
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs per measurement; their median is reported"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, nargs="+", default=[2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ratios", type=int, nargs="+", default=[0, 2], help="sampling ratios")
    parser.add_argument("--sides", type=int, nargs="+", help="pooled sides (default 7 and 14)")
    add_busy_argument(parser)
    add_tiny_argument(parser)
    args = parser.parse_args()
    rows = []
    settings = [
        *itertools.product(
            args.threads,
            args.images,
            args.sides or args.sizes.pooled_sides,
            args.ratios,
            ("contiguous_format", "channels_last"),
        )
    ]
    tell(HEADER)
    for threads, images, size, ratio, layout in progress(settings, "settings", "setting"):
        torch.set_num_threads(threads)
        for comparison in comparisons(size, ratio, layout, images, args.sizes, args.device):
            row = {
                "what": comparison.what,
                "images": images,
                "layout": layout.removesuffix("_format"),
                "output_size": size,
                "sampling_ratio": ratio,
                "threads": threads,
                **measure(comparison, args.repeats, args.busy, args.device),
            }
            rows.append(row)
            tell(line(row))
    results = {**machine(args.device), "repeats": args.repeats, "busy": args.busy, "rows": rows}
    write_results(results, args.output, plot)


if __name__ == "__main__":
    main()
