#!/usr/bin/env python3
r"""Measures how far RoIAlign's samples are from the exact mean of the bilinear surface.

RoIs of many sizes and shapes are placed at random on the maps of a trained model, and pooled both
from samples and exactly (PrROIPool). An error is a root mean square over bins and channels. It is
given in percent of the root mean square of the signal, which is the exactly pooled value minus the
channel's mean over the map. Sizes are the width of a bin in cells. Intervals of 95% cover the
images (jackknife and Student's t); each is for a single value. Nothing is trained.

Writes tables, and a JSON file with machine, versions and date. Takes seconds per image. To measure
another model:

    python benchmarks/sampling_error.py --name facades --weights output/facades/model_final.pth \
        --config-file configs/facades/mask_rcnn_facades.yaml --output output/error_facades.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes
from measure import machine, write_json
from sampling_case import (
    BASELINE,
    BEST,
    GAUSS,
    MIDPOINT,
    WAYS,
    Case,
    Scene,
    add_case_arguments,
    case_of,
    group_of_each_image,
    over_images,
    two_point_align,
)
from tabulate import tabulate
from torch import Tensor

from mask_head_plugin.ops import precise_roi_pool, roi_align

NUM_BINS = 7
WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Widths of a bin, in cells."""
ASPECTS = (1, 2, 4, 8)
ASPECT_WIDTH = 1.5
"""Square root of a bin's area in cells, where the aspect ratio varies."""
OFFSETS = (0.21, 0.23, 0.25, 0.26, 0.27, BEST, 0.28, GAUSS, 0.30, 0.32)
ROIS = 12
"""Number of random RoIs for each size and map."""
LAGS = 12
"""Largest distance, in cells, for which the correlation of a map with itself is measured."""

COST_ROIS, COST_IMAGES = 256, 6
"""Number of RoIs per image that are pooled to measure the time, and number of such images."""
TIMED = tuple(name for name in WAYS if name not in ("Gauss points", "best points", "edges rounded"))
"""Ways that are a single operator. The other ways combine several calls of operators here."""

METHODS: dict[str, Callable[..., Tensor]] = {
    "one sample": partial(roi_align, sampling_ratio=1),
    BASELINE: partial(roi_align, sampling_ratio=2),
    "16 samples": partial(roi_align, sampling_ratio=4),
    "adaptive": partial(roi_align, sampling_ratio=0),
    "Gauss points": partial(two_point_align, offset=GAUSS),
    "best points": partial(two_point_align, offset=BEST),
}


def random_rois(
    rng: np.random.Generator, map_hw: tuple[int, int], side_hw: tuple[float, float], count: int
) -> Tensor:
    """Returns (count, 5) RoIs of one size inside the map, in cells, or none if it is too small."""
    room = np.array(map_hw) - np.array(side_hw)
    if (room < 0).any():
        return torch.empty(0, 5)
    y, x = (rng.uniform(0, 1, (count, 2)) * room).T
    columns = [np.zeros(count), x, y, x + side_hw[1], y + side_hw[0]]
    return torch.tensor(np.stack(columns, axis=1), dtype=torch.float32)


def squared_errors(
    feature: Tensor,
    rois: Tensor,
    methods: dict[str, Callable[..., Tensor]],
    num_bins: int = NUM_BINS,
) -> dict[str, float]:
    """Returns sums over bins and channels: each method's squared error, and the squared signal."""
    exact = precise_roi_pool(feature, rois, num_bins).double()
    sums = {
        name: float((method(feature, rois, num_bins).double() - exact).square().sum())
        for name, method in methods.items()
    }
    middle = feature.double().mean((2, 3))[..., None, None]
    return {**sums, "signal": float((exact - middle).square().sum())}


class Table:
    """Collects sums of squared errors by setting, method and group of images; returns ratios."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}

    def add(self, setting: tuple[Any, ...], group: int, sums: dict[str, float]) -> None:
        before = self._sums.setdefault(setting, {}).setdefault(group, dict.fromkeys(sums, 0.0))
        before.update({name: before[name] + value for name, value in sums.items()})

    def rows(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """Returns a row for each setting and method: percent, ratio to four samples, intervals."""
        rows = []
        for setting, by_group in sorted(self._sums.items()):
            sums = {
                name: np.array([x[name] for x in by_group.values()])
                for name in next(iter(by_group.values()))
            }
            signal = sums.pop("signal")
            for method, own in sums.items():
                row = {**dict(zip(names, setting, strict=True)), "method": method}
                row |= self._root(own, signal, ("error", "low", "high"), 100)
                if BASELINE in sums:
                    keys = ("ratio", "ratio low", "ratio high")
                    row |= self._root(own, sums[BASELINE], keys, 1)
                rows.append({**row, "groups of images": len(own)})
        return rows

    @staticmethod
    def _root(own: Any, base: Any, keys: tuple[str, ...], factor: float) -> dict[str, float]:
        """Returns the square root of a ratio of sums over images, and its interval."""
        found = over_images(lambda w: factor * np.sqrt((w @ own) / (w @ base)), len(own))
        return {key: round(x, 3) for key, x in zip(keys, found, strict=True)}


def by_offset(rng: np.random.Generator, feature: Tensor, group: int, table: Table) -> None:
    """Adds the errors of two points per axis for several distances from the middle of the bin."""
    methods = {
        BASELINE if a == MIDPOINT else f"{a:.4f}": partial(two_point_align, offset=a)
        for a in OFFSETS
    }
    for width in (0.5, 1.0, 2.0):
        rois = random_rois(rng, (feature.shape[2], feature.shape[3]), (NUM_BINS * width,) * 2, ROIS)
        if len(rois):
            table.add((width,), group, squared_errors(feature, rois, methods))


def by_size(rng: np.random.Generator, maps: list[Tensor], group: int, tables: list[Table]) -> None:
    """Adds the errors for each level and bin width, and for aspect ratios on the finest map."""
    for level, feature in enumerate(maps):
        map_hw = (feature.shape[2], feature.shape[3])
        for width in WIDTHS:
            rois = random_rois(rng, map_hw, (NUM_BINS * width,) * 2, ROIS)
            if len(rois):
                tables[0].add((level, width), group, squared_errors(feature, rois, METHODS))
    map_hw = (maps[0].shape[2], maps[0].shape[3])
    for aspect in ASPECTS:
        long, short = (NUM_BINS * ASPECT_WIDTH * aspect**power for power in (0.5, -0.5))
        lying, standing = (
            random_rois(rng, map_hw, sides, ROIS // 2) for sides in ((short, long), (long, short))
        )
        if len(lying) and len(standing):
            rois = torch.cat([lying, standing])
            tables[1].add((aspect,), group, squared_errors(maps[0], rois, METHODS))


def unread_shares(width: float, offsets: tuple[float, ...], num_phases: int = 4096) -> float:
    """Returns the share of the cells in a square bin that no sample reads.

    A cell is in the bin if its centre is.

    Args:
        width: the bin's width, in cells.
        offsets: positions of the samples along an axis, relative to the middle of the bin and in
            units of its width.
        num_phases: number of positions of the bin, relative to the cells, to average over.
    """
    start = (torch.arange(num_phases) + 0.5) / num_phases
    cells = torch.arange(-2, int(width) + 5)
    inside = (cells >= start[:, None]) & (cells < start[:, None] + width)
    points = start[:, None] + width * (0.5 + torch.tensor(offsets, dtype=torch.float64))
    # A sample reads the cells closer than one cell to it.
    read = ((cells - points[:, :, None]).abs() < 1).any(1) & inside
    return 1 - float(read.sum() / inside.sum()) ** 2


def unread_rows() -> list[dict[str, Any]]:
    """Returns the share of cells that no sample reads, in percent, by method and width of a bin."""
    patterns = {
        "one sample": (0.0,),
        BASELINE: (-MIDPOINT, MIDPOINT),
        "16 samples": (-0.375, -0.125, 0.125, 0.375),
        "Gauss points": (-GAUSS, GAUSS),
        "best points": (-BEST, BEST),
    }
    widths = sorted({*WIDTHS, *np.arange(0.25, 8.1, 0.25).tolist()})
    return [
        {"width": width, "method": name, "unread": round(100 * unread_shares(width, offsets), 2)}
        for name, offsets in patterns.items()
        for width in widths
    ]


Correlation = Callable[[np.ndarray], np.ndarray]
"""A function from distances along an axis, in cells, to the correlation of two cells of a map."""


def expected_errors(
    width: float, offsets: list[float], correlation: Correlation, num_axes: int = 1
) -> list[float]:
    """Returns the expected root mean square error of two points per axis, for each offset.

    The mean is over positions of the bin and over piecewise (bi)linear functions through random
    values at the cells. The random values have variance 1 and a correlation that is a product over
    the axes.

    Args:
        width: the bin's width, in cells.
        offsets: distances of the points from the middle of the bin, in units of its width.
        correlation: the correlation along an axis.
        num_axes: 1, or 2 for square bins and their 2 x 2 points.
    """
    phases = (np.arange(256) + 0.5) / 256
    cells = np.arange(-1, int(np.ceil(width)) + 3)
    covariance = correlation(np.abs(cells[:, None] - cells))

    def hat(t: np.ndarray) -> np.ndarray:
        return np.maximum(0, 1 - np.abs(t[:, None] - cells))

    def product(x: np.ndarray, y: np.ndarray) -> float:
        """Returns the expected product of two weighted sums of cells, as a mean over phases."""
        return float(np.einsum("pi,ij,pj->p", x, covariance, y).mean())

    inner = (np.arange(2000) + 0.5) / 2000
    exact = np.stack([hat(phase + width * inner).mean(0) for phase in phases])
    errors = []
    for offset in offsets:
        points = sum(hat(phases + width * (0.5 + sign * offset)) for sign in (-1, 1)) / 2
        parts = product(points, points), product(points, exact), product(exact, exact)
        square = parts[0] ** num_axes - 2 * parts[1] ** num_axes + parts[2] ** num_axes
        errors.append(float(np.sqrt(max(square, 0.0))))
    return errors


def correlation_of(feature: Tensor) -> np.ndarray:
    """Returns the correlation of a (1, C, H, W) map with itself, moved by 0 to LAGS cells.

    Each channel's mean is subtracted first. The result is a mean over both axes and all channels.
    """
    x = feature.double() - feature.double().mean((2, 3), keepdim=True)
    products = [
        sum(float((y[..., lag:] * y[..., : y.shape[3] - lag]).mean()) for y in (x, x.mT))
        for lag in range(LAGS + 1)
    ]
    return np.array(products) / products[0]


def theory_rows(measured: list[float]) -> list[dict[str, Any]]:
    """Returns the best offset and the errors of other offsets, for each map, axis count and width.

    Args:
        measured: correlation of real maps for distances of 0, 1, ... cells. For larger distances,
            the correlation counts as 0.
    """
    known = np.array([*measured, *[0.0] * 8])
    kinds: dict[str, Correlation] = {
        "white noise": lambda d: (d == 0).astype(float),
        "as these maps": lambda d: known[d],
    }
    grid, rows = np.arange(0.2, 0.3401, 0.001).tolist(), []
    for kind, correlation in kinds.items():
        for num_axes in (1, 2):
            for width in WIDTHS:
                given = [*grid, MIDPOINT, GAUSS, BEST, 0.0]
                *errors, midpoint, gauss, best, one = expected_errors(
                    width, given, correlation, num_axes
                )
                rows.append(
                    {
                        "map": kind,
                        "axes": num_axes,
                        "width": width,
                        "best offset": round(grid[int(np.argmin(errors))], 3),
                        "least ratio": round(min(errors) / midpoint, 3),
                        "Gauss points": round(gauss / midpoint, 3),
                        "best points": round(best / midpoint, 3),
                        "one sample": round(one / midpoint, 3),
                    }
                )
    return rows


def bin_widths(case: Case, scenes: list[Scene]) -> list[dict[str, Any]]:
    """Returns how wide the bins of the data set's objects are, for both heads.

    Widths and heights count separately, so "above 2, %" is a percentage of sides, not of bins.
    """
    rows = []
    for head, pooler in (("box", case.box_pooler), ("mask", case.mask_pooler)):
        widths = []
        for scene in scenes:
            boxes = scene.objects.gt_boxes
            scale = torch.tensor(pooler.scales)[pooler._assign_levels([boxes])]
            sides = (boxes.tensor[:, 2:] - boxes.tensor[:, :2]) * scale[:, None]
            widths.append(sides / pooler.output_size[0])
        all_widths = torch.cat(widths).flatten()
        q = [round(float(x), 2) for x in all_widths.quantile(torch.tensor([0.05, 0.5, 0.95]))]
        rows.append(
            {
                "head": head,
                "bins": pooler.output_size[0],
                "objects": len(all_widths) // 2,
                "5%": q[0],
                "median": q[1],
                "95%": q[2],
                "above 2, %": round(100 * float((all_widths > 2).float().mean()), 2),
                "one adaptive sample, %": round(100 * float((all_widths <= 1).float().mean()), 2),
            }
        )
    return rows


def own_rois(case: Case, maps: list[Tensor], boxes: Any, group: int, table: Table) -> None:
    """Adds the errors for the image's objects, at the levels that they are pooled from."""
    for head, pooler in (("box", case.box_pooler), ("mask", case.mask_pooler)):
        levels, sums = pooler._assign_levels([boxes]), {}
        for level, scale in enumerate(pooler.scales):
            rois = boxes.tensor[levels == level] * scale
            if len(rois) == 0:
                continue
            rois = torch.cat([torch.zeros(len(rois), 1), rois], dim=1)
            found = squared_errors(maps[level], rois, METHODS, pooler.output_size[0])
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
        table.add((head,), group, sums)


class Costs:
    """Processor time of a forward pass of the mask branch's pooler, for each way."""

    def __init__(self, case: Case) -> None:
        self._poolers = {name: WAYS[name](case.mask_pooler) for name in TIMED}
        self._seconds: dict[str, list[float]] = {name: [] for name in self._poolers}

    def add(self, maps: list[Tensor], boxes: Any) -> None:
        """Times COST_ROIS RoIs, which repeat the image's objects. Other processes do not count."""
        many = Boxes(boxes.tensor.repeat(-(-COST_ROIS // len(boxes)), 1)[:COST_ROIS])
        for name, pooler in self._poolers.items():
            start = time.process_time()
            pooler(maps, [many])
            self._seconds[name].append(time.process_time() - start)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the median over all images except the first, which is a warm-up."""
        return [
            {"way": name, "ms": round(1e3 * float(np.median(seconds[1:] or seconds)))}
            for name, seconds in self._seconds.items()
        ]


def measure(case: Case, groups: list[int]) -> dict[str, Any]:
    """Returns all rows of a case.

    Args:
        case: the model and data set.
        groups: index of the group of each image to measure.
    """
    rng = np.random.default_rng(0)
    sizes, aspects, offsets, own, costs = Table(), Table(), Table(), Table(), Costs(case)
    correlations = []
    scenes = list(case.scenes("TEST", len(groups)))
    for image, (group, scene) in enumerate(zip(groups, scenes, strict=False)):
        maps = case.maps(scene.image)
        by_size(rng, maps, group, [sizes, aspects])
        by_offset(rng, maps[0], group, offsets)
        correlations.append(correlation_of(maps[0]))
        own_rois(case, maps, scene.objects.gt_boxes, group, own)
        if image < COST_IMAGES:
            costs.add(maps, scene.objects.gt_boxes)
    correlation = np.mean(correlations, axis=0).round(4).tolist()
    return {
        "images": len(scenes),
        "strides": case.strides,
        "sizes": sizes.rows(("level", "width")),
        "aspects": aspects.rows(("aspect",)),
        "offsets": offsets.rows(("width",)),
        "own": own.rows(("head",)),
        "costs": costs.rows(),
        "bin widths": bin_widths(case, scenes),
        "correlation": correlation,
        "unread": unread_rows(),
        "theory": theory_rows(correlation),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/sampling/error_shapes.json"))
    add_case_arguments(parser)
    args = parser.parse_args()
    case = case_of(args)
    results = measure(case, group_of_each_image(args))
    print(tabulate(results["bin widths"], headers="keys", tablefmt="github"))
    for key in ("own", "sizes", "theory"):
        print(tabulate(results[key], headers="keys", tablefmt="github"))
    write_json(
        {
            **machine("cpu"),
            **case.facts,
            "name": case.name,
            "cost RoIs": COST_ROIS,
            **results,
        },
        args.output,
    )
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
