"""RoI pooling from one or more feature maps.

Shape alphabet: N images, R RoIs, C channels, P pooled side, Hi and Wi sides of feature map i.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align as torchvision_roi_align
from torchvision.ops import roi_pool as torchvision_roi_pool

from ..ops import precise_roi_pool, roi_align, roi_pool, roi_warp
from ..ops.axis_weights import MAX_CELL, round_to_cells
from ..ops.compiled_pooling import pool_rois
from .graph_capture import is_captured

POOLER_TYPES = ("ROIPool", "ROIWarp", "ROIAlign", "ROIAlignV2", "PrROIPool")

REDUCTIONS = ("mean", "max")

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "ROIPool": roi_pool,
    "ROIWarp": roi_warp,
    "PrROIPool": precise_roi_pool,
}
"""Operators of the pooler types that do not use ops.roi_align."""


SMALL_ELEMENTS = 1 << 18
"""If maps and results together have fewer elements than this, and no gradient is needed,
torchvision's operators are faster on the CPU than this package's. For 10 RoIs of 7 x 7 x 64, they
are 3 times as fast; for about 100 such RoIs, both are equally fast.
"""


class MultiLevelRoIPooler(nn.Module):
    """Pools each box from the map that suits its size. Can replace detectron2's ROIPooler.

    A box is pooled from level ``floor(canonical_level + log2(sqrt(area) / canonical_box_size))``
    (equation 1 of the FPN paper, arXiv 1612.03144), or from the nearest existing level. The
    operator depends on the pooler type, the reduction and the device:

    =========================== ============================ =====================================
    type and reduction          on the CPU                   on CUDA
    =========================== ============================ =====================================
    ROIAlign and ROIWarp, mean  ops.roi_align, ops.roi_warp  one Triton kernel for all levels;
                                                             deterministic or float64: as on CPU
    ROIPool                     ops.roi_pool                 as on CPU
    PrROIPool                   ops.precise_roi_pool         as on CPU
    ROIAlign and ROIWarp, max   ops.roi_align, ops.roi_warp  as on CPU
    =========================== ============================ =====================================

    In inference on the CPU, torchvision's ROIAlign is used for a few RoIs on small maps; see
    SMALL_ELEMENTS. The Triton kernel reads channels_last maps; other maps are copied first.
    "Deterministic" means that torch.use_deterministic_algorithms is on. If Triton is missing, or
    cannot compile the kernel for a dtype or size, torchvision's operator is used instead, and a
    warning is logged once.

    Traces and exports contain torchvision's operators, because a recorded loop over groups of RoIs
    would always use the groups of the example input. Exports on CUDA contain the operator of the
    Triton kernel. Scripts contain detectron2's ROIPooler. None of these supports PrROIPool or the
    maximum of samples, and scripts do not support ROIWarp.

    Code that torch.compile compiles for the CPU calls the operators of the table through
    ops.compiled_pooling.

    Results are channels_last, except for the results of torchvision's operators.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
        reduction: str = "mean",
    ) -> None:
        """
        Args:
            output_size: P, the side of the pooled square, or a pair (height, width).
            scales: size of each map relative to the image (1 / stride), finest map first. Each
                stride must be a power of 2 and twice the previous stride.
            sampling_ratio: number of samples per bin and axis for ROIWarp, ROIAlign and ROIAlignV2;
                0 means ``ceil(RoI side / P)``. The other types ignore it.
            pooler_type: ``ROIPool`` (maximum over a quantized box), ``ROIWarp`` (samples in a
                quantized box), ``ROIAlign`` (without the half-pixel shift, as in Detectron),
                ``ROIAlignV2`` (as in the paper, pixel centres at +0.5) or ``PrROIPool`` (integral
                over the bin).
            canonical_box_size: side in pixels of a box that is pooled from ``canonical_level``.
            canonical_level: log2 of the stride of this level.
            reduction: ``mean`` or ``max`` of the samples in a bin (Table 2c). ROIPool always takes
                the maximum; PrROIPool has no samples and accepts only ``mean``.

        Raises:
            ValueError: if ``pooler_type`` or ``reduction`` is unknown, if the two cannot be
                combined, or if ``scales`` do not form a pyramid.
        """
        super().__init__()
        check_pooler(pooler_type, reduction)
        if canonical_box_size <= 0 or not scales or min(scales) <= 0:
            raise ValueError(
                f"scales {tuple(scales)} must be one or more positive numbers, and "
                f"canonical_box_size {canonical_box_size} must be above 0"
            )
        levels = [-math.log2(scale) for scale in scales]
        if levels != [levels[0] + i for i in range(len(levels))] or not levels[0].is_integer():
            raise ValueError(
                f"scales {tuple(scales)} must be powers of 2, each half of the previous one"
            )
        height, width = [output_size] * 2 if isinstance(output_size, int) else output_size
        self.output_size = (height, width)
        self.scales = tuple(scales)
        self.sampling_ratio = sampling_ratio
        self.pooler_type = pooler_type
        self.reduction = reduction
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level
        self.min_level = int(levels[0])
        # The pooler that torch.jit.script compiles instead, if there is one. It is created here
        # because the compiler can confuse modules that are created while it runs; see stand_in.
        self._scriptable = []
        averaged = pooler_type in ("ROIAlign", "ROIAlignV2") and reduction == "mean"
        # detectron2's ROIPooler cannot handle a map with more cells than the image has pixels.
        if (averaged or pooler_type == "ROIPool") and self.min_level >= 0:
            canonical = canonical_box_size, canonical_level
            arguments = self.output_size, scales, sampling_ratio, pooler_type
            self._scriptable.append(ROIPooler(*arguments, *canonical))

    def forward(self, features: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """
        Args:
            features: one (N, C, Hi, Wi) map per scale.
            box_lists: one Boxes per image, with R boxes in total, in pixels of the model's input.

        Returns:
            (R, C, P, P) in the order of the boxes.

        Raises:
            ValueError: if the number of maps differs from the number of scales, the number of
                images differs from the number of box lists, or, on the CPU, a box coordinate is NaN
                or infinite. On CUDA, an assertion on the device fails for such a coordinate, and
                the error appears at the next synchronisation.
        """
        if len(features) != len(self.scales):
            raise ValueError(f"got {len(features)} feature maps for {len(self.scales)} scales")
        if len(box_lists) != features[0].shape[0]:
            raise ValueError(
                f"got boxes for {len(box_lists)} images, but maps of {features[0].shape[0]} images"
            )
        if not box_lists:
            return features[0].new_zeros(0, features[0].shape[1], *self.output_size)
        rois = boxes_to_rois(box_lists)
        if not torch.compiler.is_compiling() and not is_captured():
            check_finite(rois)
        levels = self._assign_levels(box_lists)
        sampled = self.pooler_type in ("ROIWarp", "ROIAlign", "ROIAlignV2")
        averaged = sampled and self.reduction == "mean"
        fast_cuda = features[0].is_cuda and not torch.are_deterministic_algorithms_enabled()
        wide = features[0].dtype in (torch.float32, torch.float64)
        if averaged and fast_cuda and features[0].dtype != torch.float64:
            return self._pool_at_once(features, rois, levels)
        if is_captured():
            if not averaged and self.pooler_type != "ROIPool":
                raise ValueError(self._refusal("traced or exported"))
            return self._pool_by_level(features, rois, levels)
        if torch.compiler.is_compiling():
            return self._pool_in_graph(features, rois, levels)
        if averaged and wide and self._is_small(features, rois):
            return self._pool_by_level(features, rois, levels)
        return self._operator()(features, rois, self.output_size, self.scales, levels=levels)

    def __prepare_scriptable__(self) -> ROIPooler:
        """Returns the module that torch.jit.script compiles instead: detectron2's pooler.

        Raises:
            ValueError: if detectron2's pooler does not support this kind of pooling.
        """
        if not self._scriptable:
            raise ValueError(self._refusal("scripted"))
        return self._scriptable[0]

    def _refusal(self, verb: str) -> str:
        return (
            f"POOLER_TYPE {self.pooler_type} with POOLER_REDUCTION {self.reduction} cannot be "
            f"{verb}; use ROIAlignV2 with mean. A high POOLER_SAMPLING_RATIO makes its results "
            "similar to those of PrROIPool"
        )

    def _is_small(self, features: list[Tensor], rois: Tensor) -> bool:
        """Returns whether torchvision's loops are faster than an operator that prepares weights.

        Returns False for inputs on which torchvision's loops crash: boxes that end before they
        start, and huge boxes with an adaptive sampling grid.
        """
        if features[0].is_cuda or self.sampling_ratio <= 0:
            return False
        height, width = self.output_size
        elements = len(rois) * features[0].shape[1] * height * width
        elements += sum(feature.numel() for feature in features)
        return (
            elements < SMALL_ELEMENTS
            and not any(feature.requires_grad for feature in features)
            and bool((rois[:, 3:] >= rois[:, 1:3]).all())
        )

    def _assign_levels(self, box_lists: list[Boxes]) -> Tensor:
        """Returns the index in ``scales`` of each box's level, without synchronising."""
        return self._levels_of_areas(torch.cat([boxes.area() for boxes in box_lists]))

    def _levels_of_areas(self, area: Tensor) -> Tensor:
        # Equation 1 of the FPN paper, rounded as in detectron2. In detectron2, a box that ends
        # before it starts along one axis has a negative area and therefore no level.
        relative_size = torch.sqrt(area.clamp(min=0)) / self.canonical_box_size
        level = torch.floor(self.canonical_level + torch.log2(relative_size + 1e-8))
        last = len(self.scales) - 1
        return (level - self.min_level).clamp(0, last).to(torch.int64)

    def _operator(self) -> Callable[..., Tensor]:
        operator = OPERATORS.get(self.pooler_type, roi_align)
        if self.pooler_type in ("ROIPool", "PrROIPool"):
            return operator
        options: dict[str, Any] = {
            "sampling_ratio": self.sampling_ratio,
            "reduction": self.reduction,
        }
        if self.pooler_type != "ROIWarp":
            options["aligned"] = self._aligned
        return functools.partial(operator, **options)

    @property
    def _aligned(self) -> bool:
        return self.pooler_type != "ROIAlign"

    def _pool_at_once(self, features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
        first, options = features[0], (self.sampling_ratio, self._aligned)
        kernel = first.device, first.dtype, first.shape[1], len(features), self.output_size
        is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if is_tracing or not can_pool_at_once(*kernel, *options):
            return self._pool_by_level(features, rois, levels)
        from ..ops.roi_pooling_operator import multilevel_roi_align  # needs Triton

        rois, scales = self._quantize(rois, levels)
        return multilevel_roi_align(features, rois, levels, self.output_size, scales, *options)

    def _pool_by_level(self, features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
        """Pools level by level with torchvision's operators and restores the order of the boxes.

        The operators need boxes in the dtype of the maps. Half precision would shift boxes by
        pixels, so half-precision maps are pooled in float32, as under autocast.
        """
        dtype = torch.promote_types(features[0].dtype, torch.float32)
        rois, scales = self._quantize(rois.to(dtype), levels)
        if self.pooler_type == "ROIPool":  # it converts coordinates to 32-bit integers
            rois = rois.clamp(-MAX_CELL, MAX_CELL)
        by_level = [torch.where(levels == level)[0] for level in range(len(scales))]
        pooled = []
        for feature, scale, indices in zip(features, scales, by_level, strict=True):
            arguments = (feature.to(dtype), rois[indices], self.output_size, scale)
            if self.pooler_type == "ROIPool":
                pooled.append(torchvision_roi_pool(*arguments))
            else:
                options = (self.sampling_ratio, self._aligned)
                pooled.append(torchvision_roi_align(*arguments, *options))
        result = torch.cat(pooled)
        # The result takes its number of rows from rois, because torch.export cannot infer that
        # all RoIs belong to one of the levels.
        zeros = torch.zeros_like(rois[:, :1, None, None]).expand(-1, *result.shape[1:])
        return zeros.index_put((torch.cat(by_level),), result).to(features[0].dtype)

    def _pool_in_graph(self, features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
        name = OPERATORS.get(self.pooler_type, roi_align).__name__
        options = self.sampling_ratio, self._aligned, self.reduction
        pooled: Tensor = pool_rois(
            features, rois, levels, list(self.output_size), list(self.scales), name, *options
        )
        return pooled

    def _quantize(self, rois: Tensor, levels: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        """Returns the RoIs and scales that make an operator compute this pooler's type.

        ROIWarp is an aligned ROIAlign of RoIs that are rounded to the cells of their level. Other
        types need no change.
        """
        if self.pooler_type != "ROIWarp":
            return rois, self.scales
        scale = torch.full_like(levels, self.scales[0], dtype=rois.dtype)
        scale = (scale / 2**levels)[:, None]  # each level has half the scale of the previous one
        start, end = round_to_cells(rois[:, 1:3] * scale, rois[:, 3:] * scale)
        return torch.cat([rois[:, :1], start, end], dim=1), (1.0,) * len(self.scales)

    def pool_for_export(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """Pools the boxes of one image with operators that exporters support.

        Args:
            features: one (1, C, Hi, Wi) map per scale.
            boxes: (R, 4) finite coordinates; R may be 0.

        Returns:
            (R, C, P, P); equal to ``forward`` for ROIAlign, ROIAlignV2, ROIWarp and ROIPool.
        """
        sides = boxes[:, 2:] - boxes[:, :2]
        rois = F.pad(boxes, [1, 0])  # all of image 0
        return self._pool_by_level(features, rois, self._levels_of_areas(sides[:, 0] * sides[:, 1]))

    def extra_repr(self) -> str:
        return (
            f"{self.pooler_type}, output_size={self.output_size}, scales={self.scales}, "
            f"sampling_ratio={self.sampling_ratio}, reduction={self.reduction}"
        )


def check_pooler(pooler_type: str, reduction: str) -> None:
    """Raises a ValueError if MultiLevelRoIPooler does not support this type and reduction."""
    if pooler_type not in POOLER_TYPES:
        raise ValueError(f"unknown POOLER_TYPE {pooler_type!r}; choose from {POOLER_TYPES}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown POOLER_REDUCTION {reduction!r}; choose from {REDUCTIONS}")
    if pooler_type == "PrROIPool" and reduction == "max":
        raise ValueError("PrROIPool integrates over a bin, so POOLER_REDUCTION must be 'mean'")


def boxes_to_rois(box_lists: Sequence[Boxes]) -> Tensor:
    """Returns (R, 5) RoIs, each an image index and a box, without synchronising with the device."""
    rois = []
    for image, boxes in enumerate(box_lists):
        # full_like instead of len(), which a trace would record as a constant.
        index = torch.full_like(boxes.tensor[:, :1], image)
        rois.append(torch.cat([index, boxes.tensor], dim=1))
    return torch.cat(rois)


def check_finite(rois: Tensor) -> None:
    """Refuses boxes with NaN or infinite coordinates, because their level is undefined.

    Args:
        rois: (R, 5).

    Raises:
        ValueError: on the CPU; the message states how many boxes are affected. On CUDA, an
            assertion on the device fails instead, so that the check does not synchronise.
    """
    finite = torch.isfinite(rois)
    if rois.is_cuda:
        torch._assert_async(finite.all(), "boxes with NaN or infinite coordinates")
    elif not finite.all():
        bad = len(rois) - int(finite.all(dim=1).sum())
        raise ValueError(f"{bad} of {len(rois)} boxes have NaN or infinite coordinates")


@torch.compiler.assume_constant_result
def can_pool_at_once(*kernel: Any) -> bool:
    """Returns whether ops.roi_pooling_operator works. torch.compile treats the result as constant.

    Args: see _try_kernel.
    """
    return _try_kernel(*kernel)


@functools.cache
def _try_kernel(
    device: torch.device,
    dtype: torch.dtype,
    num_channels: int,
    num_maps: int,
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> bool:
    """Runs ops.roi_pooling_operator forward and backward once with this dtype and these sizes.

    Returns whether it succeeded. If it did not, logs the reason.
    """
    operator = _operator()
    if operator is None:
        return False
    try:
        # Backward must be tried as well, even if the first call is made in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            shape = 1, num_channels, 1, 1
            feature = torch.zeros(shape, device=device, dtype=dtype, requires_grad=True)
            rois, scales = torch.zeros(1, 5, device=device), [1.0] * num_maps
            options = output_size, scales, sampling_ratio, aligned
            operator([feature] * num_maps, rois, rois[:, 0], *options).sum().backward()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler can raise anything
        bins = f"{output_size[0]} x {output_size[1]} bins, {dtype}, {num_channels} channels"
        _log_replacement(f"{bins} on {device}", error)
        return False
    return True


@functools.cache
def _operator() -> Callable[..., Tensor] | None:
    """Returns ops.roi_pooling_operator.multilevel_roi_align, or None if Triton is missing."""
    try:
        from ..ops.roi_pooling_operator import multilevel_roi_align
    except ImportError as error:
        _log_replacement("Triton", error)
        return None
    return multilevel_roi_align


def _log_replacement(what: str, error: Exception) -> None:
    logging.getLogger(__name__).warning(
        "RoI pooling in one kernel is not available; using torchvision's operator instead: "
        f"{what}: {type(error).__name__}: {error}"
    )


def build_pooler(
    head_cfg: CfgNode, in_features: Sequence[str], input_shape: dict[str, ShapeSpec]
) -> nn.Module:
    """Builds a head's pooler from the head's section of the config.

    Args:
        head_cfg: ``cfg.MODEL.ROI_BOX_HEAD`` or ``cfg.MODEL.ROI_MASK_HEAD``.
        in_features: names of the maps to pool from, finest first.
        input_shape: shape of each map by name; only the strides are read.

    Returns:
        A MultiLevelRoIPooler, or detectron2's ROIPooler for a type that only detectron2 supports
        (``ROIAlignRotated``).
    """
    arguments = {
        "output_size": head_cfg.POOLER_RESOLUTION,
        "scales": tuple(1.0 / input_shape[name].stride for name in in_features),
        "sampling_ratio": head_cfg.POOLER_SAMPLING_RATIO,
        "pooler_type": head_cfg.POOLER_TYPE,
    }
    if head_cfg.POOLER_TYPE not in POOLER_TYPES:
        return ROIPooler(**arguments)
    return MultiLevelRoIPooler(**arguments, reduction=head_cfg.POOLER_REDUCTION)


def with_stock_pooler_types(cfg: CfgNode) -> CfgNode:
    """Returns a copy of the config in which detectron2 supports all pooler types.

    The copy is needed because detectron2's heads build a pooler before a subclass can replace it,
    and refuse types that detectron2 does not have.
    """
    cfg = cfg.clone()
    cfg.defrost()
    for head in (cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        if head.POOLER_TYPE in POOLER_TYPES:
            head.POOLER_TYPE = "ROIAlignV2"
    return cfg
