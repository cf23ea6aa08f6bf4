"""Writes folders of exported models that have only a few operators and known detections."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mask_head_plugin.deploy.model_folder import (
    MaskRule,
    ModelDescription,
    ModelFile,
    ModelInput,
    Weights,
)

SHARES = np.array([[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 0.4], [0.3, 0.3, 0.4, 0.35]], np.float32)
"""Boxes as fractions of the image's width and height."""
SCORES = np.array([0.9, 0.6, 0.2], np.float32)
"""Scores for a white image. For other images, they are proportional to the largest pixel value."""
CLASSES = np.array([1, 0, 1])
MASK_PROBS = np.random.default_rng(0).uniform(size=(3, 14, 14)).astype(np.float32)


def write_model_folder(
    folder: Path,
    *,
    masks: bool = True,
    scoring: bool = False,
    count: int = 3,
    shares: npt.NDArray[np.float32] = SHARES,
    opset: int = 17,
    channels: int = 3,
    **changes: Any,
) -> ModelDescription:
    """Writes a model that finds the same objects, relative to the image size, in every image.

    Args:
        folder: created if missing.
        masks: whether the model predicts masks.
        scoring: whether the masks have scores.
        count: number of objects, up to 3.
        shares: boxes of the objects, as fractions of the image.
        opset: ONNX opset.
        channels: number of input channels.
        changes: values to replace in ``model.json``. ``input`` is a dict of values to replace in
            the section ``input``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    changed_input = changes.pop("input", {})
    size = changed_input.get("size")
    graph = _graph(masks, scoring, shares[:count], opset, channels, size)
    content = graph.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    outputs = ["boxes", "scores", "classes", *["mask_probs"] * masks, *["mask_scores"] * scoring]
    given = ModelInput("BGR", channels, 60, 100, None, "bilinear")
    sha256 = hashlib.sha256(content).hexdigest()
    description = ModelDescription(
        format_version=1,
        model=ModelFile("model.onnx", "onnx", sha256, opset, "fp32"),
        num_classes=2,
        class_names=["cat", "dog"],
        category_ids=[17, 18],
        input=replace(given, **changed_input),
        outputs=outputs,
        score_threshold=0.05,
        nms_threshold=0.5,
        detections_per_image=100,
        mask=MaskRule(0.5, 14, "bilinear") if masks else None,
        mask_scoring=scoring,
        versions={},
        weights=Weights("made", ""),
        date="2026-11-25T00:00:00",
    )
    description = replace(description, **changes)
    (folder / "model.json").write_text(description.to_json())
    return description


def _graph(
    masks: bool,
    scoring: bool,
    shares: npt.NDArray[np.float32],
    opset: int,
    channels: int,
    size: Any,
) -> onnx.ModelProto:
    count = len(shares)
    constants = {
        "shares": shares,
        "full": SCORES[:count],
        "ids": CLASSES[:count],
        "probs": MASK_PROBS[:count],
        "half": np.float32(0.5),
        "white": np.float32(255),
        "order": np.array([1, 0, 1, 0]),  # width, height, width, height
        "one": np.array([1]),
        "end": np.array([3]),
    }
    nodes = [
        *([] if size else [
            helper.make_node("Shape", ["image"], ["chw"]),
            helper.make_node("Slice", ["chw", "one", "end"], ["image_hw"]),
        ]),
        helper.make_node("Cast", ["image_hw"], ["hw"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["hw", "order"], ["whwh"]),
        helper.make_node("Mul", ["shares", "whwh"], ["boxes"]),
        helper.make_node("ReduceMax", ["image"], ["brightest"], keepdims=0),
        helper.make_node("Div", ["brightest", "white"], ["light"]),
        helper.make_node("Mul", ["full", "light"], ["scores"]),
        helper.make_node("Identity", ["ids"], ["classes"]),
    ]  # fmt: skip
    kinds: dict[str, tuple[int, list[Any]]] = {
        "boxes": (TensorProto.FLOAT, ["R", 4]),
        "scores": (TensorProto.FLOAT, ["R"]),
        "classes": (TensorProto.INT64, ["R"]),
    }
    if masks:
        nodes.append(helper.make_node("Identity", ["probs"], ["mask_probs"]))
        kinds["mask_probs"] = (TensorProto.FLOAT, ["R", 14, 14])
    if scoring:
        nodes.append(helper.make_node("Mul", ["scores", "half"], ["mask_scores"]))
        kinds["mask_scores"] = (TensorProto.FLOAT, ["R"])
    hw = list(size or ("H", "W"))
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [channels, *hw])]
    if size:
        inputs.append(helper.make_tensor_value_info("image_hw", TensorProto.INT64, [2]))
    outputs = [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    tensors = [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()]
    graph = helper.make_graph(nodes, "made", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
