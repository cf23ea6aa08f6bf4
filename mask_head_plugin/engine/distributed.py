"""A model in several processes: wrapped, unwrapped, and with the same buffers."""

from __future__ import annotations

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn


def distribute(model: nn.Module, *, in_parts: bool = False) -> nn.Module:
    """Returns the model in DistributedDataParallel if there are several processes.

    Parameters without a gradient, as of a level of the pyramid that no head reads, are looked for
    in the first step only. Which have one must not change from step to step.

    Args:
        model: on its device.
        in_parts: whether gradients of several backward passes are shared at once, by ``no_sync``.
            Such parameters are then looked for in each step: PyTorch's static graph would have to
            share the first pass's, which in a resumed run is that of another step.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    devices = None if on_cpu or comm.get_world_size() == 1 else [comm.get_local_rank()]
    # After the first step gradients are added up in another order, and so they would be after a
    # run's first step and not yet after the step of a resumed one. Of three processes on, sums of
    # other rounding: runs on the CPU are resumed bit by bit.
    keep_order = in_parts or (on_cpu and comm.get_world_size() > 2)
    return create_ddp_model(
        model,
        broadcast_buffers=False,
        device_ids=devices,
        static_graph=not keep_order,
        find_unused_parameters=keep_order,
    )


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the batch statistics of the first.

    Each has averaged its own, and the first's are in the checkpoint: without this, evaluation in
    several processes would describe a model that nobody has.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def undistributed(model: nn.Module) -> nn.Module:
    """Returns the model that may be in DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
