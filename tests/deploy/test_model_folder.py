"""An unusable model folder raises a one-line error that names the file and the key."""

from __future__ import annotations

import hashlib
import json

import pytest

from mask_head_plugin.deploy.model_folder import (
    DESCRIPTION,
    MaskRule,
    ModelDescription,
    ModelFile,
    ModelFolderError,
    ModelInput,
    Weights,
    read_model_folder,
)

CONTENT = b"a model"

DESCRIBED = ModelDescription(
    format_version=1,
    model=ModelFile("model.onnx", "onnx", hashlib.sha256(CONTENT).hexdigest(), 17, "fp32"),
    num_classes=2,
    class_names=["cat", "dög"],
    category_ids=[17, 18],
    input=ModelInput("BGR", 3, 800, 1333, (800, 1344), "bilinear (Pillow)"),
    outputs=["boxes", "scores", "classes", "mask_probs", "mask_scores"],
    score_threshold=0.05,
    nms_threshold=0.5,
    detections_per_image=100,
    mask=MaskRule(0.5, 28, "bilinear"),
    mask_scoring=True,
    versions={"torch": "2.14.1"},
    weights=Weights("model_final.pth", "00"),
    date="2026-11-25T00:00:00+00:00",
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.onnx").write_bytes(CONTENT)
    (tmp_path / DESCRIPTION).write_text(DESCRIBED.to_json(), encoding="utf-8")
    return tmp_path


def test_a_written_description_is_read_back(folder):
    assert read_model_folder(folder) == DESCRIBED


def test_unknown_keys_of_later_versions_are_ignored(folder):
    document = json.loads(DESCRIBED.to_json())
    document["new"] = document["model"]["new"] = 1
    (folder / DESCRIPTION).write_text(json.dumps(document))
    assert read_model_folder(folder) == DESCRIBED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format_version is 2"),
        (lambda d: d.pop("format_version"), "format_version is null"),
        (lambda d: d.pop("nms_threshold"), "nms_threshold is missing"),
        (lambda d: d["input"].pop("min_size"), "input.min_size is missing"),
        (lambda d: d.update(mask=[]), r"mask is \[\], which"),
        (lambda d: d["input"].update(size=[1]), r"input.size is \[1\]"),
        (lambda d: d["input"].update(size=[1, "2"]), r'input.size\[1\] is "2"'),
        (lambda d: d.update(mask_scoring=1), "mask_scoring is 1"),
        (lambda d: d["model"].update(opset=True), "model.opset is true"),
        (lambda d: d.update(class_names=["cat"]), "class_names has 1 entries"),
        (lambda d: d.update(category_ids=[1, 2, 3]), "category_ids has 3 entries"),
        (lambda d: d["model"].update(format="caffe"), 'model.format is "caffe"'),
        (lambda d: d["model"].update(file="../model.onnx"), 'model.file is "../model.onnx"'),
        (lambda d: d["model"].update(data={"../x": "00"}), 'model.data is "../x"'),
        (lambda d: d["model"].update(data={"x": 1}), "model.data.x is 1"),
        (lambda d: d["model"].update(file="other.onnx"), "other.onnx is missing"),
        (
            lambda d: d.update(num_classes=0, class_names=[], category_ids=None),
            "num_classes is out",
        ),
        (lambda d: d["input"].update(min_size=-1), "input.min_size is out of range"),
        (lambda d: d["input"].update(max_size=0), "input.max_size is out of range"),
        (lambda d: d["input"].update(size=[0, 8]), "input.size is out of range"),
        (lambda d: d["mask"].update(threshold=0.0), "mask.threshold is out of range"),
        (lambda d: d["mask"].update(threshold=float("nan")), "mask.threshold is NaN"),
        (lambda d: d.update(score_threshold=float("inf")), "score_threshold is Infinity"),
        (lambda d: d.update(nms_threshold=10**400), "nms_threshold is 1000"),
        (lambda d: d["input"].update(min_size=10**400), "input.min_size is out of range"),
        (
            lambda d: d.update(num_classes=10**9, class_names=None, category_ids=None),
            "num_classes is out of range",
        ),
        (lambda d: d.update(category_ids=[3, 3]), "category_ids contains an id twice"),
        (lambda d: d.update(format_version="x" * 10**6), "format_version is "),
        (lambda d: d["model"].update(format="x" * 10**6), "model.format is "),
        (lambda d: d["model"].update(file="x" * 10**6), "its file .* cannot be read"),
        (lambda d: d["model"].update(file="a\nb"), "model.file is"),
        (lambda d: d["outputs"].pop(), "outputs is"),
        (lambda d: d.update(mask_scoring=False), "outputs is"),
    ],
)
def test_invalid_entries_are_named(folder, change, message):
    document = json.loads(DESCRIBED.to_json())
    change(document)
    (folder / DESCRIPTION).write_text(json.dumps(document))
    with pytest.raises(ModelFolderError, match=message) as caught:
        read_model_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", [b"{", b"", b"\xff\xfe", b"[]", b"3", b"null", b"[" * 100_000], ids=repr
)
def test_unreadable_descriptions_are_reported(folder, text):
    (folder / DESCRIPTION).write_bytes(text)
    with pytest.raises(ModelFolderError, match=DESCRIPTION):
        read_model_folder(folder)


@pytest.mark.parametrize("content", [CONTENT[:-1], b"", CONTENT + b"1"])
def test_a_truncated_or_replaced_model_is_refused(folder, content):
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"model.onnx is not the file .* SHA-256"):
        read_model_folder(folder)


def test_external_data_of_the_model_is_verified(folder):
    document = json.loads(DESCRIBED.to_json())
    document["model"]["data"] = {"model.onnx.data": hashlib.sha256(b"weights").hexdigest()}
    (folder / DESCRIPTION).write_text(json.dumps(document))
    with pytest.raises(ModelFolderError, match=r"model.onnx.data is missing"):
        read_model_folder(folder)
    (folder / "model.onnx.data").write_bytes(b"weights")
    assert read_model_folder(folder).model.data == document["model"]["data"]
    (folder / "model.onnx.data").write_bytes(b"others")
    with pytest.raises(ModelFolderError, match=r"model.onnx.data is not the file .* SHA-256"):
        read_model_folder(folder)


def test_descriptions_without_external_data_are_accepted(folder):
    document = json.loads(DESCRIBED.to_json())
    del document["model"]["data"]
    (folder / DESCRIPTION).write_text(json.dumps(document))
    assert read_model_folder(folder) == DESCRIBED


def test_missing_folders_and_descriptions_are_reported(folder):
    (folder / DESCRIPTION).unlink()
    with pytest.raises(ModelFolderError, match=f"has no {DESCRIPTION}"):
        read_model_folder(folder)
    with pytest.raises(ModelFolderError, match="is not a folder"):
        read_model_folder(folder / "missing")
