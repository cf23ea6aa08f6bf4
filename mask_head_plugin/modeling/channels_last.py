"""Converts models to the channels-last layout, in which convolutions are faster."""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from .graph_capture import is_captured, stand_in

MIN_ELEMENTS = 1 << 18
"""Size of an image's map, in elements, above which it is faster to copy the map for the gradient of
the weights (1 MB of float32).
"""

TENSOR_CORES = (8, 0)
"""Lowest compute capability that runs float32 convolutions of channels-last maps on tensor cores.
"""


def to_channels_last(model: nn.Module) -> None:
    """Converts a model's weights to channels-last if that is faster. Results do not change.

    The model's convolutions then return channels-last maps, which RoI pooling reads without a copy.

    On CUDA, tensor cores accept only channels-last maps; cuDNN copies other maps first. Models on
    GPUs without tensor cores keep their layout.

    On a CPU, the forward pass and the gradient of the map are faster. With AVX2, however, the
    gradient of 3 x 3 weights is slower. For 256 channels and two maps of 128 x 128, oneDNN takes
    1.74 s with channels-last maps. With contiguous maps, it takes only 0.47 s, and copying both
    maps takes 0.08 s (two cores of an AMD EPYC). Convolutions with 3 x 3 kernels therefore copy
    their maps for this gradient. With 1 x 1 and 7 x 7 kernels, or maps smaller than 1 MB, copying
    is not faster. Processors with AVX512 run a different kernel, which was not measured, so their
    maps are not copied.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < TENSOR_CORES:
        return
    model.to(memory_format=torch.channels_last)
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        for module in model.modules():
            if type(module) is Conv2d and _is_ordinary(module):
                module.__class__ = WeightGradientFromCopies


def _is_ordinary(conv: Conv2d) -> bool:
    is_3x3 = conv.kernel_size == (3, 3) and conv.groups == 1
    return is_3x3 and not isinstance(conv.padding, str)


class WeightGradientFromCopies(Conv2d):
    """A detectron2 Conv2d that computes the gradient of its weights from contiguous copies of maps.

    Parameters and results are the same as in detectron2; gradients are the same up to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _pays(x, self.weight):
            return super().forward(x)
        arguments = self.stride, self.padding, self.dilation
        x = _Convolution.apply(x, self.weight, self.bias, *arguments)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def __prepare_scriptable__(self) -> Conv2d:
        """Returns the module that torch.jit.script compiles instead."""
        return stand_in(self, Conv2d)


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not is_captured()
        and x.dim() == 4
        and len(x) > 0
        and math.prod(x.shape[1:]) >= MIN_ELEMENTS
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        return torch.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        x, weight, _, *arguments = inputs
        ctx.arguments = arguments
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, *needs_others = ctx.needs_input_grad[:3]

        def gradients(*tensors: Tensor, of: list[bool]) -> list[Tensor | None]:
            # Bias sizes, stride, padding and dilation, not transposed, no output padding, 1 group.
            shape = [len(weight)], *ctx.arguments, False, [0, 0], 1
            return list(torch.ops.aten.convolution_backward(*tensors, *shape, of))

        d_x = gradients(grad, x, weight, of=[True, False, False])[0] if needs_x else None
        copies = grad.contiguous(), x.contiguous(), weight.contiguous()
        d_others = gradients(*copies, of=[False, *needs_others])[1:]
        return d_x, *d_others, None, None, None
