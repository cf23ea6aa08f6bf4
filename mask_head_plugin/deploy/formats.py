"""Writes and runs exported models in each supported format.

Shape alphabet: C channels, H and W image sides.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .exportable import ExportableMaskRCNN
from .model_folder import EXTERNAL_DATA, MODEL_FILES
from .parity import Outputs, Run

OPSETS = range(16, 21)
"""Supported ONNX opsets. 16 is the first one whose RoiAlign has half-pixel centres, and 20 is the
last one that PyTorch's trace-based exporter writes.
"""

DEFAULT_OPSET = 17

Inputs = tuple[Tensor, ...]


def to_onnx(model: ExportableMaskRCNN, inputs: Inputs, opset: int, path: Path) -> None:
    """Writes and checks a model that uses only standard operators of ONNX.

    If the model exceeds the size limit of an ONNX file (2 GB), its weights are written to a
    separate file, EXTERNAL_DATA.

    Uses PyTorch's trace-based exporter. The exporter based on exported programs is many times
    slower, and cannot write the non-maximum suppression of all classes as one operator.
    """
    import onnx  # part of the extra "deploy", like onnxruntime

    sizes = {} if len(inputs) == 2 else {"image": {1: "height", 2: "width"}}
    detections = {name: {0: "detections"} for name in model.output_names}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        traced = Path(folder, path.name)
        torch.onnx.export(
            model,
            inputs,
            str(traced),
            dynamo=False,
            opset_version=opset,
            input_names=["image", "image_hw"][: len(inputs)],
            output_names=model.output_names,
            dynamic_axes={**sizes, **detections},
        )
        if len(list(traced.parent.iterdir())) == 1:
            traced.rename(path)
        else:  # the exporter has written a file for each weight
            onnx.save_model(
                onnx.load(traced), path, save_as_external_data=True, location=EXTERNAL_DATA
            )
    onnx.checker.check_model(str(path), full_check=True)


def to_torchscript(model: ExportableMaskRCNN, inputs: Inputs, path: Path) -> None:
    traced = torch.jit.trace(model, inputs, check_trace=False)
    torch.jit.save(torch.jit.freeze(traced), str(path))


def to_exported_program(model: ExportableMaskRCNN, inputs: Inputs, path: Path) -> None:
    any_size = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    shapes = {"image": any_size} if len(inputs) == 1 else None
    program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)


def converted(
    model: ExportableMaskRCNN, inputs: Inputs, file_format: str, opset: int, folder: Path
) -> Path:
    """Writes an exported model and returns its path.

    Args:
        model: the model, in evaluation mode.
        inputs: an image and, if its size is fixed, ``image_hw``; see model_inputs.
        file_format: a key of model_folder.MODEL_FILES.
        opset: the ONNX opset.
        folder: an empty folder.
    """
    path = folder / MODEL_FILES[file_format]
    with torch.no_grad(), warnings.catch_warnings():
        # Ignores warnings about values that a trace records as constants, such as the number of
        # channels, and about deprecated interfaces. The result is compared with the model anyway.
        warnings.simplefilter("ignore")
        if file_format == "onnx":
            to_onnx(model, inputs, opset, path)
        elif file_format == "torchscript":
            to_torchscript(model, inputs, path)
        else:
            to_exported_program(model, inputs, path)
    return path


def runner(path: Path, file_format: str, names: Sequence[str], size: tuple[int, int] | None) -> Run:
    """Returns a function that runs an exported model on a (C, H, W) image.

    Args:
        path: the exported model's file.
        file_format: a key of model_folder.MODEL_FILES.
        names: names of the outputs.
        size: height and width to which images are padded; None if they are not padded.
    """
    call = _onnx_call(path) if file_format == "onnx" else _torch_call(path, file_format)

    def run(image: Tensor) -> Outputs:
        return dict(zip(names, call(model_inputs(image, size)), strict=True))

    return run


def model_inputs(image: Tensor, size: tuple[int, int] | None) -> Inputs:
    """Returns an exported model's inputs for an image. The image must fit into ``size``."""
    return (image,) if size is None else padded(image, size)


def padded(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the image padded with zeros at the right and bottom, and its unpadded size."""
    below, right = size[0] - image.shape[1], size[1] - image.shape[2]
    filled = torch.nn.functional.pad(image, [0, right, 0, below])
    return filled, torch.tensor(image.shape[1:])


def _onnx_call(path: Path) -> Callable[[Inputs], list[np.ndarray[Any, Any]]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def call(inputs: Inputs) -> list[np.ndarray[Any, Any]]:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        outputs: list[np.ndarray[Any, Any]] = session.run(None, feed)
        return outputs

    return call


def _torch_call(path: Path, file_format: str) -> Callable[[Inputs], list[np.ndarray[Any, Any]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
        if file_format == "torchscript":
            model = torch.jit.load(str(path))
        else:
            model = torch.export.load(path).module()

    def call(inputs: Inputs) -> list[np.ndarray[Any, Any]]:
        with torch.no_grad():
            return [x.numpy() for x in model(*inputs)]

    return call
