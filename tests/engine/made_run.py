"""Code that the processes of a test run: they train briefly, fail, or get killed.

torchrun runs this file as a script: ``made_run.py OUTPUT`` calls train.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from conftest import random_instances, small_config
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from mask_head_plugin import ConfigError
from mask_head_plugin.engine import launch
from mask_head_plugin.engine.distributed import distribute, share_buffers

NUM_STEPS = 2


@contextlib.contextmanager
def in_one_process(folder: Path) -> Iterator[None]:
    """Makes this process the only member of a group: DistributedDataParallel needs a group."""
    place = {"store": dist.FileStore(str(folder / "store"), 1), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **place)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_model(timm_name: str = "") -> torch.nn.Module:
    """Builds a detector with a small ResNet or a named timm backbone."""
    torch.manual_seed(1)
    opts = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", timm_name]
    return build_model(small_config("Base-MaskRCNN-FPN.yaml", *(opts if timm_name else [])))


def losses_of_step(model: torch.nn.Module, step: int, rank: int) -> torch.Tensor:
    """Returns the losses of a rank's half of the batch, with that rank's random numbers."""
    rng = np.random.default_rng(10 * step + rank)
    height, width = 64, 64 + 32 * rank
    image = torch.as_tensor(rng.integers(0, 256, (3, height, width)), dtype=torch.uint8)
    instances = random_instances(3 + rank, (height, width), 5, rng, "bitmask")
    torch.manual_seed(10 * step + rank)
    record = {"image": image, "height": height, "width": width, "instances": instances}
    with EventStorage(step):
        losses = model([record])
    return torch.stack([losses[name] for name in sorted(losses)])


def step_down(model: torch.nn.Module) -> None:
    """Updates the weights by gradient descent."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
                parameter.grad = None


def train(output: str, die_at_first: bool = False, timm_name: str = "") -> None:
    """Trains and saves facts about the run, including the losses of each step.

    The losses are averaged over processes.
    """
    again = launch.restarted(output)
    if die_at_first and not again and comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a different order of addition would change proposals
    model = make_model(timm_name)
    model.unread = torch.nn.Linear(1, 1)  # like an unused level of the pyramid
    wrapped = distribute(model)
    means = []
    for step in range(NUM_STEPS):
        losses = losses_of_step(wrapped, step, comm.get_rank())
        losses.sum().backward()
        means.append(losses.detach() / comm.get_world_size())
        dist.all_reduce(means[-1])
        step_down(model)
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(comm.get_rank() + 3)
    share_buffers(norm)
    shared = comm.gather(norm.running_mean.item())
    if comm.is_main_process():
        facts = {
            "shared": shared,
            "searches": wrapped.find_unused_parameters,
            "unread": model.unread.weight.grad,
            "losses": torch.stack(means),
            "world_size": comm.get_world_size(),
            "local_size": comm.get_local_size(),
            "backend": dist.get_backend(),
            "threads": threads,
            "restarted": again,
        }
        torch.save(facts, Path(output) / "facts.pth")


def fail(how: str) -> None:
    """Fails in process 1 while process 0 waits for it."""
    torch.ones(1)
    if comm.get_rank() == 1:
        match how:
            case "config":
                raise ConfigError("x.json is broken; fix it")
            case "error":
                raise RuntimeError("simulated failure")
            case "exit":
                sys.exit(7)
            case _:
                os.kill(os.getpid(), signal.Signals[how])
    dist.barrier()


if __name__ == "__main__":
    launch.launch(train, 1, args=(sys.argv[1], True), device="cpu")
