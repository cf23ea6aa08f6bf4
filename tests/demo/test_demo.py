"""tools/demo.py as a user runs it: the files in the output folder, and one-line errors."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, ROOT, SHARED_DATA, SMALL_RESNET
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.torch import load_file, save_file

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.checkpoint import MaskHeadCheckpointer, WeightsPolicy
from mask_head_plugin.data import shapes
from mask_head_plugin.demo import media
from mask_head_plugin.demo.demo import run_demo
from mask_head_plugin.demo.media import find_sources
from mask_head_plugin.demo.predictions import ColourKeeper, Detections
from mask_head_plugin.engine import Trainer
from mask_head_plugin.engine.predictor import BGRPredictor

CONFIG = str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")
WEIGHTS = ["MODEL.WEIGHTS", str(CHECKPOINT)]
NO_MASKS = ["MODEL.MASK_ON", "False", "MODEL.ROI_MASK_HEAD.LOSS_WEIGHT", "1.0"]
NUM_FRAMES = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Writes six images of the embedded data set, with their annotations next to the folder."""
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_split(folder, "val", 6)
    return folder / "val"


@pytest.fixture(scope="module")
def video(images, tmp_path_factory):
    """Writes a video in which an image moves to the right."""
    path = tmp_path_factory.mktemp("video") / "moving.avi"
    image = cv2.imread(str(images / "000001.png"))
    write_video(path, [np.roll(image, 2 * i, axis=1) for i in range(NUM_FRAMES)])
    return path


def write_video(path, frames, fps=10.0, backend=cv2.CAP_ANY):
    codec = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), backend, codec, fps, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()


def run(inputs, output, *opts, **kwargs):
    """Runs the demo; returns the content of predictions.json and the list of problems."""
    opts = ["MODEL.DEVICE", "cpu", *WEIGHTS, *opts]
    problems = run_demo(CONFIG, opts, [str(x) for x in inputs], output, **kwargs)
    return json.loads((output / "predictions.json").read_text()), problems


def paint(content, image) -> np.ndarray:
    """Computes an image's semantic map from predictions.json, independently of the demo."""
    value = {c["id"]: c["semantic_value"] for c in content["categories"]}
    painted = np.zeros((image["height"], image["width"]), int)
    found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
    for a in sorted(reversed(found), key=lambda a: a.get("mask_score", a["score"])):
        painted[coco_mask.decode(a["segmentation"]) > 0] = value[a["category_id"]]
    return painted


def tool(capsys, *args):
    """Runs tools/demo.py in this process; returns exit code, stdout, stderr."""
    spec = importlib.util.spec_from_file_location("demo_tool", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo.py", *map(str, args)])
        code = module.main()
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def result(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    content, problems = run([images], output, semantic=True)
    assert problems == []
    return output, content


def test_each_image_gets_an_overlay_with_its_name_and_size(images, result):
    output, content = result
    for path in images.iterdir():
        image, overlay = cv2.imread(str(path)), cv2.imread(str(output / path.name))
        assert overlay.shape == image.shape and not np.array_equal(overlay, image)
    assert len(content["images"]) == 6


def test_predictions_can_be_read_by_pycocotools_and_match_the_true_objects(images, result):
    output, content = result
    found = COCO(str(output / "predictions.json"))
    truth = COCO(str(images.parent / "annotations" / "val.json"))
    assert {c["id"]: c["name"] for c in found.cats.values()} == {
        c["id"]: c["name"] for c in truth.cats.values()
    }
    hits = 0
    for image in content["images"]:
        assert Path(image["file_name"]).is_file()
        for a in found.imgToAnns[image["id"]]:
            assert a["score"] > 0.5 and a["category_name"] == found.cats[a["category_id"]]["name"]
            assert found.annToMask(a).sum() == a["area"] > 0 and "mask_score" not in a
            masked, box = coco_mask.toBbox(a["segmentation"]), np.array(a["bbox"])
            assert (masked[:2] >= box[:2] - 1).all()
            assert (masked[:2] + masked[2:] <= box[:2] + box[2:] + 1).all()
            hits += any(
                min(coco_mask.iou([a[key]], [t[key]], [0]) for key in ("segmentation", "bbox"))
                > 0.7
                for t in truth.imgToAnns[int(Path(image["file_name"]).stem)]
                if t["category_id"] == a["category_id"]
            )
    assert hits >= 0.8 * len(content["annotations"]) >= 5


def test_semantic_maps_have_the_values_given_in_the_categories(result):
    output, content = result
    values = set()
    for image in content["images"]:
        stem = Path(image["file_name"]).stem
        found = cv2.imread(str(output / "semantic" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert found.dtype == np.uint8 and np.array_equal(found, paint(content, image))
        values |= set(np.unique(found).tolist())
    assert len(values) > 2


def test_bitmask_output_gives_the_same_files(images, result, tmp_path):
    output, content = result
    assert run([images], tmp_path, "MODEL.MASK_OUTPUT", "bitmask")[0] == content
    for path in images.iterdir():
        assert (tmp_path / path.name).read_bytes() == (output / path.name).read_bytes()
    assert not (tmp_path / "semantic").exists()


def test_a_model_without_masks_gives_boxes(images, result, tmp_path):
    content, _ = run([images], tmp_path, *NO_MASKS)
    boxes = [a["bbox"] for a in result[1]["annotations"]]
    np.testing.assert_allclose([a["bbox"] for a in content["annotations"]], boxes, atol=0.01)
    for a in content["annotations"]:
        assert "segmentation" not in a and a["area"] == a["bbox"][2] * a["bbox"][3]
    name = "000001.png"
    assert (tmp_path / name).read_bytes() != (result[0] / name).read_bytes()


def test_the_threshold_removes_detections(images, result, tmp_path):
    strict, _ = run([images], tmp_path / "strict", confidence_threshold=0.999)
    every, _ = run([images], tmp_path / "every", confidence_threshold=0.0)
    counts = [len(x["annotations"]) for x in (strict, result[1], every)]
    assert counts[0] < counts[1] < counts[2]
    assert min(a["score"] for a in strict["annotations"]) > 0.999


def test_class_thresholds_replace_the_general_one(images, tmp_path):
    every, _ = run([images], tmp_path / "every", confidence_threshold=0.0)
    kwargs = {"confidence_threshold": 0.9, "thresholds": ["ring=0", "star=0.99"]}
    content, _ = run([images], tmp_path / "own", **kwargs)
    least = {"ring": 0, "star": 0.99}
    expected = [a for a in every["annotations"] if a["score"] > least.get(a["category_name"], 0.9)]
    assert [a["score"] for a in content["annotations"]] == [a["score"] for a in expected]
    assert (
        len({a["category_name"] for a in expected}) > 2 < len(expected) < len(every["annotations"])
    )


@pytest.fixture(scope="module")
def weights_of_other_models(tmp_path_factory):
    """Returns a function that writes the weights of a model with other options.

    Weights that fit come from the checkpoint; the others are random.
    """

    def make(*opts: str) -> str:
        cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu", *opts])
        torch.manual_seed(0)
        model = Trainer.build_model(cfg)
        MaskHeadCheckpointer(model, policy=WeightsPolicy(strict=False)).load(str(CHECKPOINT))
        path = tmp_path_factory.mktemp("weights") / "model.pth"
        torch.save({"model": model.state_dict()}, path)
        return str(path)

    return make


def test_mask_scores_are_written_and_decide_the_semantic_map(
    images, weights_of_other_models, tmp_path
):
    opts = ["MODEL.ROI_MASK_HEAD.SCORING.ENABLED", "True"]
    opts += ["MODEL.WEIGHTS", weights_of_other_models(*opts)]
    content, _ = run([images], tmp_path, *opts, semantic=True, confidence_threshold=0.01)
    assert all(0 <= a["mask_score"] <= 1 for a in content["annotations"])
    for image in content["images"]:
        name = Path(image["file_name"]).name
        found = cv2.imread(str(tmp_path / "semantic" / name), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(found, paint(content, image))


def test_more_than_255_classes_use_16_bits_and_numbers_as_names(
    images, weights_of_other_models, tmp_path, caplog
):
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", "300"]
    opts += ["MODEL.WEIGHTS", weights_of_other_models(*opts)]
    image = images / "000001.png"
    content, _ = run([image], tmp_path, *opts, semantic=True, confidence_threshold=0)
    found = cv2.imread(str(tmp_path / "semantic" / image.name), cv2.IMREAD_UNCHANGED)
    assert found.dtype == np.uint16 and np.array_equal(found, paint(content, content["images"][0]))
    assert found.max() > 255
    assert content["categories"][299] == {"id": 300, "name": "300", "semantic_value": 300}
    names = "ring, star, cross, crescent, arrow"
    assert f"no data set has 300 classes: the data set has 5, {names}" in caplog.text


def test_class_names_come_from_coco_files_and_otherwise_are_numbers(images, tmp_path, caplog):
    file = json.loads((images.parent / "annotations" / "val.json").read_text())
    for category in file["categories"]:
        category["name"] += "!"
        category["id"] *= 10
    for annotation in file["annotations"]:
        annotation["category_id"] *= 10
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(file))
    opts = ["DATASETS.COCO_FILES", repr([["demo_mine", str(path), str(images)]])]
    opts += ["DATASETS.TRAIN", "()", "DATASETS.TEST", "('demo_mine',)"]
    nameless = tmp_path / "nameless.safetensors"  # weights with other class names would be refused
    save_file(load_file(CHECKPOINT), nameless)
    opts += ["MODEL.WEIGHTS", str(nameless)]
    content, _ = run([images / "000001.png"], tmp_path / "a", *opts)
    assert content["categories"][1] == {"id": 20, "name": "star!", "semantic_value": 2}
    assert content["annotations"][0]["category_name"].endswith("!")
    path.unlink()
    content, _ = run([images / "000001.png"], tmp_path / "b", *opts)
    assert content["categories"][1] == {"id": 2, "name": "2", "semantic_value": 2}
    assert "mine.json does not exist" in caplog.text


def test_a_video_gives_a_video_in_which_objects_keep_their_colours(video, tmp_path):
    content, problems = run([video], tmp_path, semantic=True)
    assert problems == []
    assert [x["frame"] for x in content["images"]] == list(range(NUM_FRAMES))
    assert {a["frame"] for a in content["annotations"]} == set(range(NUM_FRAMES))
    overlay, original = cv2.VideoCapture(str(tmp_path / "moving.avi")), cv2.VideoCapture(str(video))
    assert overlay.get(cv2.CAP_PROP_FPS) == 10
    tints = []
    arrows = {a["frame"]: a for a in content["annotations"] if a["category_name"] == "arrow"}
    for index in range(NUM_FRAMES):
        (_, drawn), (_, frame) = overlay.read(), original.read()
        assert drawn.shape == frame.shape
        name = tmp_path / "semantic" / "moving" / f"{index:06d}.png"
        semantic = cv2.imread(str(name), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(semantic, paint(content, content["images"][index]))
        if index in arrows:
            inside = cv2.erode(coco_mask.decode(arrows[index]["segmentation"]), np.ones((5, 5)))
            tints.append(drawn[inside > 0].astype(float).mean(0) - frame[inside > 0].mean(0))
    assert not overlay.read()[0]
    assert len(tints) > NUM_FRAMES / 2 and np.std(tints, axis=0).max() < 12


def detections(*boxes, classes=None, rles=None) -> Detections:
    n = len(boxes)
    return Detections(
        classes or [0] * n, [0.9] * n, None, np.array(boxes, float).reshape(-1, 4), rles
    )


def test_colours_follow_objects_of_the_same_class():
    keeper = ColourKeeper()
    left, right = [0, 0, 10, 10], [50, 0, 60, 10]
    assert keeper.numbers(detections(left, right)) == [0, 1]
    assert keeper.numbers(detections([51, 0, 61, 10], [1, 0, 11, 10])) == [1, 0]
    assert keeper.numbers(detections(left, right, classes=[0, 1])) == [0, 2]
    # Only one of two equal detections can keep the colour.
    assert keeper.numbers(detections(left, left)) == [0, 3]


@pytest.mark.parametrize("with_masks", [False, True])
def test_a_missed_object_keeps_its_colour_for_eight_frames(with_masks):
    def found(*columns):
        boxes = [[x, 0, x + 10, 10] for x in columns]
        rles = [coco_mask.frPyObjects([[x, 0, x + 10, 0, x + 10, 10, x, 10]], 99, 99)[0]
                for x in columns]  # fmt: skip
        return detections(*boxes, rles=rles if with_masks else None)

    keeper = ColourKeeper()
    left, right = 0, 50
    assert keeper.numbers(found(left, right)) == [0, 1]
    assert keeper.numbers(found(right)) == [1]
    assert keeper.numbers(found(right + 1, left + 1)) == [1, 0]
    assert [keeper.numbers(found()) for _ in range(8)] == [[]] * 8
    assert keeper.numbers(found(left)) == [0]  # ninth frame without the object on the right
    assert keeper.numbers(found(right, left)) == [2, 0]


def test_images_of_any_kind_can_be_read(images, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    image = Image.open(images / "000001.png")
    image.convert("L").save(folder / "grey.png")
    image.convert("RGBA").save(folder / "alpha.PNG")
    image.save(folder / "frames.gif")
    image.save(folder / "photo.jpg")
    exif = Image.Exif()
    exif[274] = 6  # must be rotated by 90 degrees
    image.save(folder / "turned.jpg", exif=exif)
    (folder / ".hidden.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    content, problems = run([folder], tmp_path / "out", semantic=True)
    assert problems == []
    names = {path.name for path in (tmp_path / "out").glob("*.*")} - {"predictions.json"}
    assert names == {"grey.png", "alpha.PNG", "frames.png", "photo.jpg", "turned.jpg"}
    turned = next(x for x in content["images"] if x["file_name"].endswith("turned.jpg"))
    assert (turned["height"], turned["width"]) == (128, 96)
    assert cv2.imread(str(tmp_path / "out" / "turned.jpg")).shape == (128, 96, 3)


def test_damaged_inputs_are_reported_and_the_others_processed(images, video, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    whole = (images / "000001.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text").write_text("neither")
    inputs = [tmp_path / x for x in ("text.png", "half.png", "empty.mp4", "text")]
    code, out, err = tool(
        capsys,
        "--config-file",
        CONFIG,
        "--output",
        tmp_path / "out",
        "--input",
        *inputs,
        images / "000002.png",
        "--opts",
        "MODEL.DEVICE",
        "cpu",
        *WEIGHTS,
    )
    assert code == 1 and "results are in" in out
    lines = [line for line in err.splitlines() if line.startswith("demo.py: ")]
    assert [line.split(": ")[1] for line in lines] == [str(x) for x in inputs]
    assert (tmp_path / "out" / "000002.png").is_file() and "5/5" not in err
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 1


def test_a_truncated_video_is_reported_and_its_frames_are_kept(images, tmp_path):
    image = cv2.imread(str(images / "000001.png"))
    write_video(tmp_path / "long.avi", [image] * 30)
    content = (tmp_path / "long.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 3])
    result, problems = run([tmp_path / "cut.avi"], tmp_path / "out")
    assert len(problems) == 1 and "frames can be read" in problems[0]
    assert 5 <= len(result["images"]) <= 12 and (tmp_path / "out" / "cut.avi").is_file()


@pytest.mark.parametrize("name", ["odd.avi", "odd.webm"])
def test_a_video_keeps_its_odd_size_and_changes_to_it_are_reported(images, tmp_path, caplog, name):
    image = cv2.imread(str(images / "000001.png"))[:95, :127]
    write_video(tmp_path / "odd.avi", [image] * 3, backend=cv2.CAP_OPENCV_MJPEG)
    (tmp_path / "odd.avi").rename(tmp_path / name)
    assert run([tmp_path / name], tmp_path / "out")[1] == []
    video = cv2.VideoCapture(str(tmp_path / "out" / "odd.avi"))
    assert [video.read()[1].shape for _ in range(3)] == [image.shape] * 3
    line = f"{name}: the overlay odd.avi has a constant 10 frames per second and no sound"
    assert line in caplog.text


def test_irregular_frame_times_are_detected(monkeypatch):
    class Video:
        def __init__(self, times):
            self._times, self._now = times, -1

        def get(self, what):
            header = {cv2.CAP_PROP_FPS: 25.0, cv2.CAP_PROP_FRAME_COUNT: len(self._times)}
            return self._times[self._now] if what == cv2.CAP_PROP_POS_MSEC else header[what]

        def read(self):
            self._now += 1
            return self._now < len(self._times), np.zeros((4, 4, 3), np.uint8)

        def release(self):
            pass

    for times, steady in (([0, 33, 67, 100], True), ([0, 40, 80, 200], False), ([0], True)):
        monkeypatch.setattr(media, "_open_video", lambda _, times=times: Video(times))
        frames = media.Frames(Path("phone.mp4"))
        assert len(list(frames)) == len(times) and frames.is_steady == steady


def stub_model(monkeypatch, fail=lambda image: None):
    """Replaces the demo's model with one that finds nothing; returns a list of its inputs."""
    seen = []

    def model(inputs):
        fail(inputs[0]["image"])
        seen.append(inputs[0]["image"])
        instances = Instances((inputs[0]["height"], inputs[0]["width"]))
        instances.pred_boxes, instances.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        instances.pred_classes = torch.zeros(0, dtype=torch.long)
        return [{"instances": instances}]

    monkeypatch.setattr(
        "mask_head_plugin.demo.demo.load_predictor", lambda cfg: stub_predictor(cfg, model)
    )
    return seen


def stub_predictor(cfg, model):
    cfg.MODEL.WEIGHTS = ""
    predictor = BGRPredictor(cfg)
    predictor.metadata, predictor.model = Metadata(), model
    return predictor


def test_an_image_on_which_the_model_fails_does_not_affect_the_others(
    images, tmp_path, monkeypatch
):
    def fail(image):
        if image[:, 0, 0].tolist() == [1, 2, 3]:
            raise RuntimeError("out of\nmemory")

    stub_model(monkeypatch, fail)
    image = cv2.imread(str(images / "000001.png"))
    image[0, 0] = (3, 2, 1)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    content, problems = run([tmp_path / "a.png", images], tmp_path / "out")
    assert problems == [f"{tmp_path}/a.png: made the model fail: RuntimeError: out of memory"]
    assert len(content["images"]) == 6


def test_a_huge_image_is_scaled_down_and_that_is_reported(images, tmp_path, monkeypatch, caplog):
    seen = stub_model(monkeypatch)
    image = images / "000001.png"  # 128 x 96
    content, problems = run([image], tmp_path / "a", "INPUT.MAX_SIZE_TEST", "32")
    assert problems == [] and seen[0].shape == (3, 24, 32)
    assert (content["images"][0]["height"], content["images"][0]["width"]) == (96, 128)
    assert "000001.png: its 128 x 96 pixels are scaled down to INPUT.MAX_SIZE_TEST 32" in (
        caplog.text
    )
    run([image], tmp_path / "b", "INPUT.MAX_SIZE_TEST", "64")
    assert seen[1].shape == (3, 96, 128) and caplog.text.count("scaled down to") == 1


def test_files_in_a_folder_that_look_like_images_are_reported_if_unreadable(
    images, tmp_path, monkeypatch
):
    stub_model(monkeypatch)
    folder = tmp_path / "in"
    folder.mkdir()
    whole = (images / "000001.png").read_bytes()
    write_video(folder / "clip.avi", [cv2.imread(str(images / "000001.png"))] * 2)
    (folder / "clip.avi").rename(folder / "clip")
    readable = {"photo.dat": whole, "noending": whole, "photo.jfif": whole}
    heif = b"\0\0\0\x18ftypheic" + bytes(40)
    broken = {
        **{name: heif for name in ("a.heic", "b.heif", "c.bin")},
        **{name: b"text" for name in ("d.avif", "e.ts", "f.3gp", "g.jxl", "h.nef", "i.tga")},
        "j.upload": whole[:200],
        "k.png": b"version https://git-lfs.github.com/spec/v1\n",
    }
    others = dict.fromkeys(("notes.txt", "labels.json", "README", ".hidden.png"), b"BM text")
    for name, content in (readable | broken | others).items():
        (folder / name).write_bytes(content)
    (folder / "l.jpg").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "m.png")
    (folder / "sub.png").mkdir()
    cv2.imwrite(str(folder / "n.png"), np.full((8, 8), 4095, np.uint16))
    content, problems = run([folder], tmp_path / "out")
    assert {Path(x["file_name"]).name for x in content["images"]} == {*readable, "clip"}
    named = [Path(line.partition(": ")[0]).name for line in problems]
    assert sorted(named) == sorted([*broken, "l.jpg", "m.png", "n.png"])
    assert "; scale all images to 8 bits by one factor" in next(x for x in problems if "n.png" in x)
    assert "git lfs pull" in next(x for x in problems if "k.png" in x)
    assert "converted, e.g. to PNG" in next(x for x in problems if "a.heic" in x)
    assert (tmp_path / "out" / "clip.mp4").is_file()


def test_skipped_sub_folders_are_reported(images, tmp_path, caplog):
    for name in ("x.png", "sub/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((images / "000001.png").read_bytes())
    assert [s.path.name for s in find_sources([str(tmp_path / "sub")])] == ["y.png"]
    assert not caplog.text
    assert [s.path.name for s in find_sources([str(tmp_path)])] == ["x.png"]
    assert f"subfolders of {tmp_path} are skipped" in caplog.text
    both = find_sources([f"{tmp_path}/**/*.png"])  # the pattern suggested by the message
    assert {s.path.name for s in both} == {"x.png", "y.png"}


def test_files_with_the_same_name_are_numbered_and_repeated_inputs_used_once(images, tmp_path):
    for name in ("a/x.png", "b/x.png", "b/X.jpg", "b/x_2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((images / "000001.png").read_bytes())
    sources = find_sources([f"{tmp_path}/a", f"{tmp_path}/**/*.png", f"{tmp_path}/b/X.jpg"])
    names = {str(s.path.relative_to(tmp_path)): s.overlay for s in sources}
    assert names == {
        "a/x.png": "x.png", "b/x.png": "x_2.png", "b/x_2.png": "x_2_2.png", "b/X.jpg": "X_3.jpg"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "nowhere.jpg"], "nowhere.jpg does not exist"),
        (["--input", "nowhere/*.jpg"], "no file matches nowhere/*.jpg"),
        (["--input", "{tmp}/empty"], "empty contains no images or videos"),
        (["--output", "{tmp}/file"], "file is not a folder"),
        (["--output", "{tmp}/used"], "used already contains 000001.png"),
        (["--output", "{tmp}/full", "--semantic"], "full already contains semantic"),
        (["--confidence-threshold", "1.5"], "--confidence-threshold 1.5 is not between 0 and 1"),
        (["--confidence-threshold", "nan"], "nan is not between 0 and 1"),
        (["--class-thresholds", "rung=0.5"], "no class 'rung'; did you mean 'ring'?"),
        (["--config-file", "configs/nowhere.yaml"], "configs/nowhere.yaml does not exist"),
        (["--opts", "MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--opts", "MODEL.WEIGHTS", ""], "no weights: add --opts MODEL.WEIGHTS FILE"),
        (["--opts", "MODEL.WEIGHTS"], "has no value"),
        (["--opts", "MODEL.WEIGHTS", "{tmp}/file"], "file was not loaded"),
        (["--opts", "INPUT.FORMAT", "BRG"], "INPUT.FORMAT"),
        (["--opts", "MODEL.ROI_HEADS.NUM_CLASSES", "7"], "of another shape: roi_heads."),
        (
            ["--opts", "MODEL.ROI_HEADS.NUM_CLASSES", "7"],
            "another data set, with the classes ring, star, cross, crescent, arrow; use the config "
            "of that data set, or set MODEL.ROI_HEADS.NUM_CLASSES 5",
        ),
        (
            ["--semantic", "--opts", *NO_MASKS],
            "--semantic needs masks, but MODEL.MASK_ON is False",
        ),
    ],
)
def test_errors_are_one_line(images, tmp_path, capsys, flags, message):
    for name in ("empty", "used", "full/semantic"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "used" / "000001.png").write_text("a result")
    flags = [x.format(tmp=tmp_path) for x in flags]
    if "--opts" not in flags:
        flags.append("--opts")
    at = flags.index("--opts") + 1
    flags[at:at] = ["MODEL.DEVICE", "cpu", *WEIGHTS]
    code, _, err = tool(
        capsys,
        "--config-file",
        CONFIG,
        "--input",
        images / "000001.png",
        "--output",
        tmp_path / "out",
        *flags,
    )
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("demo.py: ")
    assert (tmp_path / "used" / "000001.png").read_text() == "a result"


def test_options_may_follow_without_opts_and_inputs_are_never_overwritten(images, tmp_path, capsys):
    args = ["--config-file", CONFIG, "--video-input", images / "000001.png", "--output"]
    pairs = ["MODEL.DEVICE", "cpu", *WEIGHTS]
    assert tool(capsys, *args, tmp_path, *pairs)[0] == 0
    code, _, err = tool(capsys, *args, images, *pairs)
    assert code == 2 and "already contains 000001.png" in err


def test_an_interrupted_run_keeps_its_predictions(images, tmp_path, capsys, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("mask_head_plugin.demo.model_run.read_bgr", interrupt)
    code, _, err = tool(
        capsys,
        "--config-file",
        CONFIG,
        "--input",
        images,
        "--output",
        tmp_path,
        "--opts",
        "MODEL.DEVICE",
        "cpu",
        *WEIGHTS,
    )
    assert code == 130 and "stopped; results so far are in" in err
    assert (tmp_path / "predictions.json").is_file()


def test_a_result_that_cannot_be_written_is_an_error(images, tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)
    with pytest.raises(OSError, match=r"could not write .*000001\.png"):
        run([images / "000001.png"], tmp_path)


def test_help_shows_flags_files_and_examples(capsys):
    with pytest.raises(SystemExit):
        tool(capsys, "--help")
    text = capsys.readouterr().out
    for word in (
        *("--config-file", "--input", "--video-input", "--output", "--confidence-threshold"),
        *(
            "--class-thresholds",
            "--opts",
            "--semantic",
            "predictions.json",
            "semantic_value",
            "python tools/demo.py",
        ),
    ):
        assert word in text


@pytest.mark.skipif(
    not (SHARED_DATA / "coco_photos_val").is_dir(), reason="shared/data/coco_photos_val is absent"
)
def test_photographs_are_processed(tmp_path):
    photos = sorted((SHARED_DATA / "coco_photos_val" / "images").iterdir())[:2]
    content, problems = run(photos, tmp_path, confidence_threshold=0.1)
    assert problems == [] and len(content["annotations"]) > 5
    assert all((tmp_path / path.name).is_file() for path in photos)


def test_a_panoptic_model_writes_its_objects(images, tmp_path):
    config = str(CONFIGS / "panoptic" / "panoptic_fpn_R_50_1x.yaml")
    opts = [*SMALL_RESNET, "MODEL.SEM_SEG_HEAD.CONVS_DIM", "8", "MODEL.SEM_SEG_HEAD.NORM", ""]
    weights = tmp_path / "model.pth"
    torch.save({"model": Trainer.build_model(load_config(config, opts)).state_dict()}, weights)
    opts += ["MODEL.WEIGHTS", str(weights)]
    image = str(images / "000001.png")
    assert run_demo(config, opts, [image], tmp_path / "out", 0, semantic=True) == []
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert content["annotations"][0]["segmentation"]["size"] == [96, 128]


def test_unknown_architectures_are_refused(images, tmp_path):
    with pytest.raises(ConfigError, match=r"MODEL\.META_ARCHITECTURE"):
        run([images], tmp_path, "MODEL.META_ARCHITECTURE", "MaskRCN")
