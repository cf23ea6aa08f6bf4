"""Wraps and unwraps models that train in several processes, and synchronises their buffers."""

from __future__ import annotations

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn


def distribute(model: nn.Module, *, in_parts: bool = False) -> nn.Module:
    """Wraps the model in DistributedDataParallel if there are several processes.

    Which parameters have no gradient, such as those of a pyramid level that no head reads, is
    determined only in the first iteration, so it must not change later.

    Args:
        model: already on its device.
        in_parts: whether gradients of several backward passes are exchanged together, with
            ``no_sync``. Which parameters have no gradient is then determined in every iteration,
            because PyTorch's static graph would have to exchange the gradients of the very first
            backward pass, which is a different one in a resumed run.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    devices = None if on_cpu or comm.get_world_size() == 1 else [comm.get_local_rank()]
    # With a static graph, PyTorch changes the order in which it adds gradients after the first
    # iteration. In a resumed run, this happens at a different iteration, which changes the rounding
    # of sums over three or more processes. But resumed runs on the CPU must match bit for bit.
    keep_order = in_parts or (on_cpu and comm.get_world_size() > 2)
    return create_ddp_model(
        model,
        broadcast_buffers=False,
        device_ids=devices,
        static_graph=not keep_order,
        find_unused_parameters=keep_order,
    )


def share_buffers(model: nn.Module) -> None:
    """Copies the batch statistics of the first process to all others.

    Each process averages its own statistics, but the checkpoint contains those of the first
    process. Without this copy, an evaluation in several processes would not match the checkpoint.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def undistributed(model: nn.Module) -> nn.Module:
    """Unwraps a model from DistributedDataParallel; returns any other model unchanged."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
