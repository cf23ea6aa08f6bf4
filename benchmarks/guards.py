#!/usr/bin/env python3
"""Measures the cost of exact resume and of the guards in a training step.

step: forward pass, backward pass and SGD update of Mask R-CNN R50-FPN with two images of 512 px,
and of the embedded data set's small model with four images of 96 px. guard: the check of losses and
gradients before the weights change. seeds: setting the seeds for the step and for each image, and
restoring the random generators.

Times are medians of several alternating runs. Writes a table, and a JSON file with machine,
versions and date.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from mask_branch import make_batch
from measure import (
    Sizes,
    add_busy_argument,
    add_tiny_argument,
    machine,
    median_times,
    write_json,
)
from tabulate import tabulate
from torch import nn

from mask_head_plugin import load_config
from mask_head_plugin.data import seed_generators
from mask_head_plugin.data.train_loader import kept_generators, seed_cpu_generators
from mask_head_plugin.engine import Trainer
from mask_head_plugin.engine.guards import StepGuard

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# With frozen normalisation, a network with random weights overflows.
OPTS = ["MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "BN"]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[dict[str, Any]]) -> None:
    with EventStorage():
        losses = sum(model(batch).values())
    optimizer.zero_grad()
    losses.backward()
    optimizer.step()


def draw_seeds(num_images: int) -> None:
    seed_generators(1, 2, 3)
    with kept_generators():
        for slot in range(num_images):
            seed_cpu_generators(1, 2, 3, slot)


def models(sizes: Sizes) -> list[tuple[str, int, int, list[str]]]:
    """Returns each model's config, number of images, their side length, and options."""
    return [
        ("Base-MaskRCNN-FPN.yaml", 2, sizes.step_side, list(sizes.model_opts)),
        ("shapes/mask_rcnn_shapes.yaml", 4, 96, []),
    ]


def measure(
    config: str, num_images: int, side: int, opts: list[str], device: str, repeats: int, busy: int
) -> dict[str, Any]:
    # With this small learning rate, the guard, which is also active here, never stops the run.
    opts = [*OPTS, *opts, "MODEL.DEVICE", device, "SOLVER.BASE_LR", "1e-8"]
    cfg: CfgNode = load_config(str(CONFIGS / config), opts)
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    trainer = SimpleTrainer(model, None, optimizer)
    guard = StepGuard(model, cfg)
    trainer.register_hooks([guard])
    batch = make_batch(cfg.MODEL.ROI_HEADS.NUM_CLASSES, num_images, side)
    steps = [
        partial(train, model, optimizer, batch),
        guard.after_backward,
        partial(draw_seeds, num_images),
    ]
    step, guarded, seeds = median_times(steps, repeats, device, busy=busy)
    return {
        "model": f"{Path(config).stem}, {num_images} x {side} px",
        "step_ms": round(step, 2),
        "guard_ms": round(guarded, 3),
        "seeds_ms": round(seeds, 3),
        "percent_of_step": round(100 * (guarded + seeds) / step, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/guards.json"))
    parser.add_argument(
        "--repeats", type=int, default=10, help="runs per measurement; their median is reported"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    add_busy_argument(parser)
    add_tiny_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(*x, args.device, args.repeats, args.busy) for x in models(args.sizes)]
    print(tabulate(rows, headers="keys", tablefmt="github"))
    results = {
        **machine(args.device),
        "threads": args.threads,
        "busy": args.busy,
        "rows": rows,
    }
    write_json(results, args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
