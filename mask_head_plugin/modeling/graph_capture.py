"""Adapts the plugin's modules when a model is traced, scripted or exported."""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def is_captured() -> bool:
    """Returns whether a trace or torch.export is recording the running code.

    The recording holds only tensors and operators of PyTorch and torchvision (if exported on CUDA,
    also this package's for RoI pooling), and must be right for other numbers of boxes than its
    example's.
    """
    # The oldest PyTorch that is allowed lacks torch.compiler.is_exporting.
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
    return bool(torch.jit.is_tracing() or is_exporting())  # type: ignore[attr-defined]


def stand_in(module: nn.Module, stock_class: type[Module]) -> Module:
    """Returns the module as one of detectron2's classes, for torch.jit.script to compile.

    A shallow copy with the same children. torch.jit.script remembers exchanged modules by ``id``,
    and could confuse a new child with one that no longer exists.

    Args:
        module: of a subclass of ``stock_class``.
        stock_class: the class for the compiler; computes the same from the same parameters.
    """
    stock: Any = copy.copy(module)
    stock.__class__ = stock_class
    stock._modules = dict(module._modules)  # in which the compiler exchanges children
    # The compiler omits code that only runs in training, as scripting_with_instances makes it do
    # for the classes that it finds in the model.
    constants = getattr(stock_class, "__constants__", ())
    stock.__constants__ = [*constants, "training"]
    made: Module = stock
    return made


def copy_sharing_tensors(module: Module) -> Module:
    """Returns a copy with the same parameters and buffers, whose modules may be exchanged."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
