"""Adapts the plugin's modules when a model is traced, scripted or exported."""

from __future__ import annotations

import copy
import itertools
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def is_captured() -> bool:
    """Returns whether the running code is being recorded by a trace or by torch.export.

    A recording can contain only tensors and the operators of PyTorch and torchvision, and, in an
    export on CUDA, this package's RoI pooling operator. It must also be correct for other numbers
    of boxes than that of the example.
    """
    # The oldest supported PyTorch lacks torch.compiler.is_exporting.
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
    return bool(torch.jit.is_tracing() or is_exporting())  # type: ignore[attr-defined]


def stand_in(module: nn.Module, stock_class: type[Module]) -> Module:
    """Returns the module as an instance of a detectron2 class that torch.jit.script can compile.

    The result is a shallow copy with the same children. torch.jit.script keeps track, by ``id``, of
    the modules that it has replaced, so it could mistake a new child for one that no longer exists.

    Args:
        module: an instance of a subclass of ``stock_class``.
        stock_class: the class to compile; must compute the same results from the same parameters.
    """
    stock: Any = copy.copy(module)
    stock.__class__ = stock_class
    stock._modules = dict(module._modules)  # its own dict: the compiler replaces children in it
    # Makes the compiler omit code that runs only in training. scripting_with_instances does this
    # for the classes that it finds in the model.
    constants = getattr(stock_class, "__constants__", ())
    stock.__constants__ = [*constants, "training"]
    made: Module = stock
    return made


def copy_sharing_tensors(module: Module) -> Module:
    """Returns a copy whose modules can be replaced and which shares parameters and buffers."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
