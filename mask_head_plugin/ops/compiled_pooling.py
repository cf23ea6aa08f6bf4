"""RoI pooling for torch.compile: wraps the operators of roi_pooling as one node of a graph.

How roi_pooling splits its work depends on the boxes, which a graph cannot express. A compiled
program therefore calls ``torch.ops.mask_head_plugin.pool_rois``, which runs the same code outside
the graph. The backward pass of this operator repeats its forward pass.

Shape alphabet: see roi_pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .roi_pooling import precise_roi_pool, roi_align, roi_pool, roi_warp

_OPERATORS = {x.__name__: x for x in (roi_align, roi_warp, precise_roi_pool, roi_pool)}

_ARGUMENTS = (
    "Tensor[] maps, Tensor rois, Tensor levels, SymInt[] output_size, float[] scales, str name, "
    "int sampling_ratio, bool aligned, str reduction"
)


def _pooled(
    maps: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: Sequence[int],
    scales: Sequence[float],
    name: str,
    sampling_ratio: int,
    aligned: bool,
    reduction: str,
) -> Tensor:
    """Calls an operator of roi_pooling.

    Args:
        maps: L maps (N, C, Hi, Wi).
        rois: (R, 5).
        levels: (R,).
        output_size: (P, Q).
        scales: cells per pixel of each map.
        name: name of the operator. Of the options below, those that it does not accept are ignored.
        sampling_ratio: see roi_align.
        aligned: see roi_align.
        reduction: see roi_align.

    Returns:
        (R, C, P, Q) in channels_last layout, with the operator's gradients.
    """
    options: dict[str, Any] = {}
    if name in ("roi_align", "roi_warp"):
        options = {"sampling_ratio": sampling_ratio, "reduction": reduction}
    if name in ("roi_align", "precise_roi_pool"):
        options["aligned"] = aligned
    operator: Any = _OPERATORS[name]
    pooled: Tensor = operator(maps, rois, tuple(output_size), scales, levels=levels, **options)
    # The strides must equal those of new_bins, even for sides of 1, and an output must not share
    # memory with an input.
    bins = pooled.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return bins.permute(0, 3, 1, 2)


pool_rois = torch.library.custom_op(
    "mask_head_plugin::pool_rois", _pooled, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)


@pool_rois.register_fake
def new_bins(
    maps: Sequence[Tensor], rois: Tensor, _levels: Tensor, output_size: Sequence[int], *_: Any
) -> Tensor:
    """Returns an uninitialised (R, C, P, Q) tensor in channels_last layout."""
    bins = maps[0].new_empty(rois.shape[0], *output_size, maps[0].shape[1])
    return bins.permute(0, 3, 1, 2)


@torch.library.custom_op(
    "mask_head_plugin::pool_rois_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> Tensor[]",
)
def _gradients(grad: Tensor, maps: Sequence[Tensor], rois: Tensor, *options: Any) -> list[Tensor]:
    """Returns the gradients of the maps and the RoIs; zeros for inputs that have no gradient."""

    def differentiate() -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (*maps, rois)]
        pooled = _pooled(inputs[:-1], inputs[-1], *options)
        found = torch.autograd.grad(pooled, inputs, grad, allow_unused=True)
        pairs = zip((*maps, rois), found, strict=True)
        return [
            torch.zeros_like(x) if d is None else torch.empty_like(x).copy_(d) for x, d in pairs
        ]

    # Autograd is disabled inside an operator, but not in a new thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(differentiate).result()


@_gradients.register_fake
def _new_gradients(_grad: Tensor, maps: Sequence[Tensor], rois: Tensor, *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in (*maps, rois)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  # by name
    maps, rois, levels, *ctx.options = inputs
    ctx.save_for_backward(rois, levels, *maps)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels, *maps = ctx.saved_tensors
    *d_maps, d_rois = _gradients(grad, maps, rois, levels, *ctx.options)
    return d_maps, d_rois, *[None] * 7


pool_rois.register_autograd(_backward, setup_context=_setup_context)
