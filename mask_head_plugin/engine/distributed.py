"""Wraps and unwraps models that train in several processes, and synchronises their buffers."""

from __future__ import annotations

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn


def distribute(model: nn.Module, *, in_parts: bool = False) -> nn.Module:
    """Wraps the model in DistributedDataParallel if there are several processes.

    PyTorch determines in the first iteration which parameters get no gradient, for example those of
    a pyramid level that no head reads. This must not change in later iterations.

    Args:
        model: already on its device.
        in_parts: whether the gradients of several backward passes are exchanged together, with
            ``no_sync``. PyTorch then determines in every iteration which parameters get no
            gradient. The alternative, a static graph, would have to exchange gradients after the
            very first backward pass, and in a resumed run that is a different pass.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    devices = None if on_cpu or comm.get_world_size() == 1 else [comm.get_local_rank()]
    # After the first iteration, a static graph adds gradients in a different order. In a resumed
    # run, the order changes at a different iteration, which affects the rounding of sums over three
    # or more processes. But resumed runs on the CPU must match uninterrupted ones bit for bit.
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

    Each process averages the statistics of its own batches, but a checkpoint contains only those of
    the first process. Without this copy, an evaluation in several processes would not match the
    checkpoint.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def undistributed(model: nn.Module) -> nn.Module:
    """Unwraps a model from DistributedDataParallel; returns any other model unchanged."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
