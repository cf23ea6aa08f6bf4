#!/usr/bin/env python3
"""How much features, boxes and masks change when the image moves; nothing is trained.

The content moves right and down by a fraction, and the boxes with it: an ideal detector's output
moves by the same. Two experiments on a trained model, for every way to pool:

- map: the maps move under the RoIs, by shares of a cell of the finest map (band-limited
  interpolation, which keeps amplitudes). All that changes comes from pooling.
- image: the pixels move, and the whole network runs again, so the backbone's own sampling counts.

Heads get the true boxes. "features" is the root mean square change of the mask branch's pooled
features, in percent of their root mean square; "box" how far the predicted box moves beyond the
shift, the mean over its four edges in pixels; "mask" how far the centre of the mask moves in its
box, in pixels; "IoU" that of the masks before and after, moved back. Intervals are of 95%, over
images.

Writes a table, and a JSON file with machine, versions and date. Minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from measure import machine, write_json
from sampling_case import NAMES, Case, Scene, add_case_arguments, case_of, interval, pooler_of
from tabulate import tabulate
from torch import Tensor, nn

from mask_head_plugin.evaluation.bootstrap import image_weights

CELL_SHIFTS = (0.125, 0.25, 0.5, 0.75, 1.0)
PIXEL_SHIFTS = (0.5, 1.0, 2.0, 4.0)
MEASURES = ("features", "box", "mask", "IoU")
FINE = 4
"""Points per mask pixel and axis at which two masks are compared."""


def moved(maps: Tensor, shift: float) -> Tensor:
    """Moves the content of (N, C, H, W) right and down, by cells, with band-limited interpolation.

    The map is mirrored at its borders, where Fourier's series repeats it. Whole shifts are exact.
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
    """The heads of a trained model, on maps and boxes that are given."""

    def __init__(self, case: Case) -> None:
        self._heads = case.model.roi_heads
        self.poolers: dict[str, tuple[nn.Module, nn.Module]] = {
            name: (pooler_of(name, case.box_pooler), pooler_of(name, case.mask_pooler))
            for name in NAMES
        }

    @torch.inference_mode()
    def run(
        self, name: str, maps: list[Tensor], boxes: Tensor, classes: Tensor
    ) -> dict[str, Tensor]:
        """Returns ``features`` (R, C, P, P), ``boxes`` (R, 4), ``masks`` (R, M, M) of a way."""
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
    before: dict[str, Tensor], after: dict[str, Tensor], boxes: Tensor, shift: float
) -> dict[str, np.ndarray]:
    """Returns the (R,) change of each object: squares of features, their spread, and so on.

    Args:
        before: of Branches.run.
        after: of the moved content.
        boxes: (R, 4) before the shift.
        shift: in pixels.
    """
    change = (after["features"] - before["features"]).square().flatten(1).mean(1)
    spread = before["features"].square().flatten(1).mean(1)
    box = (after["boxes"] - shift - before["boxes"]).abs().mean(1)
    sides = boxes[:, 2:] - boxes[:, :2]
    distance = (_centre(after["masks"]) - _centre(before["masks"])) * sides
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
        "mask": distance.norm(dim=1),
        "IoU": torch.where(either > 0, 100 * both / either.clamp(min=1), 100.0),
    }
    return {key: value.double().numpy() for key, value in values.items()}


def _centre(masks: Tensor) -> Tensor:
    """Returns the (R, 2) centre of masks, x and y, as shares of the box."""
    places = (torch.arange(masks.shape[-1]) + 0.5) / masks.shape[-1]
    weight = masks.sum((1, 2)).clamp(min=1e-6)
    x = (masks.sum(1) * places).sum(1) / weight
    y = (masks.sum(2) * places).sum(1) / weight
    return torch.stack([x, y], dim=1)


def inner_objects(scene: Scene, margin: float) -> Tensor:
    """Returns the indices of objects that stay in the image when moved by ``margin`` pixels."""
    boxes = scene.objects.gt_boxes.tensor
    height, width = scene.image.shape[1:]
    limit = boxes.new_tensor([width, height]) - margin
    inside = (boxes[:, :2] >= margin).all(1) & (boxes[:, 2:] <= limit).all(1)
    return torch.nonzero(inside)[:, 0]


def measure(case: Case, num_images: int, num_objects: int) -> dict[str, Any]:
    """Returns rows of both experiments; ``num_objects`` are taken of an image at most."""
    branches, found = Branches(case), {}
    stride = case.strides[0]
    for scene in case.scenes("TEST", num_images):
        chosen = inner_objects(scene, max(PIXEL_SHIFTS) + stride)[:num_objects]
        if len(chosen) == 0:
            continue
        boxes = scene.objects.gt_boxes.tensor[chosen]
        classes = scene.objects.gt_classes[chosen]
        maps = case.maps(scene.image)
        before = {name: branches.run(name, maps, boxes, classes) for name in NAMES}
        trials = [("map", cells, cells * stride) for cells in CELL_SHIFTS]
        trials += [("image", pixels, pixels) for pixels in PIXEL_SHIFTS]
        for kind, amount, pixels in trials:
            if kind == "map":
                cells = [pixels / side for side in case.strides]
                shifted = [moved(x, by) for x, by in zip(maps, cells, strict=True)]
            else:
                shifted = case.maps(moved(scene.image[None].float(), pixels)[0])
            for name in NAMES:
                after = branches.run(name, shifted, boxes + pixels, classes)
                values = changes(before[name], after, boxes, pixels)
                found.setdefault((kind, amount, name), []).append(values)
    return {"rows": [row for key, parts in found.items() for row in _rows(key, parts)]}


def _rows(key: tuple[str, float, str], parts: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    counts = np.array([len(part["box"]) for part in parts])
    sums = {name: np.array([part[name].sum() for part in parts]) for name in parts[0]}
    draws = image_weights(len(parts), 1000, seed=0)
    weights = np.concatenate([np.ones((1, len(parts)), draws.dtype), draws])
    rows = []
    for name in MEASURES:
        if name == "features":
            values = 100 * np.sqrt((weights @ sums["change"]) / (weights @ sums["spread"]))
        else:
            values = (weights @ sums[name]) / (weights @ counts)
        low, high = (round(x, 3) for x in interval(values[1:]))
        kind, amount, way = key
        rows.append(
            {
                "moved": kind,
                "by": amount,
                "way": way,
                "measure": name,
                "value": round(float(values[0]), 3),
                "low": low,
                "high": high,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("output/sampling/equivariance_shapes.json")
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--objects", type=int, default=10, help="of an image at most (default 10)")
    add_case_arguments(parser)
    args = parser.parse_args()
    case = case_of(args)
    results = measure(case, args.images, args.objects)
    shown = [row for row in results["rows"] if row["by"] == 0.5 and row["measure"] != "features"]
    print(tabulate(shown, headers="keys", tablefmt="github"))
    facts = {"name": args.name, "images": args.images, "strides": case.strides, **case.facts}
    write_json({**machine("cpu"), **facts, **results}, args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
