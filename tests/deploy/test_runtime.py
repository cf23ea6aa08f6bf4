"""The runtime of exported models: results, invalid input, and independence from PyTorch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from made_model_folder import CLASSES, MASK_PROBS, SCORES, SHARES, write_model_folder
from pycocotools import mask as coco_mask

from mask_head_plugin.deploy import runtime
from mask_head_plugin.deploy.model_folder import ModelFolderError
from mask_head_plugin.deploy.runtime import Predictor
from mask_head_plugin.ops import encode_masks

IMAGE = np.full((48, 90, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder)
    return folder


def test_results_are_in_pixels_of_the_image(folder):
    found = Predictor(folder)(IMAGE)
    right = SHARES * np.array([90, 48, 90, 48], np.float32)
    np.testing.assert_allclose(found.boxes, right, atol=1e-4)
    assert found.boxes.dtype == found.scores.dtype == np.float32
    np.testing.assert_allclose(found.scores, SCORES)
    assert found.class_ids.tolist() == CLASSES.tolist()
    assert found.class_names == ["dog", "cat", "dog"] and found.image_size == (48, 90)
    assert found.mask_scores is None and len(found) == 3
    json.dumps(found.masks)
    boxes = torch.from_numpy(found.boxes)
    eager = encode_masks(torch.from_numpy(MASK_PROBS), boxes, (48, 90))
    for k, rle in enumerate(eager):
        assert found.mask(k).dtype == bool and found.mask(k).shape == (48, 90)
        assert (found.mask(k) != coco_mask.decode(rle)).sum() <= 1  # rounding


def test_a_list_of_images_gives_the_results_of_single_ones(folder):
    rng = np.random.default_rng(0)
    predictor = Predictor(folder, threads=1)
    images = [rng.integers(0, 200, (h, w, 3), np.uint8) for h, w in ((48, 90), (1, 1), (300, 20))]
    together = predictor(images)
    for image, found in zip(images, together, strict=True):
        alone = predictor(image)
        assert np.array_equal(found.boxes, alone.boxes) and found.masks == alone.masks
        assert np.array_equal(found.scores, alone.scores)
        assert found.image_size == image.shape[:2]
    assert predictor([]) == []


def test_a_model_of_fixed_size_gives_the_same_results(tmp_path, folder):
    write_model_folder(tmp_path, input={"size": (70, 100)})
    found, right = Predictor(tmp_path)(IMAGE), Predictor(folder)(IMAGE)
    np.testing.assert_allclose(found.boxes, right.boxes, atol=1e-4)
    assert found.class_names == right.class_names
    np.testing.assert_allclose(Predictor(tmp_path)(IMAGE[:, :9]).scores, SCORES)


def test_models_without_masks_names_or_detections_and_models_with_mask_scores(tmp_path):
    write_model_folder(tmp_path / "boxes", masks=False)
    found = Predictor(tmp_path / "boxes")(IMAGE)
    assert found.masks is None and len(found.boxes) == 3
    with pytest.raises(ValueError, match="has no masks"):
        found.mask(0)
    write_model_folder(tmp_path / "scoring", scoring=True, class_names=None, category_ids=None)
    found = Predictor(tmp_path / "scoring")(IMAGE)
    np.testing.assert_allclose(found.mask_scores, SCORES / 2)
    assert found.class_names == ["2", "1", "2"]
    write_model_folder(tmp_path / "nothing", count=0)
    found = Predictor(tmp_path / "nothing")(IMAGE)
    assert found.boxes.shape == (0, 4) and found.masks == [] == found.class_names


def test_boxes_are_clipped_and_empty_ones_left_out(tmp_path):
    shares = np.array([[-1, 0.5, 0.5, 2], [1.2, 0, 1.5, 1], [0.2, 0.2, 0.4, 0.4]], np.float32)
    write_model_folder(tmp_path, shares=shares, scoring=True)
    found = Predictor(tmp_path)(IMAGE)
    right = np.array([[0, 24, 45, 48], [18, 9.6, 36, 19.2]])
    np.testing.assert_allclose(found.boxes, right, atol=1e-4)
    np.testing.assert_allclose(found.scores, SCORES[[0, 2]])
    assert len(found.masks) == len(found.mask_scores) == 2 and found.class_names == ["dog", "dog"]


@pytest.mark.parametrize(
    ("image_format", "brightest"),
    [("BGR", 200), ("RGB", 200), ("L", round(200 * 0.114)), ("YUV-BT.601", 0.436 * 200 / 255)],
)
def test_the_model_gets_the_channels_of_its_input_format(tmp_path, image_format, brightest):
    """In a blue image, grey is 0.114 times the blue value; the largest YUV value is 0.436 times."""
    channels = 1 if image_format == "L" else 3
    write_model_folder(tmp_path, channels=channels, input={"format": image_format})
    blue = np.zeros((20, 30, 3), np.uint8)
    blue[..., 0] = 200
    found = Predictor(tmp_path)(blue)
    np.testing.assert_allclose(found.scores, SCORES * brightest / 255, rtol=1e-3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "image 1 is None, which cv2.imread returns"),
        (np.zeros((4, 4), np.uint8), r"image 1 is an array \(4, 4\) of uint8"),
        (np.zeros((4, 4, 3)), "of float64, but must be"),
        (np.zeros((0, 4, 3), np.uint8), r"image 1 is an array \(0, 4, 3\)"),
    ],
)
def test_an_argument_that_is_not_an_image_is_named(folder, image, message):
    with pytest.raises(ValueError, match=message):
        Predictor(folder)([IMAGE, image])


def break_opset(folder):
    write_model_folder(folder, opset=99)


def break_names(folder):
    write_model_folder(folder, masks=False)
    document = json.loads((folder / "model.json").read_text())
    other = write_model_folder(folder)
    document["model"]["sha256"] = other.model.sha256
    (folder / "model.json").write_text(json.dumps(document))


def break_size(folder):
    write_model_folder(folder, input={"size": [60, 80]})
    rewritten(input__size=[60, 90])(folder)


def break_bytes(folder):
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-40])


def rewritten(**changes):
    def change(folder):
        document = json.loads((folder / "model.json").read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = document
            for parent in parents:
                node = node[parent]
            node[last] = value
        (folder / "model.json").write_text(json.dumps(document))

    return change


def truncate_and_vouch(folder):
    """Simulates a file that was truncated before its hash was computed."""
    break_bytes(folder)
    sha256 = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    rewritten(model__sha256=sha256)(folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "model.json").unlink(), r"has no model\.json"),
        (lambda folder: (folder / "model.onnx").unlink(), r"model\.onnx is missing"),
        (rewritten(format_version=2), "format_version is 2"),
        (rewritten(model__format="torchscript"), "export it with --format onnx"),
        (rewritten(input__format="HSV"), "in the format 'HSV'"),
        (break_bytes, "SHA-256 differs"),
        (truncate_and_vouch, r"model\.onnx cannot be loaded by onnxruntime"),
        (break_opset, r"model\.onnx cannot be loaded by onnxruntime .*[Oo]pset"),
        (break_names, "has the outputs"),
        (rewritten(input__channels=1), r"image, but model.json says tensor\(float\) \[1, "),
        (break_size, r"\[3, 60, 80\] as the image, but model.json says .* \[3, 60, 90\]"),
    ],
)
def test_an_unusable_folder_is_reported_in_one_line(tmp_path, break_it, message):
    write_model_folder(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ModelFolderError, match=message) as caught:
        Predictor(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewritten(num_classes=1, class_names=["cat"], category_ids=[1]), "numbers from 0 to 0"),
        (rewritten(mask__side=28), r"mask_probs of shape \(3, 14, 14\) for 3 detections"),
    ],
)
def test_outputs_that_contradict_the_description_are_reported(tmp_path, change, message):
    write_model_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(ModelFolderError, match=message):
        Predictor(tmp_path)(IMAGE)


def test_invalid_arguments_are_reported(folder, tmp_path):
    with pytest.raises(ModelFolderError, match="nowhere is not a folder"):
        Predictor(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="threads is 0"):
        Predictor(folder, threads=0)
    with pytest.raises(ValueError, match="threads is 100000"):
        Predictor(folder, threads=100_000)


def test_the_error_for_a_missing_onnxruntime_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "mask_head_plugin\[deploy\]"'):
        runtime.Predictor(folder)


BLOCKED = """
import sys
class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Refused)
sys.path[:0] = {paths}
"""
NO_TORCH = ("torch", "torchvision", "detectron2", "fvcore", "iopath", "faster_coco_eval", "yaml")


def run_without(*modules, code):
    """Runs code in a process in which some modules cannot be imported."""
    start = BLOCKED.format(
        blocked=modules, paths=[str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]
    )
    command = [sys.executable, "-c", start + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_runtime_needs_no_torch_detectron2_pillow_or_opencv(folder):
    code = f"""
import numpy as np
from mask_head_plugin.deploy.runtime import Predictor
found = Predictor({str(folder)!r})(np.full((48, 90, 3), 255, np.uint8))
print(found.class_names, found.mask(0).sum(), sorted(set({NO_TORCH}) & set(sys.modules)))
import mask_head_plugin
try:
    from mask_head_plugin import load_config
except ImportError as error:
    print(error)
try:
    from mask_head_plugin.evaluation import MaskEvaluator
except ImportError as error:
    print(error)
print(hasattr(mask_head_plugin, "other"))
"""
    result = run_without(*NO_TORCH, "PIL", "cv2", "tqdm", "matplotlib", code=code)
    lines = result.stdout.splitlines()
    assert result.stderr == ""
    pixels = Predictor(folder)(IMAGE).mask(0).sum()
    assert lines[0] == f"['dog', 'cat', 'dog'] {pixels} []"
    assert lines[1].startswith(
        "mask_head_plugin.load_config needs detectron2, which cannot be imported: "
        "No module named 'detectron2'; "
    )
    assert lines[2].startswith("mask_head_plugin.evaluation.MaskEvaluator needs detectron2")
    assert lines[3] == "False"


def test_predict_needs_no_torch_or_detectron2(folder, tmp_path):
    code = f"""
import cv2, runpy, numpy as np
cv2.imwrite({str(tmp_path / "a.png")!r}, np.full((48, 90, 3), 255, np.uint8))
sys.argv = ["predict.py", "--model", {str(folder)!r}, "--input", {str(tmp_path / "a.png")!r},
            "--output", {str(tmp_path / "out")!r}, "--semantic"]
runpy.run_path("tools/predict.py", run_name="__main__")
"""
    result = run_without(*NO_TORCH, code=code)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [x["category_name"] for x in content["annotations"]] == ["dog", "cat"]
    assert (tmp_path / "out" / "a.png").is_file()
    assert (tmp_path / "out" / "semantic" / "a.png").is_file()
