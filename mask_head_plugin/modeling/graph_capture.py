"""What becomes of the plugin's modules when a model is traced, scripted or exported."""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def is_captured() -> bool:
    """Whether the code that runs is being written down, by a trace or by torch.export.

    The result holds only tensors and operators, PyTorch's and torchvision's (exported on CUDA,
    also this package's for RoI pooling), and must be right for other numbers of boxes than those of
    its example.
    """
    # torch.compiler.is_exporting is newer than the oldest PyTorch that is allowed.
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
    return bool(torch.jit.is_tracing() or is_exporting())  # type: ignore[attr-defined]


def stand_in(module: nn.Module, stock_class: type[Module]) -> Module:
    """Returns the module as one of detectron2's classes, for torch.jit.script to compile.

    A shallow copy with the same children. torch.jit.script remembers by ``id`` what it has
    exchanged, and would take a new child for an exchanged module that is gone.

    Args:
        module: of a subclass of ``stock_class``.
        stock_class: what it is for the compiler; computes the same from the same parameters.
    """
    stock: Any = copy.copy(module)
    stock.__class__ = stock_class
    stock._modules = dict(module._modules)  # in which the compiler exchanges children
    # The compiler leaves out what is only run in training, as scripting_with_instances has it do
    # for the classes that it finds in the model.
    constants = getattr(stock_class, "__constants__", ())
    stock.__constants__ = [*constants, "training"]
    made: Module = stock
    return made


def copy_sharing_tensors(module: Module) -> Module:
    """Returns a copy with the same parameters and buffers, whose modules may be exchanged."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
