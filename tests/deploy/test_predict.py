"""tools/predict.py as a user runs it: an exported model gives the same files as the demo."""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import pytest
from conftest import load_script
from made_model_folder import SCORES, write_model_folder
from pycocotools.coco import COCO

from mask_head_plugin.demo.media import find_sources
from mask_head_plugin.demo.model_run import ModelRun
from mask_head_plugin.demo.predictions import Categories, Detections

NUM_FRAMES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Writes four images of different sizes, a file that is not an image, and a video."""
    folder = tmp_path_factory.mktemp("inputs")
    for index, (height, width) in enumerate(((48, 90), (70, 40), (48, 90), (30, 31))):
        image = np.full((height, width, 3), 60, np.uint8)
        image[5:20, 5:20] = 255
        cv2.imwrite(str(folder / f"{index}.png"), image)
    (folder / "2b.png").write_text("no image")
    codec = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(folder / "clip.avi"), codec, 10.0, (90, 48))
    for _ in range(NUM_FRAMES):
        writer.write(np.full((48, 90, 3), 255, np.uint8))
    writer.release()
    return folder


def tool(capsys, *args):
    """Runs tools/predict.py in this process; returns exit code, stdout, stderr."""
    module = load_script("tools/predict.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["predict.py", *map(str, args)])
        code = module.main()
    return code, *capsys.readouterr()


def test_images_and_videos_give_the_same_files_as_the_demo(folder, inputs, tmp_path, capsys):
    code, out, err = tool(
        capsys, "--model", folder, "--input", inputs, "--output", tmp_path, "--semantic"
    )
    assert code == 1 and f"results are in {tmp_path}" in out
    lines = [line for line in err.splitlines() if line.startswith("predict.py: ")]
    assert len(lines) == 1 and "2b.png: is not an image" in lines[0]
    names = {str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()}
    pngs = [f"{k}.png" for k in range(4)]
    frames = [f"semantic/clip/{k:06d}.png" for k in range(NUM_FRAMES)]
    semantic = [f"semantic/{x}" for x in pngs]
    assert names == {"predictions.json", "clip.avi", *pngs, *semantic, *frames}
    found = COCO(str(tmp_path / "predictions.json"))
    assert found.dataset["categories"] == [
        {"id": 17, "name": "cat", "semantic_value": 1},
        {"id": 18, "name": "dog", "semantic_value": 2},
    ]
    assert [x.get("frame") for x in found.dataset["images"]] == [None] * 4 + list(range(NUM_FRAMES))
    for objects in found.imgToAnns.values():
        assert [x["category_id"] for x in objects] == [18, 17]  # the third is below 0.5
        assert [x["score"] for x in objects] == pytest.approx(SCORES[:2].tolist(), rel=0.05)
        assert all(found.annToMask(x).sum() == x["area"] > 0 for x in objects)
    overlay = cv2.imread(str(tmp_path / "1.png"))
    assert overlay.shape == (70, 40, 3)
    assert not np.array_equal(overlay, cv2.imread(str(inputs / "1.png")))


def test_batches_give_the_same_files(folder, inputs, tmp_path, capsys):
    for size in (1, 3):
        args = ["--model", folder, "--input", inputs, "--output", tmp_path / f"{size}"]
        assert tool(capsys, *args, "--batch-size", size, "--threads", 1)[0] == 1
    one, three = ({x.name: x.read_bytes() for x in (tmp_path / s).iterdir()} for s in "13")
    assert one == three and len(one) == 6


def test_batches_keep_the_frames_before_the_end_of_a_damaged_video(
    folder, inputs, tmp_path, capsys
):
    codec = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(tmp_path / "long.avi"), codec, 10.0, (90, 48))
    for _ in range(30):
        writer.write(np.full((48, 90, 3), 255, np.uint8))
    writer.release()
    content = (tmp_path / "long.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    counts = []
    for size in (1, 8):
        output = tmp_path / f"{size}"
        args = ["--model", folder, "--input", tmp_path / "cut.avi", "--output", output]
        code, _, err = tool(capsys, *args, "--batch-size", size)
        assert code == 1 and "frames can be read" in err
        counts.append(len(json.loads((output / "predictions.json").read_text())["images"]))
    assert counts[0] == counts[1] > 2


def test_the_threshold_removes_detections_and_the_exports_own_threshold_is_reported(
    folder, inputs, tmp_path, capsys, caplog
):
    counts = []
    for threshold in ("0.01", "0.5", "0.95"):
        args = ["--model", folder, "--input", inputs / "0.png", "--output", tmp_path / threshold]
        assert tool(capsys, *args, "--confidence-threshold", threshold)[0] == 0
        content = json.loads((tmp_path / threshold / "predictions.json").read_text())
        counts.append(len(content["annotations"]))
    assert counts == [3, 2, 0]
    assert caplog.text.count("was exported with MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.05") == 1


def test_class_thresholds_replace_the_general_one(folder, inputs, tmp_path, capsys):
    args = ["--model", folder, "--input", inputs / "0.png", "--output"]
    every = _scores(tmp_path / "every", capsys, [*args, tmp_path / "every"])
    assert len(every) == 2
    for name, score in every.items():
        flags = ["--class-thresholds", f"{name}={score}"]
        rest = _scores(tmp_path / name, capsys, [*args, tmp_path / name, *flags])
        assert rest == {x: y for x, y in every.items() if x != name}


def _scores(output, capsys, args):
    """Returns the scores of one image's detections, by class name."""
    assert tool(capsys, *args)[0] == 0
    content = json.loads((output / "predictions.json").read_text())
    return {x["category_name"]: x["score"] for x in content["annotations"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{tmp}/nowhere"], "nowhere is not a folder"),
        (["--model", "{tmp}/boxes", "--semantic"], "--semantic needs masks, but the model in"),
        (["--model", "{tmp}/scripted"], "export it with --format onnx"),
        (["--input", "nowhere.jpg"], "nowhere.jpg does not exist"),
        (["--output", "{tmp}/used"], "used already contains 0.png"),
        (["--confidence-threshold", "2"], "--confidence-threshold 2.0 is not between 0 and 1"),
        (["--class-thresholds", "cat"], "'cat' is not NAME=SCORE with a score from 0 to 1"),
        (["--class-thresholds", "cat=2"], "'cat=2' is not NAME=SCORE with a score from 0 to 1"),
        (["--class-thresholds", "cat=0.1", "cat=0.2"], "--class-thresholds contains 'cat' twice"),
        (
            ["--class-thresholds", "cow=0.1", "cat=0.2", "--class-thresholds", "pig=0.3"],
            "the model has no class 'cow', 'pig'; it has",
        ),
        (["--batch-size", "0"], "--batch-size 0 is below 1"),
        (["--threads", "-1"], "--threads -1 is not between 1 and 1024"),
        (["--threads", "100000"], "--threads 100000 is not between 1 and 1024"),
    ],
)
def test_errors_are_one_line(folder, inputs, tmp_path, capsys, flags, message):
    write_model_folder(tmp_path / "boxes", masks=False)
    scripted = write_model_folder(tmp_path / "scripted").to_json()
    (tmp_path / "scripted" / "model.json").write_text(
        scripted.replace('"onnx"', '"torchscript"', 1)
    )
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "0.png").write_text("a result")
    flags = [x.format(tmp=tmp_path) for x in flags]
    defaults = {"--model": folder, "--input": inputs / "0.png", "--output": tmp_path / "out"}
    args = [y for x in defaults.items() if x[0] not in flags for y in x]
    code, _, err = tool(capsys, *args, *flags)
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("predict.py: ")
    assert not (tmp_path / "out").exists()


def test_the_error_for_a_missing_onnxruntime_is_one_line(
    folder, inputs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = tool(capsys, "--model", folder, "--input", inputs, "--output", tmp_path)
    assert code == 2 and "needs onnxruntime: pip install" in err and err.count("\n") == 1


class Failing:
    """A model that fails on dark images and finds one box in all others."""

    categories = Categories(["thing"], [1])

    def __init__(self):
        self.sizes = []

    def find(self, images):
        self.sizes.append(len(images))
        if any(image.max() < 10 for image in images):
            raise RuntimeError("too\ndark")
        return [Detections([0], [0.9], None, np.array([[1.0, 1, 9, 9]]), None) for _ in images]

    def longest_side(self, image_hw):
        return None


def test_an_image_that_fails_does_not_affect_the_others_of_its_batch(tmp_path):
    for index in range(5):
        image = np.full((12, 12, 3), 0 if index == 1 else 99, np.uint8)
        cv2.imwrite(str(tmp_path / f"{index}.png"), image)
    model, output = Failing(), tmp_path / "out"
    output.mkdir()
    problems = ModelRun(model, output, batch_size=3).run(find_sources([str(tmp_path)]))
    assert problems == [f"{tmp_path}/1.png: made the model fail: RuntimeError: too dark"]
    assert model.sizes == [3, 1, 1, 1, 2]
    content = json.loads((output / "predictions.json").read_text())
    names = [x["file_name"].rpartition("/")[2] for x in content["images"]]
    assert names == ["0.png", "2.png", "3.png", "4.png"]


def test_help_shows_flags_and_files(capsys):
    with pytest.raises(SystemExit):
        tool(capsys, "--help")
    text = capsys.readouterr().out
    for word in (
        *("--model", "--input", "--video-input", "--output", "--confidence-threshold"),
        *("--semantic", "--batch-size", "--threads", "predictions.json", "pip install"),
    ):
        assert word in text
