#!/usr/bin/env python3
"""Measures how much features, boxes and masks change when the image moves; trains nothing.

The content moves right and down by the same distance, and the boxes move with it: an ideal
detector's output would move by as much. Two experiments on a trained model, for every way to pool:

- map: the maps move under the RoIs, by fractions of a cell of the finest map (band-limited
  interpolation, which keeps amplitudes). Every change comes from pooling.
- image: the pixels move and the whole network runs again, so sampling in the backbone counts too.

"image minus map" is the difference between the two experiments for moves of the same number of
pixels. The heads get the true boxes. "features" is the root mean square change of the mask branch's
pooled features, in percent of their root mean square. "box" is how far the predicted box is from
where the shift would put it, in pixels, as a mean over its four edges. "IoU" is the IoU of the mask
before the move with the mask after it, moved back, in percent.

Intervals of 95% cover the images (jackknife and Student's t). "low" and "high" bound a single
value. "difference" is a way's value minus that of four samples, for the same objects; its intervals
hold jointly for all ways.

Writes a table, and a JSON file with machine, versions and date. Takes minutes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from measure import machine, write_json
from sampling_case import BASELINE, WAYS, Case, Scene, add_case_arguments, case_of, over_images
from tabulate import tabulate
from torch import Tensor, nn

CELL_SHIFTS = (0.25, 0.5, 0.75, 1.0)
PIXEL_SHIFTS = (1.0, 2.0, 4.0)
MEASURES = ("features", "box", "IoU")
FINE = 4
"""Number of points per mask pixel and axis at which two masks are compared."""


def moved(maps: Tensor, shift: float) -> Tensor:
    """Moves the content of (N, C, H, W) right and down, by cells, with band-limited interpolation.

    A Fourier series repeats the map beyond its borders, so the map is mirrored at its borders
    first. Shifts by integer numbers of cells are exact.
    """
    height, width = maps.shape[2:]
    mirrored = torch.cat([maps, maps.flip(2)], dim=2)
    mirrored = torch.cat([mirrored, mirrored.flip(3)], dim=3)
    y = torch.fft.fftfreq(2 * height)[:, None]
    x = torch.fft.rfftfreq(2 * width)
    phase = torch.exp(-2j * torch.pi * shift * (y + x))
    spectrum = torch.fft.rfft2(mirrored) * phase
    return torch.fft.irfft2(spectrum, s=mirrored.shape[2:])[:, :, :height, :width]


class Branches:
    """Runs the heads of a trained model on given maps and boxes."""

    def __init__(self, case: Case) -> None:
        self._heads = case.model.roi_heads
        self.poolers: dict[str, tuple[nn.Module, nn.Module]] = {
            name: (make(case.box_pooler), make(case.mask_pooler)) for name, make in WAYS.items()
        }

    @torch.inference_mode()
    def run(
        self, name: str, maps: list[Tensor], boxes: Tensor, classes: Tensor
    ) -> dict[str, Tensor]:
        """Returns ``features`` (R, C, P, P), ``boxes`` (R, 4), ``masks`` (R, M, M) for a way."""
        box_pooler, mask_pooler = self.poolers[name]
        hidden = self._heads.box_head(box_pooler(maps, [Boxes(boxes)]))
        proposals = Instances((1, 1), proposal_boxes=Boxes(boxes))
        outputs = self._heads.box_predictor(hidden)
        predicted = self._heads.box_predictor.predict_boxes(outputs, [proposals])[0]
        if predicted.shape[1] > 4:
            predicted = predicted.view(len(boxes), -1, 4)[torch.arange(len(boxes)), classes]
        features = mask_pooler(maps, [Boxes(boxes)])
        masks = self._heads.mask_head.selected_logits(features, classes).sigmoid()
        return {"features": features, "boxes": predicted, "masks": masks}


def changes(
    before: dict[str, Tensor], after: dict[str, Tensor], shift: float
) -> dict[str, np.ndarray]:
    """Returns four (R,) arrays that compare the results before and after a move.

    "change" and "spread" are the mean square of the features' change and of the features before the
    move. "box" and "IoU" are explained at the top of this file.

    Args:
        before: the result of Branches.run for the original content.
        after: the same for the moved content.
        shift: how far the content was moved, in pixels.
    """
    change = (after["features"] - before["features"]).square().flatten(1).mean(1)
    spread = before["features"].square().flatten(1).mean(1)
    box = (after["boxes"] - shift - before["boxes"]).abs().mean(1)
    fine = [
        nn.functional.interpolate(x["masks"][:, None], scale_factor=FINE, mode="bilinear") > 0.5
        for x in (before, after)
    ]
    both = (fine[0] & fine[1]).flatten(1).sum(1)
    either = (fine[0] | fine[1]).flatten(1).sum(1)
    values = {
        "change": change,
        "spread": spread,
        "box": box,
        "IoU": torch.where(either > 0, 100 * both / either.clamp(min=1), 100.0),
    }
    return {key: value.double().numpy() for key, value in values.items()}


def inner_objects(scene: Scene, margin: float) -> Tensor:
    """Returns the indices of objects that stay in the image when moved by ``margin`` pixels."""
    boxes = scene.objects.gt_boxes.tensor
    height, width = scene.image.shape[1:]
    limit = boxes.new_tensor([width, height]) - margin
    inside = (boxes[:, :2] >= margin).all(1) & (boxes[:, 2:] <= limit).all(1)
    return torch.nonzero(inside)[:, 0]


Key = tuple[str, float, str]
"""What moves, by how much, and the way to pool."""


def measure(case: Case, num_images: int, num_objects: int) -> dict[str, Any]:
    """Returns rows of both experiments, which use at most ``num_objects`` objects per image."""
    branches, stride = Branches(case), case.strides[0]
    found: dict[Key, list[dict[str, float]]] = {}
    levels: list[int] = []
    for scene in case.scenes("TEST", num_images):
        chosen = inner_objects(scene, max(PIXEL_SHIFTS) + stride)[:num_objects]
        if len(chosen) == 0:
            continue
        boxes = scene.objects.gt_boxes.tensor[chosen]
        classes = scene.objects.gt_classes[chosen]
        levels += case.mask_pooler._assign_levels([Boxes(boxes)]).tolist()
        maps = case.maps(scene.image)
        before = {name: branches.run(name, maps, boxes, classes) for name in WAYS}
        trials = [("map", cells, cells * stride) for cells in CELL_SHIFTS]
        trials += [("image", pixels, pixels) for pixels in PIXEL_SHIFTS]
        for kind, amount, pixels in trials:
            if kind == "map":
                cells = [pixels / side for side in case.strides]
                shifted = [moved(x, by) for x, by in zip(maps, cells, strict=True)]
            else:
                shifted = case.maps(moved(scene.image[None].float(), pixels)[0])
            for name in WAYS:
                after = branches.run(name, shifted, boxes + pixels, classes)
                values = changes(before[name], after, pixels)
                of_image = {key: float(value.sum()) for key, value in values.items()}
                of_image["objects"] = len(boxes)
                found.setdefault((kind, amount, name), []).append(of_image)
    sums = {
        key: {name: np.array([part[name] for part in parts]) for name in parts[0]}
        for key, parts in found.items()
    }
    return {
        "images used": len(next(iter(sums.values()))["objects"]),
        "objects": len(levels),
        "objects by stride": {
            str(side): levels.count(level) for level, side in enumerate(case.strides)
        },
        "rows": [row for key in sums for row in _rows(key, sums)]
        + [row for name in WAYS for row in _image_minus_map(name, sums, stride)],
    }


def _statistic(sums: dict[str, np.ndarray], measure: str, weights: np.ndarray) -> np.ndarray:
    """Returns (S,) values of a measure, for (S, N) weights of the images."""
    if measure == "features":
        return np.asarray(100 * np.sqrt((weights @ sums["change"]) / (weights @ sums["spread"])))
    return np.asarray((weights @ sums[measure]) / (weights @ sums["objects"]))


def _rows(key: Key, sums: dict[Key, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Returns a row for each measure."""
    own, base = sums[key], sums[(*key[:2], BASELINE)]
    size, rows = len(own["objects"]), []
    for name in MEASURES:
        value = over_images(partial(_statistic, own, name), size)
        change = over_images(
            lambda w, name=name: _statistic(own, name, w) - _statistic(base, name, w),
            size,
            len(WAYS) - 1,
        )
        rows.append(_row(key, name, value, change))
    return rows


def _image_minus_map(
    name: str, sums: dict[Key, dict[str, np.ndarray]], stride: int
) -> list[dict[str, Any]]:
    """Returns rows with the change from moving the image minus that from moving the maps."""
    rows = []
    for pixels in PIXEL_SHIFTS:
        image, maps = (
            sums.get((kind, by, name)) for kind, by in (("image", pixels), ("map", pixels / stride))
        )
        for measure in MEASURES if image and maps else ():
            found = over_images(
                lambda w, image=image, maps=maps, measure=measure: (
                    _statistic(image, measure, w) - _statistic(maps, measure, w)
                ),
                len(image["objects"]),
            )
            rows.append(_row(("image minus map", pixels, name), measure, found, [math.nan] * 3))
    return rows


def _row(key: Key, measure: str, value: Sequence[float], change: Sequence[float]) -> dict[str, Any]:
    names = ("value", "low", "high", "difference", "difference low", "difference high")
    moved_by = dict(zip(("moved", "by", "way"), key, strict=True))
    numbers = {
        name: None if math.isnan(x) else round(x, 3)
        for name, x in zip(names, (*value, *change), strict=True)
    }
    return {**moved_by, "measure": measure, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("output/sampling/equivariance_shapes.json")
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument(
        "--objects", type=int, default=10, help="largest number of objects per image (default 10)"
    )
    add_case_arguments(parser)
    args = parser.parse_args()
    case = case_of(args)
    results = measure(case, args.images, args.objects)
    shown = [row for row in results["rows"] if row["moved"] == "map" and row["by"] == 0.5]
    print(tabulate(shown, headers="keys", tablefmt="github"))
    facts = {"name": args.name, "images": args.images, "strides": case.strides, **case.facts}
    write_json({**machine("cpu"), **facts, **results}, args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
