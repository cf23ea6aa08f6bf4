"""Models in several processes: wrapped, unwrapped, and with equal buffers."""

from __future__ import annotations

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn


def distribute(model: nn.Module, *, in_parts: bool = False) -> nn.Module:
    """Returns the model, in DistributedDataParallel if there are several processes.

    Parameters without a gradient, such as those of a pyramid level that no head reads, are looked
    for in the first step only. They must be the same in every step.

    Args:
        model: on its device.
        in_parts: whether gradients of several backward passes are shared at once, by ``no_sync``.
            Parameters without a gradient are then looked for in each step, because PyTorch's static
            graph would have to share the first pass, which differs in a resumed run.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    devices = None if on_cpu or comm.get_world_size() == 1 else [comm.get_local_rank()]
    # After its first step, PyTorch adds up gradients in another order. A resumed run would change
    # orders at another step, and from three processes on the sums would be rounded differently. But
    # runs on the CPU resume bit by bit.
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

    Each process has averaged its own, and the checkpoint holds the first's. Without this, an
    evaluation in several processes would describe a model that nobody has.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def undistributed(model: nn.Module) -> nn.Module:
    """Returns the model that may be in DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
