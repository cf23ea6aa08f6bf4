#!/usr/bin/env python3
"""RoI pooling on the CPU: this plugin beside torchvision's operator and detectron2's ROIPooler.

All run in one process on the same inputs: 512 RoIs over two images of 800 x 1333, C = 256. The
operators see one map of stride 8, the poolers an FPN of strides 4 to 32. A figure is the median of
several runs; ratios are stock time / our time. Results go to a JSON file with machine, versions and
date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import detectron2
import torch
import torchvision
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor

from mask_head_plugin.modeling import MultiLevelRoIPooler
from mask_head_plugin.ops import roi_align

IMAGE_HW = (800, 1333)
NUM_IMAGES = 2
NUM_CHANNELS = 256
NUM_ROIS = 512
STRIDES = (4, 8, 16, 32)


def make_boxes(generator: torch.Generator) -> list[Tensor]:
    """Returns (R / N, 4) boxes per image, sides of 16 to 600 pixels, even in their logarithm."""
    height, width = IMAGE_HW
    shape = (NUM_ROIS // NUM_IMAGES, 2)
    boxes = []
    for _ in range(NUM_IMAGES):
        sides = 16 * (600 / 16) ** torch.rand(shape, generator=generator)
        room = (torch.tensor([width, height]) - sides).clamp(min=0)
        corner = torch.rand(shape, generator=generator) * room
        boxes.append(torch.cat([corner, corner + sides], dim=1))
    return boxes


def make_map(stride: int, generator: torch.Generator, channels_last: bool) -> Tensor:
    hw = (IMAGE_HW[0] // stride, IMAGE_HW[1] // stride)
    features = torch.randn(NUM_IMAGES, NUM_CHANNELS, *hw, generator=generator)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    return features.requires_grad_()


def time_call(pool: Callable[[], Tensor], maps: list[Tensor], repeats: int) -> tuple[float, float]:
    """Returns median milliseconds of forward and of forward + backward."""
    forward, both = [], []
    gradient = torch.ones_like(pool())
    for _ in range(repeats):
        for feature in maps:
            feature.grad = None
        start = time.perf_counter()
        pooled = pool()
        middle = time.perf_counter()
        pooled.backward(gradient)
        forward.append(middle - start)
        both.append(time.perf_counter() - start)
    return 1e3 * statistics.median(forward), 1e3 * statistics.median(both)


def compare(size: int, ratio: int, threads: int, repeats: int) -> list[dict[str, object]]:
    """Times operators and poolers for one output size, sampling ratio and number of threads."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    boxes = make_boxes(generator)
    index = torch.arange(NUM_IMAGES).repeat_interleave(NUM_ROIS // NUM_IMAGES)[:, None]
    rois = torch.cat([index, torch.cat(boxes)], dim=1)
    box_lists = [Boxes(b) for b in boxes]
    scales = tuple(1 / s for s in STRIDES)
    arguments = ((size, size), scales, ratio, "ROIAlignV2")
    rows = []
    for layout in ("contiguous", "channels_last"):
        last = layout == "channels_last"
        single = [make_map(8, generator, last)]
        pyramid = [make_map(s, generator, last) for s in STRIDES]
        options = (rois, size, 1 / 8, ratio, True)
        ours, stock = MultiLevelRoIPooler(*arguments), ROIPooler(*arguments)
        for what, maps, stock_call, our_call in (
            (
                "roi_align",
                single,
                partial(torchvision.ops.roi_align, single[0], *options),
                partial(roi_align, single[0], *options),
            ),
            (
                "pooler",
                pyramid,
                partial(stock, pyramid, box_lists),
                partial(ours, pyramid, box_lists),
            ),
        ):
            stock_ms, our_ms = (time_call(call, maps, repeats) for call in (stock_call, our_call))
            row: dict[str, object] = {
                "what": what,
                "layout": layout,
                "output_size": size,
                "sampling_ratio": ratio,
                "threads": threads,
            }
            for part, a, b in zip(("forward", "forward_backward"), stock_ms, our_ms, strict=True):
                row[f"{part}_stock_ms"] = round(a, 2)
                row[f"{part}_ours_ms"] = round(b, 2)
                row[f"{part}_ratio"] = round(a / b, 2)
            rows.append(row)
    return rows


def machine() -> dict[str, object]:
    """Returns what a reader needs to judge the figures."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/roi_pooling.json"))
    parser.add_argument("--repeats", type=int, default=5, help="runs per figure, the median counts")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    results: dict[str, object] = {**machine(), "repeats": args.repeats}
    header = f"{'':10}{'layout':>14}{'size':>6}{'ratio':>6}{'threads':>8}"
    print(header + f"{'forward ms (stock, ours, x)':>34}{'with backward':>34}")
    rows = []
    for threads in args.threads:
        for size in (7, 14):
            for ratio in (0, 2):
                for row in compare(size, ratio, threads, args.repeats):
                    rows.append(row)
                    print(
                        f"{row['what']:10}{row['layout']:>14}{size:>6}{ratio:>6}{threads:>8}"
                        + "".join(
                            f"{row[f'{p}_stock_ms']:>13}{row[f'{p}_ours_ms']:>12}"
                            f"{row[f'{p}_ratio']:>8}x"
                            for p in ("forward", "forward_backward")
                        ),
                        flush=True,
                    )
    results["rows"] = rows
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
