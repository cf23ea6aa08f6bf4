"""RoI pooling as two small matrix products per RoI.

Sampling on a RoI is separable (see axis_weights): ``out[c] = Wy F[c] Wx^T`` over only the cells
that the RoI touches. On a channels-last map, a RoI's cells of one row lie side by side, so the
first product is one matrix multiplication (P, h) x (h, w C) that reads the map where it is; the
second is batched over RoIs. Backward adds the transposed products into the gradient in place.

Shape alphabet: N images, C channels, H, W sides of the feature map, R RoIs, P pooled side, h and w
the cells that one RoI touches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .axis_weights import AxisWeights, roi_align_weights

CHUNK_ELEMENTS = 1 << 20
"""Elements of the intermediate products held at a time; 4 MB of float32."""


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """ROIAlign of Mask R-CNN section 3: the mean of bilinear samples in each bin, nothing rounded.

    Equal to ``torchvision.ops.roi_align`` up to rounding. Differs from it where a RoI ends before
    it starts (no crash) and for RoIs longer than axis_weights.MAX_IMAGE_SIZES feature maps (the
    adaptive grid, and with it memory, stops growing). A NaN or infinity among a RoI's cells may
    reach all its bins: 0 x NaN is NaN.

    Args:
        features: (N, C, H, W) on the CPU. A channels_last map is read without a copy; float16 and
            bfloat16 are computed in float32.
        rois: (R, 5): image index, x0, y0, x1, y1 in pixels of the network's input.
        output_size: P, or (height, width).
        spatial_scale: cells per pixel.
        sampling_ratio: samples per bin and axis; 0 and below for ``ceil(RoI side / P)``. 2 makes
            the paper's four points.
        aligned: True puts pixel centres at +0.5 (detectron2's ROIAlignV2); False is detectron's
            ROIAlign, which takes sides below one cell as one cell.

    Returns:
        (R, C, P, P) of the type of ``features`` in channels_last layout, with a gradient to them.

    Raises:
        ValueError: if a shape is not as above, a coordinate is NaN or infinite, or an image index
            is not in [0, N).
    """
    _check(features, rois)
    height, width = (output_size,) * 2 if isinstance(output_size, int) else output_size
    if len(rois) == 0:  # a view keeps the graph without reading the map
        return features[:0, :, :1, :1].expand(-1, -1, height, width)
    dtype = torch.promote_types(features.dtype, torch.float32)
    image_index, x0, y0, x1, y1 = rois.detach().to(dtype).unbind(1)
    options = (spatial_scale, sampling_ratio, aligned)
    y_weights = roi_align_weights(y0, y1, height, features.shape[2], *options)
    x_weights = roi_align_weights(x0, x1, width, features.shape[3], *options)
    images = image_index.int().tolist()
    return _SeparablePool.apply(features.to(dtype), images, y_weights, x_weights).to(features.dtype)


def _check(features: Tensor, rois: Tensor) -> None:
    if features.dim() != 4 or not features.is_floating_point() or 0 in features.shape[2:]:
        raise ValueError(
            f"features must be a non-empty floating-point (N, C, H, W), not {features.dtype} "
            f"{tuple(features.shape)}"
        )
    if features.shape[1] == 0:
        raise ValueError("features have no channels")
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must be (R, 5): image, x0, y0, x1, y1; not {tuple(rois.shape)}")
    bad = len(rois) - int(torch.isfinite(rois).all(dim=1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(rois)} RoIs have NaN or infinite coordinates")
    if len(rois) and not 0 <= int(rois[:, 0].min()) <= int(rois[:, 0].max()) < len(features):
        raise ValueError(f"image indices of the RoIs are not all in [0, {len(features)})")


class _SeparablePool(torch.autograd.Function):
    """``Wy F Wx^T`` for each RoI."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, images: list[int], y: AxisWeights, x: AxisWeights
    ) -> Tensor:
        maps = features.detach().permute(0, 2, 3, 1).contiguous()
        num_rois, height, _ = y.weights.shape
        pooled = maps.new_empty(num_rois, height, x.weights.shape[1], maps.shape[3])
        for chunk in _chunks(y, x, maps.shape[3]):
            rows = maps.new_zeros(len(chunk), height, x.weights.shape[2] * maps.shape[3])
            for wy, patch, row in _products(maps, rows, chunk, images, y, x):
                torch.mm(wy, patch, out=row)
            wx = _for_each_row(x, chunk, height)
            part = pooled[chunk.start : chunk.stop].flatten(0, 1)
            torch.bmm(wx, rows.view(len(wx), wx.shape[2], -1), out=part)
        ctx.shape, ctx.images, ctx.y, ctx.x = maps.shape, images, y, x
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        y, x = ctx.y, ctx.x
        grad = grad.permute(0, 2, 3, 1).contiguous()
        grad_maps = grad.new_zeros(ctx.shape)
        height, channels = grad.shape[1], grad.shape[3]
        # Products into a given output are left alone by autocast, this one would not be.
        with torch.autocast("cpu", enabled=False):
            for chunk in _chunks(y, x, channels):
                wx = _for_each_row(x, chunk, height).transpose(1, 2)
                rows = torch.bmm(wx, grad[chunk.start : chunk.stop].flatten(0, 1))
                rows = rows.view(len(chunk), height, -1)
                for wy, patch, row in _products(grad_maps, rows, chunk, ctx.images, y, x):
                    patch.addmm_(wy.t(), row)
        return grad_maps.permute(0, 3, 1, 2), None, None, None


def _chunks(y: AxisWeights, x: AxisWeights, channels: int) -> Iterator[range]:
    """Cuts the RoIs into runs whose row products (P, w, C) together stay within the cache."""
    num_rois, height, _ = y.weights.shape
    step = max(CHUNK_ELEMENTS // (height * x.weights.shape[2] * channels), 1)
    for start in range(0, num_rois, step):
        yield range(start, min(start + step, num_rois))


def _for_each_row(x: AxisWeights, chunk: range, height: int) -> Tensor:
    """Returns the x weights of a chunk once per pooled row: (n height, P, L)."""
    return x.weights[chunk.start : chunk.stop].repeat_interleave(height, dim=0)


def _products(
    maps: Tensor, rows: Tensor, chunk: range, images: list[int], y: AxisWeights, x: AxisWeights
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields views for ``row = wy patch`` of each RoI of a chunk that touches any cell.

    Yields:
        wy (P, h); the RoI's cells in (N, H, W, C) ``maps`` as (h, w C); the first w C columns of
        its (P, L C) part of ``rows``.
    """
    _, height, width, channels = maps.shape
    _, pooled_height, stride = y.weights.shape
    offset = maps.storage_offset()  # a channels_last map may be a slice of a larger one
    for k, r in enumerate(chunk):
        h, w = y.count[r], x.count[r]
        if h and w:
            start = ((images[r] * height + y.first[r]) * width + x.first[r]) * channels + offset
            yield (
                y.weights.as_strided((pooled_height, h), (stride, 1), r * pooled_height * stride),
                maps.as_strided((h, w * channels), (width * channels, 1), start),
                rows[k, :, : w * channels],
            )
