#!/usr/bin/env python3
"""Compares this plugin's mask branch with detectron2's and torchvision's.

head: the FCN mask head with binary cross-entropy for K classes, on 128 RoIs of 14 x 14 x 256; a
forward and backward pass, and inference. target: targets of 28 x 28 for 128 RoIs, cropped from bit
masks of 800 x 1333. step: one training step of Mask R-CNN R50-FPN with two images of 512 px, 8
polygons and 512 RoIs per image. On CUDA, two such images occupy the GPU for less time than Python
needs to launch the kernels, so a step with four images of 800 px is measured too. All steps are
also measured with contiguous weights in our model (only in the JSON file). inference: the same
model with 100 masks that fill their boxes in each of two images; the output is bit masks of 1080 px
or run lengths.

Times are medians of several runs. The implementations take turns; ratios are detectron2 / ours.
Memory is the peak that PyTorch allocates. With --busy N, N other processes compute during the
measurement.

Writes a table, a JSON file with machine, versions and date, and a plot next to it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from measure import (
    FULL,
    Sizes,
    add_busy_argument,
    add_tiny_argument,
    machine,
    median_times,
    write_results,
)
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from mask_head_plugin import load_config
from mask_head_plugin.engine import Trainer
from mask_head_plugin.machine import peak_megabytes
from mask_head_plugin.modeling import FCNMaskHead
from mask_head_plugin.ops import crop_masks
from mask_head_plugin.progress import progress, tell

ROOT = Path(__file__).resolve().parents[1]
POOLED_SIDE, MASK_SIDE, OUTPUT_SIDE = 14, 28, 1080
LARGE_STEP = "training step, four large images"

Sides = dict[str, Callable[[], object]]
Inputs = tuple[Any, ...]


class FixedTargets:
    """Masks that are already cropped, so that only head and loss are measured."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def crop_and_resize(self, *_: Any) -> Tensor:
        return self.targets


class TorchvisionHead(nn.Module):
    """torchvision's mask head and loss, with the interface of detectron2's head."""

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.head = MaskRCNNHeads(num_channels, (num_channels,) * 4, 1)
        self.predictor = MaskRCNNPredictor(num_channels, num_channels, num_classes)

    def forward(self, features: Tensor, instances: list[Instances]) -> dict[str, Tensor] | Tensor:
        logits = self.predictor(self.head(features))
        index = torch.arange(len(logits), device=logits.device)
        if not self.training:
            return logits.sigmoid()[index, instances[0].pred_classes][:, None]
        logits = logits[index, instances[0].gt_classes]
        targets = instances[0].gt_masks.targets.to(logits)
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, targets)}


def make_heads(num_channels: int, num_classes: int, device: str) -> dict[str, nn.Module]:
    shape = ShapeSpec(channels=num_channels, height=POOLED_SIDE, width=POOLED_SIDE)
    arguments = {"num_classes": num_classes, "conv_dims": [num_channels] * 5}
    heads = {
        "detectron2": MaskRCNNConvUpsampleHead(shape, **arguments),
        "torchvision": TorchvisionHead(num_channels, num_classes),
        "ours": FCNMaskHead(shape, **arguments),
    }
    return {name: head.to(device) for name, head in heads.items()}


def make_instances(num_rois: int, num_classes: int, device: str) -> Instances:
    instances = Instances((1, 1))
    instances.proposal_boxes = Boxes(torch.rand(num_rois, 4, device=device))
    instances.gt_classes = torch.randint(0, num_classes, (num_rois,), device=device)
    instances.pred_classes = instances.gt_classes
    instances.scores = torch.rand(num_rois, device=device)
    shape = (num_rois, MASK_SIDE, MASK_SIDE)
    instances.gt_masks = FixedTargets(torch.rand(shape, device=device) > 0.5)
    return instances


def train(model: nn.Module, amp: bool, device: str, *inputs: Any) -> None:
    model.zero_grad(set_to_none=True)
    with EventStorage(1), torch.autocast(device, enabled=amp):
        losses = model(*inputs)
    sum(losses.values()).backward()


@torch.no_grad()
def infer(model: nn.Module, amp: bool, device: str, make_inputs: Callable[[], Inputs]) -> None:
    with torch.autocast(device, enabled=amp):
        model(*make_inputs())


def head_sides(num_classes: int, training: bool, amp: bool, sizes: Sizes, device: str) -> Sides:
    # Poolers return these layouts: torchvision's and detectron2's contiguous, ours channels-last.
    shape = sizes.head_rois, sizes.num_channels, POOLED_SIDE, POOLED_SIDE
    features = torch.randn(shape, device=device)
    last = features.contiguous(memory_format=torch.channels_last)
    instances = make_instances(sizes.head_rois, num_classes, device)
    sides: Sides = {}
    for name, head in make_heads(sizes.num_channels, num_classes, device).items():
        x = (last if name == "ours" else features).clone(memory_format=torch.preserve_format)
        if training:
            inputs = (x.requires_grad_(), [instances])
            sides[name] = partial(train, head.train(), amp, device, *inputs)
        else:
            inputs = lambda x=x: (x, [copy.copy(instances)])  # noqa: E731  # the head adds to them
            sides[name] = partial(infer, head.eval(), amp, device, inputs)
    return sides


def target_sides(sizes: Sizes, device: str) -> Sides:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.head_rois, 2)
    low = torch.randn(sizes.head_rois, 1, 20, 30, generator=generator)
    bits = nn.functional.interpolate(low, sizes.image_hw, mode="bilinear")[:, 0] > 0
    least, greatest = sizes.roi_sides
    sides = least * (greatest / least) ** torch.rand(shape, generator=generator)
    corner = torch.rand(shape, generator=generator) * (torch.tensor(sizes.image_hw[::-1]) - sides)
    boxes = torch.cat([corner, corner + sides], dim=1).to(device)
    masks = BitMasks(bits.to(device))
    return {
        "detectron2": partial(masks.crop_and_resize, boxes, MASK_SIDE),
        "ours": partial(crop_masks, masks.tensor, boxes, MASK_SIDE),
    }


def make_model(
    num_classes: int, plugin: bool, device: str, more_opts: Sequence[str] = ()
) -> nn.Module:
    """Builds this plugin's model as train_net.py does, or else detectron2's."""
    # With frozen normalisation, a network with random weights overflows.
    opts = ["MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "BN", "MODEL.DEVICE", device]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", str(num_classes), *more_opts]
    cfg: CfgNode = load_config(str(ROOT / "configs" / "Base-MaskRCNN-FPN.yaml"), opts)
    if plugin:
        return Trainer.build_model(cfg).train()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_OUTPUT = "GeneralizedRCNN", "bitmask"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    return DefaultTrainer.build_model(cfg).train()


def make_batch(
    num_classes: int, num_images: int = 2, side: int = FULL.step_side
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(num_images):
        corner = torch.rand(8, 2, generator=generator) * side * 0.6
        boxes = torch.cat(
            [corner, corner + 40 + torch.rand(8, 2, generator=generator) * 160], dim=1
        ).clamp(max=side)
        instances = Instances((side, side))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(0, num_classes, (8,), generator=generator)
        instances.gt_masks = PolygonMasks(
            [[[x0, y0, x1, y0, x1, y1, (x0 + x1) / 2, y1]] for x0, y0, x1, y1 in boxes.tolist()]
        )
        image = torch.randint(0, 255, (3, side, side), generator=generator).float()
        batch.append({"image": image, "instances": instances})
    return batch


def make_models(num_classes: int, sizes: Sizes, device: str) -> dict[str, nn.Module]:
    """Returns detectron2's model and ours, with the same weights."""
    # With random weights, no score would reach the default threshold.
    opts = [*sizes.model_opts, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    models = {
        name: make_model(num_classes, name == "ours", device, opts)
        for name in ("detectron2", "ours")
    }
    models["ours"].load_state_dict(models["detectron2"].state_dict())
    return models


def step_sides(
    num_classes: int, amp: bool, sizes: Sizes, device: str, *, large: bool = False
) -> Sides:
    images = (4, sizes.large_step_side) if large else (2, sizes.step_side)
    batch = make_batch(num_classes, *images)
    models = make_models(num_classes, sizes, device)
    if device == "cuda":
        model = copy.deepcopy(models["ours"])
        models["contiguous"] = model.to(memory_format=torch.contiguous_format)
    return {name: partial(train, model, amp, device, batch) for name, model in models.items()}


def inference_sides(num_classes: int, amp: bool, sizes: Sizes, device: str) -> Sides:
    models = make_models(num_classes, sizes, device)
    batch = make_batch(num_classes, side=sizes.step_side)
    for model in models.values():
        use_statistics_of(model, batch)
        fill_boxes(model.roi_heads.mask_head)
    output = OUTPUT_SIDE * sizes.step_side // FULL.step_side
    images = [{"image": x["image"], "height": output, "width": output} for x in batch]
    return {
        name: partial(infer, model.eval(), amp, device, lambda: (images,))
        for name, model in models.items()
    }


@torch.no_grad()
def use_statistics_of(model: nn.Module, batch: list[dict[str, Any]]) -> None:
    """Makes inference use a batch's statistics. Without them, the network would overflow."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with EventStorage(1):
        model(batch)


@torch.no_grad()
def fill_boxes(mask_head: nn.Module) -> None:
    """Makes every mask fill its box. Random weights would produce noise, with a run per pixel."""
    mask_head.predictor.weight.zero_()
    mask_head.predictor.bias.fill_(4.0)


def settings(
    amp: bool, sizes: Sizes, device: str
) -> Iterator[tuple[str, int, Callable[[], Sides]]]:
    options = amp, sizes, device
    for num_classes in (1, 80, 1203):
        yield "head, training", num_classes, partial(head_sides, num_classes, True, *options)
        yield "head, inference", num_classes, partial(head_sides, num_classes, False, *options)
    yield "bit-mask targets", 0, partial(target_sides, sizes, device)
    for num_classes in (80, 1203):
        yield "training step", num_classes, partial(step_sides, num_classes, *options)
    if device == "cuda":
        yield LARGE_STEP, 80, partial(step_sides, 80, *options, large=True)
    yield "inference", 80, partial(inference_sides, 80, *options)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws times and memory of each side as shares of detectron2's."""
    from matplotlib.figure import Figure

    from mask_head_plugin.pages.plots import COLOURS, label_bars, save_plot

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    names = [f"{row['what']}\nK = {row['classes'] or 'any'}" for row in rows]
    for axes, unit in zip(figure.subplots(1, 2), ("ms", "mb"), strict=True):
        for k, who in enumerate(("torchvision", "ours")):
            found = [(n, row) for n, row in enumerate(rows) if f"{who}_{unit}" in row]
            shares = [row[f"{who}_{unit}"] / row[f"detectron2_{unit}"] for _, row in found]
            bars = axes.barh(
                [n + 0.4 * k for n, _ in found], shares, height=0.38, label=who, color=COLOURS[k]
            )
            label_bars(axes, bars, "%.2f")
        axes.axvline(1, color="black", linewidth=1, zorder=0)
        axes.set_yticks([n + 0.2 for n in range(len(rows))], names)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("time, share of detectron2's" if unit == "ms" else "peak memory, share")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    save_plot(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/mask_branch.json"))
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs per measurement; their median is reported"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORDS",
        help="only rows whose name contains one of these, such as 'step, K = 80'",
    )
    add_busy_argument(parser)
    add_tiny_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    names = ("detectron2", "torchvision", "ours")
    header = f"{'':18}{'classes':>8}" + "".join(f"{f'{name} ms, MB':>24}" for name in names)
    tell(header + f"{'time x':>9}{'memory x':>10}")
    chosen = [
        x
        for x in settings(args.amp, args.sizes, args.device)
        if any(words in f"{x[0]}, K = {x[1]}" for words in args.only)
    ]
    for what, num_classes, make in progress(chosen, "settings", "setting"):
        torch.manual_seed(0)
        sides = make()
        row: dict[str, Any] = {"what": what, "classes": num_classes}
        times = median_times(list(sides.values()), args.repeats, args.device, busy=args.busy)
        peaks = {name: peak_megabytes(step, args.device) for name, step in sides.items()}
        for name, time in zip(sides, times, strict=True):
            row[f"{name}_ms"], row[f"{name}_mb"] = round(time, 2), round(peaks[name], 3)
        row["time_ratio"] = round(row["detectron2_ms"] / row["ours_ms"], 2)
        row["memory_share"] = round(peaks["ours"] / peaks["detectron2"], 3)
        rows.append(row)
        cells = "".join(
            f"{row[f'{n}_ms']:>13}{row[f'{n}_mb']:>11}" if f"{n}_ms" in row else " " * 24
            for n in names
        )
        ratios = f"{row['time_ratio']:>8}x{row['memory_share']:>10}"
        tell(f"{what:18}{num_classes or '':>8}{cells}{ratios}")
    results = {
        **machine(args.device),
        "repeats": args.repeats,
        "threads": args.threads,
        "busy": args.busy,
        "amp": args.amp,
        "rows": rows,
    }
    write_results(results, args.output, plot)


if __name__ == "__main__":
    main()
