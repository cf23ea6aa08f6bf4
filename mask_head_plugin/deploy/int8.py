"""Static quantisation of an ONNX model: the weights and activations of its layers become 8-bit.

The ranges of activations are measured on calibration images. Boxes, scores, RoI pooling, inputs and
outputs stay float32. In the result, ONNX's QuantizeLinear and DequantizeLinear surround each layer,
and runtimes fuse them with it into an integer layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..durable_files import write_durably
from ..progress import progress
from .formats import Inputs

NUM_CALIBRATION_IMAGES = 64

QUANTISED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Relu")
"""Operators to quantise. ReLU is included so that it is fused into the preceding layer."""

PREDICTORS = ("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred")
"""Layers that compute scores and boxes. They stay float32, because they are small and 256 levels
would be too coarse for them.
"""

Feed = Mapping[str, npt.NDArray[Any]]


def quantise(path: Path, images: Sequence[str], read: Callable[[str], Inputs]) -> None:
    """Quantises weights and activations of a model to 8 bits, in place.

    Args:
        path: the file of a float32 ONNX model.
        images: calibration images. The model must detect something in at least one of them, so that
            its mask head gets inputs.
        read: returns the model's inputs for an image.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        prepared, result = Path(folder, "prepared.onnx"), Path(folder, path.name)
        # Only infers shapes. Optimisation might add operators that only onnxruntime supports.
        quant_pre_process(path, prepared, skip_symbolic_shape=True, skip_optimization=True)
        quantize_static(
            prepared,
            result,
            _reader(images, read),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED_OPERATORS),
            nodes_to_exclude=_kept(onnx.load(prepared).graph),
            per_channel=True,
            # Uses 7 bits for weights. With 8, sums of products would overflow 16 bits on processors
            # without VNNI, and results would depend on the machine.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        onnx.checker.check_model(str(result), full_check=True)
        content = result.read_bytes()
    write_durably(path, lambda file: file.write(content))


def _kept(graph: Any) -> list[str]:
    """Returns the names of nodes that stay float32: predictors, and products without weights."""
    weights = {x.name for x in graph.initializer}
    return [
        node.name
        for node in graph.node
        if any(f"/{name}" in node.name for name in PREDICTORS)
        or (node.op_type == "MatMul" and not weights.intersection(node.input))
    ]


def _reader(images: Sequence[str], read: Callable[[str], Inputs]) -> Any:
    """Returns onnxruntime's reader of calibration images."""
    from onnxruntime.quantization import CalibrationDataReader

    def feeds() -> Iterator[Feed]:
        for path in progress(images, "calibrating", "image"):
            names = ("image", "image_hw")
            yield {name: x.numpy() for name, x in zip(names, read(path), strict=False)}

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = feeds()

        def get_next(self) -> Feed | None:
            return next(self.feeds, None)

    return Reader()
