"""Simulates a device other than the CPU. Its tensors have values, and no GPU is needed.

An operator that mixes CPU and GPU tensors fails only on a machine with a GPU. With this module, it
fails on every machine.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
"""Represents the GPU. PyTorch needs no driver for this device."""

BETWEEN_DEVICES = ("aten::_to_copy", "aten::copy_")


class OnOtherDevice(torch.Tensor):
    """A tensor whose ``device`` is DEVICE, but whose values are in a tensor on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnOtherDevice:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.values.tolist()

    def new_tensor(self, data: Any, **options: Any) -> OnOtherDevice:
        return OnOtherDevice(self.values.new_tensor(data, **options))


_tensor = torch.tensor


def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    if device is None or torch.device(device) != DEVICE:
        return _tensor(data, device=device, **options)
    return OnOtherDevice(_tensor(data, **options))


class OtherDevice(TorchDispatchMode):
    """While active, tensors that are requested on DEVICE become OnOtherDevice tensors."""

    def __enter__(self) -> Any:
        # Dispatch modes do not intercept torch.tensor.
        self._patch = mock.patch.object(torch, "tensor", tensor)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnOtherDevice)]
    name = func._schema.name
    if there and name not in BETWEEN_DEVICES:
        indexed = name.startswith("aten::index") and tensors[0] is there[0]
        foreign = [x for x in tensors if not isinstance(x, OnOtherDevice) and x.dim() > 0]
        if foreign and not (indexed and all(x.dtype in (torch.int64, torch.bool) for x in foreign)):
            raise RuntimeError(f"{name} gets tensors of two devices")
    goes_there = bool(there)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "aten::copy_":
        goes_there = isinstance(args[0], OnOtherDevice)

    def unwrap(x: Any) -> Any:
        return x.values if isinstance(x, OnOtherDevice) else x

    found = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if name.endswith("_") and not name.endswith("__"):  # in place
        return args[0]
    if not goes_there:
        return found
    return tree_map(lambda x: OnOtherDevice(x) if isinstance(x, torch.Tensor) else x, found)
