"""Reads and checks the folder of an exported model, including ``model.json``, its description.

Shape alphabet: K classes, M mask side.
"""

from __future__ import annotations

import hashlib
import json
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from ..messages import ConfigError, one_line

DESCRIPTION = "model.json"

FORMAT_VERSION = 1

MODEL_FILES = {
    "onnx": "model.onnx",
    "torchscript": "model.torchscript.pt",
    "exported_program": "model.pt2",
}

EXTERNAL_DATA = "model.onnx.data"
"""File for the weights of an ONNX model larger than 2 GB."""

LARGEST = 1_000_000
"""Upper limit for image sides and numbers of classes. Larger values would exhaust the memory."""


class ModelFolderError(ConfigError):
    """A folder has no usable exported model. The message is one line and names the path."""


@dataclass(frozen=True)
class ModelFile:
    """Describes the file of the model.

    Attributes:
        file: name of the file in the folder.
        format: a key of MODEL_FILES.
        sha256: SHA-256 of the file.
        opset: the ONNX opset; None for other formats.
        precision: precision of the layers: "fp32", "fp16" or "int8". Inputs and outputs are always
            float32.
        data: SHA-256 of each other file in the folder that the model needs, by name.
    """

    file: str
    format: str
    sha256: str
    opset: int | None
    precision: str
    data: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInput:
    """The input that the model expects.

    Attributes:
        format: channel order, as in INPUT.FORMAT.
        channels: number of channels.
        min_size: length of the shorter side after resizing, in pixels; 0 does not resize.
        max_size: upper limit for the longer side after resizing.
        size: (height, width) to which every image is padded at the right and bottom; None if images
            can have any size.
        interpolation: name of the resizing method.
    """

    format: str
    channels: int
    min_size: int
    max_size: int
    size: tuple[int, int] | None
    interpolation: str


@dataclass(frozen=True)
class MaskRule:
    """How to compute masks from the model's output.

    Attributes:
        threshold: pixels with at least this probability belong to the mask.
        side: M.
        paste: describes how probabilities are turned into pixels.
    """

    threshold: float
    side: int
    paste: str


@dataclass(frozen=True)
class Weights:
    """Name and SHA-256 of the file that the exported weights come from."""

    file: str
    sha256: str


@dataclass(frozen=True)
class ModelDescription:
    """The content of ``model.json``.

    Attributes:
        format_version: FORMAT_VERSION.
        model: the model's file.
        num_classes: K.
        class_names: names of the K classes; None if unknown.
        category_ids: ids of the classes in COCO files; None if the names are unknown.
        input: the input that the model expects.
        outputs: names of the outputs, in order.
        score_threshold: the scores of all detections are above this value.
        nms_threshold: IoU above which the worse of two detections of a class is dropped.
        detections_per_image: upper limit for the number of detections in an image.
        mask: how to compute masks; None if the model has no masks.
        mask_scoring: whether the model returns mask scores.
        versions: versions of the packages that exported the model.
        weights: the file that the exported weights come from.
        date: date of the export in ISO 8601.
    """

    format_version: int
    model: ModelFile
    num_classes: int
    class_names: list[str] | None
    category_ids: list[int] | None
    input: ModelInput
    outputs: list[str]
    score_threshold: float
    nms_threshold: float
    detections_per_image: int
    mask: MaskRule | None
    mask_scoring: bool
    versions: dict[str, str]
    weights: Weights
    date: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_model_folder(folder: Path) -> ModelDescription:
    """Reads ``model.json`` and checks that the folder contains the model it describes.

    Args:
        folder: a folder written by tools/export_model.py.

    Raises:
        ModelFolderError: if a file is missing or invalid. The message names the file and, for
            ``model.json``, the key.
    """
    path = folder / DESCRIPTION
    if folder.is_file():
        raise ModelFolderError(
            f"{folder} is a file; give the folder that contains it, {folder.parent}"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        kind = f"{folder} has no {DESCRIPTION}" if folder.is_dir() else f"{folder} is not a folder"
        raise ModelFolderError(f"{kind}; export a model with tools/export_model.py") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} cannot be read: {one_line(error)}") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ModelFolderError(
            f"{path}: format_version is {_shown(version)}, but this version of mask_head_plugin "
            f"can read only {FORMAT_VERSION}; export the model again"
        )
    description: ModelDescription = _parsed(ModelDescription, document, str(path), "")
    _check_values(description, path)
    model = description.model
    for name, sha256 in {model.file: model.sha256, **model.data}.items():
        _check_file(folder / name, sha256)
    return description


def _check_values(description: ModelDescription, path: Path) -> None:
    model = description.model
    if model.format not in MODEL_FILES:
        raise ModelFolderError(
            f"{path}: model.format is {_shown(model.format)}, which is not in {sorted(MODEL_FILES)}"
        )
    for key, name in (("file", model.file), *(("data", name) for name in model.data)):
        if Path(name).name != name or not name.isprintable():
            raise ModelFolderError(
                f"{path}: model.{key} is {_shown(name)}, which is not a file name"
            )
    given, mask = description.input, description.mask
    size = given.size or (1, 1)
    for key, is_wrong in {
        "num_classes": not 1 <= description.num_classes <= LARGEST,
        "input.min_size": not 0 <= given.min_size <= LARGEST,
        "input.max_size": not 1 <= given.max_size <= LARGEST,
        "input.size": not 1 <= min(size) <= max(size) <= LARGEST,
        "mask.threshold": mask is not None and not 0 < mask.threshold <= 1,
    }.items():
        if is_wrong:
            raise ModelFolderError(f"{path}: {key} is out of range")
    for key in ("class_names", "category_ids"):
        values = getattr(description, key)
        if values is not None and len(values) != description.num_classes:
            raise ModelFolderError(
                f"{path}: {key} has {len(values)} entries, but num_classes is "
                f"{description.num_classes}"
            )
    ids = description.category_ids or []
    if len(set(ids)) < len(ids):
        raise ModelFolderError(f"{path}: category_ids contains an id twice")
    expected = ["boxes", "scores", "classes"]
    expected += ["mask_probs"] if description.mask else []
    expected += ["mask_scores"] if description.mask_scoring else []
    if description.outputs != expected:
        raise ModelFolderError(f"{path}: outputs is {description.outputs}, not {expected}")


def _check_file(path: Path, sha256: str) -> None:
    try:
        is_missing = not path.is_file()
        is_other = not is_missing and sha256_of(path) != sha256
    except OSError as error:
        raise ModelFolderError(
            f"{path.parent / DESCRIPTION}: its file {_shown(path.name)} cannot be read: "
            f"{error.strerror}"
        ) from error
    if is_missing:
        raise ModelFolderError(f"{path} is missing, but {DESCRIPTION} in the same folder lists it")
    if is_other:
        raise ModelFolderError(
            f"{path} is not the file that {DESCRIPTION} describes, because its SHA-256 differs: it "
            "was cut off or replaced; copy the whole folder again"
        )


def _parsed(kind: Any, value: Any, path: str, key: str) -> Any:
    """Converts a JSON value to a type.

    Args:
        kind: a type used in the dataclasses of this module.
        value: the JSON value.
        path: path of the file, for error messages.
        key: full key of the value, for error messages.
    """
    if is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        optional = {x.name for x in fields(kind) if x.default_factory is not MISSING}
        missing = [x.name for x in fields(kind) if x.name not in {*value, *optional}]
        if missing:
            raise ModelFolderError(f"{path}: {key + '.' if key else ''}{missing[0]} is missing")
        prefix = f"{key}." if key else ""
        # Other keys are ignored, because a later version may add some.
        values = {
            x: _parsed(hint, value[x], path, prefix + x) for x, hint in hints.items() if x in value
        }
        made: Any = kind
        return made(**values)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is UnionType:
        if value is None and NoneType in arguments:
            return None
        return _parsed(arguments[0], value, path, key)
    if origin is list and isinstance(value, list):
        return [_parsed(arguments[0], x, path, f"{key}[{k}]") for k, x in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(_parsed(arguments[0], x, path, f"{key}[{k}]") for k, x in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _parsed(arguments[1], x, path, f"{key}.{k}") for k, x in value.items()}
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    if (
        isinstance(kind, type)
        and type(value) is kind
        and (not isinstance(value, float) or isfinite(value))
    ):
        return value
    raise ModelFolderError(f"{path}: {key} is {_shown(value)}, which is not a valid value")


def _shown(value: Any) -> str:
    """Returns the start of a JSON value as one line."""
    return json.dumps(value)[:80]
