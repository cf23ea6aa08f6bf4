"""Runs a few iterations of a config to estimate its time and memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage

from ..engine.trainer import Trainer

UNTIMED, TIMED = 2, 6
EVALUATED = 3


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a training run.

    Attributes:
        seconds_per_iteration: median of the measured iterations.
        seconds_per_image: time per image in an evaluation; 0 without validation data.
        memory: peak memory in bytes, of the GPU if the model is on a GPU, otherwise of the process.
    """

    seconds_per_iteration: float
    seconds_per_image: float
    memory: float


def try_config(cfg: CfgNode) -> Estimate:
    """Trains a few iterations from random weights, evaluates a few images, and measures the cost.

    Args:
        cfg: a config whose data sets are registered.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0  # starting workers would take longer than the iterations
    cfg.MODEL.WEIGHTS = ""  # avoids a download
    cfg.SOLVER.BASE_LR = 1e-6  # without warm-up, a higher rate could diverge
    model = Trainer.build_model(cfg)
    loader = Trainer.build_train_loader(cfg)
    loader.go_to(0, 0)
    trainer = SimpleTrainer(model, loader, Trainer.build_optimizer(cfg, model))
    times = []
    with EventStorage(0):
        for _ in range(UNTIMED + TIMED):
            start = time.perf_counter()
            trainer.run_step()
            _wait(cfg)
            times.append(time.perf_counter() - start)
    seconds = float(np.median(times[UNTIMED:]))
    return Estimate(seconds, _seconds_per_image(cfg, model), _peak_memory(cfg))


def _seconds_per_image(cfg: CfgNode, model: torch.nn.Module) -> float:
    if not cfg.DATASETS.TEST:
        return 0.0
    model.eval()
    times = []
    with torch.no_grad():
        loader = iter(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]))
        for inputs in (x for x, _ in zip(loader, range(EVALUATED), strict=False)):
            start = time.perf_counter()
            model(inputs)
            _wait(cfg)
            times.append(time.perf_counter() - start)
    return float(np.mean(times))


def _wait(cfg: CfgNode) -> None:
    if cfg.MODEL.DEVICE.startswith("cuda"):
        torch.cuda.synchronize()


def _peak_memory(cfg: CfgNode) -> float:
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return float(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
