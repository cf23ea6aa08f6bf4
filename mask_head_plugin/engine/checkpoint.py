"""Checkpoints: detectron2's formats, and safetensors. No file gets to run code."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import ConfigError

ARRAY_FUNCTIONS = ("_reconstruct", "scalar")
# What the pickles of the model zoo name besides plain containers: NumPy arrays and their parts.
ARRAY_GLOBALS = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ARRAY_FUNCTIONS),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, EOFError, ImportError, AttributeError),
    *(IndexError, KeyError, TypeError, ValueError, RuntimeError),
)
"""What reading a file that is no pickle may raise: its bytes are taken for any instruction."""


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses every global that is not in ARRAY_GLOBALS."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of an array")
        return super().find_class(module, name)


def check_pickle(path: Path) -> None:
    """Reads a pickle of arrays and plain containers, and nothing else.

    Raises:
        ConfigError: if it is corrupt or names any other global; the file and the global are named.
    """
    try:
        with path.open("rb") as file:
            _ArrayUnpickler(file, encoding="latin1").load()
    except UNPICKLING_ERRORS as error:
        raise ConfigError(f"{path} was not loaded: {error}") from error


class MaskHeadCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer that also reads ``.safetensors`` and lets no file run code.

    Torch files are read with ``weights_only=True``, whatever torch's default is; pickles may hold
    arrays only, as those of the model zoo do.
    """

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".safetensors"):
            try:
                return {"model": load_file(filename)}
            except SafetensorError as error:
                raise ConfigError(f"{filename} was not loaded: {error}") from error
        # These two are read twice: what passed the first time is safe to detectron2's own reading.
        if filename.endswith(".pkl"):
            check_pickle(Path(filename))
        elif filename.endswith(".pyth"):
            self._torch_load(filename)
        return super()._load_file(filename)

    def _torch_load(self, filename: str) -> dict[str, Any]:
        try:
            return torch.load(filename, map_location="cpu", weights_only=True)
        except UNPICKLING_ERRORS as error:
            # torch's own text advises to allow code.
            named = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it names {named[1]}, which weights do not need" if named else "it is corrupt"
            raise ConfigError(f"{filename} was not loaded: {reason}") from error


def export_safetensors(checkpoint: Path, output: Path, *, half: bool = False) -> None:
    """Writes the model weights of a ``.pth`` checkpoint as ``.safetensors``, nothing else.

    Args:
        checkpoint: written by detectron2's or this project's trainer.
        output: the file to write; its folder is made if missing.
        half: store matrices and convolution kernels as float16, which halves the file. Vectors
            (biases, normalisation statistics) keep their type: their range matters.

    Raises:
        ConfigError: if the file is not such a checkpoint, or a weight does not fit float16.
        OSError: if a file cannot be read or written.
    """
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
        tensors = {name: weight.contiguous() for name, weight in weights.items()}
    except UNPICKLING_ERRORS as error:
        raise ConfigError(
            f"{checkpoint} is not a checkpoint of a trainer ('model': weights)"
        ) from error
    if half:
        tensors = {name: _half(checkpoint, name, weight) for name, weight in tensors.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output)


def _half(checkpoint: Path, name: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.dim() < 2 or not weight.is_floating_point():
        return weight
    if not torch.isfinite(weight.half()).all():
        raise ConfigError(f"{checkpoint}: {name} does not fit float16; export without half")
    return weight.half()
