"""The formats of an exported model: how its bytes are made, and how they are run.

Shape alphabet: C channels, H and W image sides.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .exportable import ExportableMaskRCNN
from .parity import Outputs, Run

OPSETS = range(16, 21)
"""Versions of ONNX's operators: 16 is the first whose RoiAlign has half-pixel centres, 20 the last
that PyTorch's exporter of traces writes."""

DEFAULT_OPSET = 17

Inputs = tuple[Tensor, ...]


def to_onnx(model: ExportableMaskRCNN, inputs: Inputs, opset: int) -> bytes:
    """Returns a checked model of ONNX's own operators.

    It is the trace that is written down: PyTorch's exporter of exported programs is many times
    slower, and cannot write the suppression of all classes as one operator.
    """
    import onnx  # of the extra "deploy", as onnxruntime

    sizes = {} if len(inputs) == 2 else {"image": {1: "height", 2: "width"}}
    detections = {name: {0: "detections"} for name in model.output_names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            model,
            inputs,
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["image", "image_hw"][: len(inputs)],
            output_names=model.output_names,
            dynamic_axes={**sizes, **detections},
        )
        onnx.checker.check_model(str(path), full_check=True)
        return path.read_bytes()


def to_torchscript(model: ExportableMaskRCNN, inputs: Inputs) -> bytes:
    traced = torch.jit.trace(model, inputs, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.freeze(traced), buffer)
    return buffer.getvalue()


def to_exported_program(model: ExportableMaskRCNN, inputs: Inputs) -> bytes:
    any_size = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    shapes = {"image": any_size} if len(inputs) == 1 else None
    program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def converted(model: ExportableMaskRCNN, inputs: Inputs, file_format: str, opset: int) -> bytes:
    """Returns the file of an exported model.

    Args:
        model: in evaluation mode.
        inputs: an image and, for a fixed size, ``image_hw``.
        file_format: a key of model_folder.MODEL_FILES.
        opset: of ONNX.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # Of what a trace fixes, such as the number of channels, and of interfaces that PyTorch
        # advises against: what comes out is compared with the model.
        warnings.simplefilter("ignore")
        if file_format == "onnx":
            return to_onnx(model, inputs, opset)
        if file_format == "torchscript":
            return to_torchscript(model, inputs)
        return to_exported_program(model, inputs)


def runner(
    content: bytes, file_format: str, names: Sequence[str], size: tuple[int, int] | None
) -> Run:
    """Returns a function that runs the file of an exported model on a (C, H, W) image.

    Args:
        content: of the file.
        file_format: a key of model_folder.MODEL_FILES.
        names: of the outputs.
        size: height and width that images are padded to, or None.
    """
    call = _onnx_call(content) if file_format == "onnx" else _torch_call(content, file_format)

    def run(image: Tensor) -> Outputs:
        inputs: Inputs = (image,) if size is None else padded(image, size)
        return dict(zip(names, call(inputs), strict=True))

    return run


def padded(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the image with zeros at the right and below, and its own height and width."""
    below, right = size[0] - image.shape[1], size[1] - image.shape[2]
    filled = torch.nn.functional.pad(image, [0, right, 0, below])
    return filled, torch.tensor(image.shape[1:])


def _onnx_call(content: bytes) -> Callable[[Inputs], list[np.ndarray[Any, Any]]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def call(inputs: Inputs) -> list[np.ndarray[Any, Any]]:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        outputs: list[np.ndarray[Any, Any]] = session.run(None, feed)
        return outputs

    return call


def _torch_call(content: bytes, file_format: str) -> Callable[[Inputs], list[np.ndarray[Any, Any]]]:
    buffer = io.BytesIO(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit
        if file_format == "torchscript":
            model = torch.jit.load(buffer)
        else:
            model = torch.export.load(buffer).module()

    def call(inputs: Inputs) -> list[np.ndarray[Any, Any]]:
        with torch.no_grad():
            return [x.numpy() for x in model(*inputs)]

    return call
