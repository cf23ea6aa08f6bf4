"""Channels-last models, whose convolutions are faster, including their weight gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from .graph_capture import is_captured, stand_in

MIN_ELEMENTS = 1 << 18
"""Elements of one image's map (1 MB of float32) from which copies for the weight gradient pay."""


TENSOR_CORES = (8, 0)
"""Compute capability from which convolutions of float32 run on tensor cores, channels-last."""


def to_channels_last(model: nn.Module) -> None:
    """Makes a model's weights channels-last where that is faster; the model computes the same.

    Its convolutions then return channels-last maps, and RoI pooling reads such maps in place.

    On CUDA, tensor cores take only such maps; cuDNN copies others. Older GPUs keep their layout.

    On a CPU, the forward pass and the gradient to the map are faster. The gradient to 3 x 3 weights
    is not, on AVX2: with 256 channels and two maps of 128 x 128, oneDNN takes 1.74 s, but 0.47 s
    from contiguous maps, and copying both takes 0.08 s (two cores of an AMD EPYC). 1 x 1 and 7 x 7
    kernels and maps of less than 1 MB gain nothing. Processors with AVX512 run another kernel,
    which was not measured: they use oneDNN as it is.
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
    """detectron2's Conv2d, computing the gradient to its weights from contiguous maps.

    Parameters and results are the same; gradients are the same up to rounding.
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
        """Returns what torch.jit.script compiles instead of this."""
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
            shape = [len(weight)], *ctx.arguments, False, [0, 0], 1  # bias, not transposed, groups
            return list(torch.ops.aten.convolution_backward(*tensors, *shape, of))

        d_x = gradients(grad, x, weight, of=[True, False, False])[0] if needs_x else None
        copies = grad.contiguous(), x.contiguous(), weight.contiguous()
        d_others = gradients(*copies, of=[False, *needs_others])[1:]
        return d_x, *d_others, None, None, None
