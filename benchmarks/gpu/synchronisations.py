#!/usr/bin/env python3
"""Finds where training and inference wait for the GPU, in detectron2's model and the plugin's.

torch.cuda.set_sync_debug_mode warns about each wait. A wait is attributed to the innermost file of
detectron2 or the plugin in its call stack; waits in the backward pass count as "backward pass".
PyTorch does not warn about every kind of wait, so the counts are lower bounds. Training steps are
run by detectron2's SimpleTrainer or AMPTrainer and include the optimizer and the logging of losses;
the plugin's steps also include StepGuard. The model is R50-FPN, on two images of 512 px with 8
objects each.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage
from mask_branch import inference_sides, make_batch, make_models
from measure import Sizes, add_tiny_argument, machine, write_json
from roi_pooling import comparisons
from torch import nn

from mask_head_plugin import load_config
from mask_head_plugin.engine.guards import StepGuard

PACKAGES = ("detectron2", "mask_head_plugin")
NUM_CLASSES = 80
SIDES = ("detectron2", "ours")


@contextlib.contextmanager
def counted_waits(device: str) -> Iterator[Counter[str]]:
    """Counts the operations that wait for the device, by file."""
    counts: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            counts[place_of(sys._getframe(1))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def place_of(frame: FrameType | None) -> str:
    """Returns the file that a wait is attributed to, or "backward pass" if its file is unknown."""
    in_backward = False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        in_backward = in_backward or path.parts[-3:] == ("torch", "autograd", "graph.py")
        for package in PACKAGES:
            if package in path.parts:
                last = len(path.parts) - 1 - path.parts[::-1].index(package)
                inside = "/".join(path.parts[last:])
                return f"backward pass ({inside})" if in_backward else inside
        frame = frame.f_back
    return "backward pass" if in_backward else "elsewhere"


def training_step(
    model: nn.Module, guarded: bool, masks: str, amp: bool, sizes: Sizes
) -> Callable[[], None]:
    """Returns a function that runs a step of detectron2's SimpleTrainer or AMPTrainer."""
    batch = make_batch(NUM_CLASSES, side=sizes.step_side)
    if masks == "bit masks":
        for sample in batch:
            objects = sample["instances"]
            polygons, hw = objects.gt_masks.polygons, objects.image_size
            objects.gt_masks = BitMasks.from_polygon_masks(polygons, *hw)
    # With this small learning rate, the losses of random weights stay finite.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9)
    trainer = (AMPTrainer if amp else SimpleTrainer)(model, itertools.repeat(batch), optimizer)
    if guarded:
        cfg = load_config("", ["OUTPUT_DIR", tempfile.gettempdir()])
        trainer.register_hooks([StepGuard(model, cfg)])
    trainer.iter = 0

    def step() -> None:
        with EventStorage(0) as trainer.storage:
            trainer.run_step()

    return step


def pooler_step(side: str, sizes: Sizes, device: str) -> Callable[[], None]:
    """Returns a function that runs RoI pooling forward and backward."""
    size = sizes.pooled_sides[0]
    found = next(comparisons(size, 0, "contiguous_format", 2, sizes, device))
    pool = found.ours if side == "ours" else found.stock
    return lambda: pool().sum().backward()


def settings(
    sizes: Sizes, device: str
) -> Iterator[tuple[str, Callable[[str], Callable[[], object]]]]:
    models = make_models(NUM_CLASSES, sizes, device)
    kinds = [("polygons", False), ("bit masks", False)]
    if device == "cuda":  # AMPTrainer needs CUDA
        kinds.append(("bit masks", True))
    for masks, amp in kinds:

        def step(side: str, masks: str = masks, amp: bool = amp) -> Callable[[], None]:
            return training_step(models[side], side == "ours", masks, amp, sizes)

        yield f"training step, {masks}{', AMP' * amp}", step
    yield "inference", lambda side: inference_sides(NUM_CLASSES, False, sizes, device)[side]
    yield "RoI pooling, forward and backward", lambda side: pooler_step(side, sizes, device)


def count(make: Callable[[str], Callable[[], object]], device: str) -> dict[str, Counter[str]]:
    counts = {}
    for side in SIDES:
        torch.manual_seed(0)
        step = make(side)
        for _ in range(2):  # for work that is done only once, such as compiling kernels
            step()
        with counted_waits(device) as counts[side]:
            step()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    add_tiny_argument(parser)
    args = parser.parse_args()
    results: dict[str, Any] = {**machine(args.device), "totals": [], "rows": []}
    for what, make in settings(args.sizes, args.device):
        try:
            counts = count(make, args.device)
        except Exception as error:  # the other measurements still run
            traceback.print_exc()
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            results["rows"].append({"what": what, "file": told})
            continue
        if args.device != "cuda":
            results["rows"].append({"what": what, "file": "not measured: no CUDA"})
            continue
        results["totals"].append({"what": what, **{x: counts[x].total() for x in SIDES}})
        files = sorted({*counts["detectron2"], *counts["ours"]})
        results["rows"].append({"what": what, "file": "all", **results["totals"][-1]})
        results["rows"] += [
            {"what": what, "file": file, **{x: counts[x][file] for x in SIDES}} for file in files
        ]
        print(results["totals"][-1], flush=True)
        write_json(results, args.output)
    write_json(results, args.output)


if __name__ == "__main__":
    main()
