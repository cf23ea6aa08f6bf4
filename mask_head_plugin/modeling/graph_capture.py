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

    A recording can contain only tensors and the operators of PyTorch and torchvision and, in an
    export on CUDA, this package's RoI pooling operator. It must also be correct if the number of
    boxes differs from that of the example input.
    """
    # The oldest supported PyTorch has no torch.compiler.is_exporting.
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
    return bool(torch.jit.is_tracing() or is_exporting())  # type: ignore[attr-defined]


def stand_in(module: nn.Module, stock_class: type[Module]) -> Module:
    """Returns the module as an instance of a detectron2 class that torch.jit.script can compile.

    The result is a shallow copy with the same children. Children are not copied, because
    torch.jit.script identifies the modules that it has replaced by their ``id``, and a copy could
    get the ``id`` of a module that no longer exists.

    Args:
        module: an instance of a subclass of ``stock_class``.
        stock_class: the class to compile; must compute the same results from the same parameters.
    """
    stock: Any = copy.copy(module)
    stock.__class__ = stock_class
    stock._modules = dict(module._modules)  # a copy, because the compiler replaces children in it
    # Makes the compiler omit code that runs only in training. scripting_with_instances does this
    # only for the classes that it finds in the model.
    constants = getattr(stock_class, "__constants__", ())
    stock.__constants__ = [*constants, "training"]
    made: Module = stock
    return made


def copy_sharing_tensors(module: Module) -> Module:
    """Returns a copy whose modules can be replaced. It shares parameters and buffers."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
