"""RoIAlign from all feature maps of a pyramid as one PyTorch operator, for CUDA.

``torch.ops.mask_head_plugin.multilevel_roi_align`` has a gradient and a fake kernel, so
torch.compile and torch.export treat it as a single operator. CUDA graphs can contain it, because it
copies nothing to the device and never synchronises. The kernel is in roi_pooling_triton.

Shape alphabet: see roi_pooling_triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import roi_pooling_triton as kernels
from .compiled_pooling import new_bins

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def multilevel_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign that pools each RoI from its own map; equal to ops.roi_align up to rounding.

    Values are not checked, because that would require synchronising with the device: coordinates
    must be finite, image indices in [0, N) and levels in [0, L). RoIs get no gradient.

    Args:
        features: L maps (N, C, Hi, Wi) of float32, float16 or bfloat16, at most
            roi_pooling_triton.MAX_MAPS. Maps that are not channels_last are copied, because on a
            contiguous map every load in the kernel would touch 32 cache lines.
        rois: (R, 5): image index, x0, y0, x1, y1 in pixels of the model's input.
        levels: (R,) integers in [0, L).
        output_size: (P, Q).
        spatial_scales: cells per pixel of each map.
        sampling_ratio: samples per bin and axis; 0 or less means ``ceil(RoI side / P)``.
        aligned: True puts pixel centres at +0.5. False puts them at whole numbers, and widens sides
            below one cell to one cell.

    Returns:
        (R, C, P, Q) in the dtype of ``features`` and in channels_last layout, differentiable in
        ``features``.

    Raises:
        ValueError: if a dtype, device or shape is wrong.
    """
    if not 0 < len(features) == len(spatial_scales) <= kernels.MAX_MAPS:
        raise ValueError(
            f"got {len(features)} feature maps and {len(spatial_scales)} scales; pass the same "
            f"number of each, 1 to {kernels.MAX_MAPS}"
        )
    first = features[0]
    for x in features:
        alike = x.dtype == first.dtype and x.device == rois.device == levels.device
        if not alike or x.dtype not in _TYPES or x.shape[:2] != first.shape[:2]:
            raise ValueError(
                "feature maps must agree in N, C, type (float32, float16, bfloat16) and device "
                f"(that of rois and levels), not {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    if rois.dim() != 2 or rois.shape[1] != 5 or levels.shape != rois.shape[:1]:
        raise ValueError(
            f"rois must be (R, 5) and levels (R,), not {tuple(rois.shape)}, {tuple(levels.shape)}"
        )
    return _pool(
        [x.contiguous(memory_format=torch.channels_last) for x in features],
        rois.detach().float().contiguous(),
        levels.int().contiguous(),
        list(output_size),
        list(spatial_scales),
        max(sampling_ratio, 0),
        aligned,
    )


@torch.library.custom_op(
    "mask_head_plugin::multilevel_roi_align",
    mutates_args=(),
    schema="(Tensor[] maps, Tensor rois, Tensor levels, SymInt[] output_size, float[] scales, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
def _pool(
    maps: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    pooled = new_bins(maps, rois, levels, output_size)
    bins = pooled.permute(0, 2, 3, 1)
    kernels.pool(maps, bins, rois, levels, scales, sampling_ratio, aligned)
    return pooled


_pool.register_fake(new_bins)


@torch.library.custom_op(
    "mask_head_plugin::multilevel_roi_align_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rois, Tensor levels, SymInt num_images, SymInt[] heights, "
    "SymInt[] widths, float[] scales, int sampling_ratio, bool aligned) -> Tensor[]",
)
def _gradients(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    """Returns the gradients of all maps, even if some are not needed."""
    shapes = _map_shapes(grad, num_images, heights, widths)
    sums = [grad.new_zeros(x, dtype=torch.float32).permute(0, 3, 1, 2) for x in shapes]
    bins = grad.permute(0, 2, 3, 1).contiguous()
    kernels.add_gradients(sums, bins, rois, levels, scales, sampling_ratio, aligned)
    return [x.to(grad.dtype) for x in sums]


def _map_shapes(
    grad: Tensor, num_images: int, heights: Sequence[int], widths: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    sides = zip(heights, widths, strict=True)
    return [(num_images, height, width, grad.shape[1]) for height, width in sides]


@_gradients.register_fake
def _new_gradients(
    grad: Tensor,
    _rois: Tensor,
    _levels: Tensor,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    *_: Any,
) -> list[Tensor]:
    shapes = _map_shapes(grad, num_images, heights, widths)
    return [grad.new_empty(x).permute(0, 3, 1, 2) for x in shapes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  # by name
    maps, rois, levels, _, *ctx.options = inputs
    ctx.save_for_backward(rois, levels)
    ctx.num_images = maps[0].shape[0]
    ctx.heights, ctx.widths = [x.shape[2] for x in maps], [x.shape[3] for x in maps]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    shapes = ctx.num_images, ctx.heights, ctx.widths
    return _gradients(grad, *ctx.saved_tensors, *shapes, *ctx.options), *[None] * 6


_pool.register_autograd(_backward, setup_context=_setup_context)
