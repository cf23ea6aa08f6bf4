"""An exported model gives the results of the trained model; otherwise nothing is written."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import CHECKPOINT, CONFIGS, small_config
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from made_model_folder import SCORES, write_model_folder
from torch import nn

from mask_head_plugin import load_config
from mask_head_plugin.config import ConfigError
from mask_head_plugin.data import shapes
from mask_head_plugin.deploy import export, parity
from mask_head_plugin.deploy.export import ExportOptions, export_model
from mask_head_plugin.deploy.exportable import ExportableMaskRCNN
from mask_head_plugin.deploy.formats import converted, padded, runner
from mask_head_plugin.deploy.model_folder import read_model_folder, sha256_of
from mask_head_plugin.deploy.parity import TOLERANCES, Parity, compare, matched
from mask_head_plugin.deploy.refusals import check_exportable, check_traces
from mask_head_plugin.deploy.runtime import Predictor
from mask_head_plugin.deploy.samples import Sample
from mask_head_plugin.engine.predictor import load_predictor
from mask_head_plugin.modeling.mask_loss import (
    MASK_LOSS_REGISTRY,
    couples_classes,
    mean_over_rois,
)

SHAPES = str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml")
OPTS = ["MODEL.WEIGHTS", str(CHECKPOINT), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.02"]
NAMES = ["boxes", "scores", "classes", "mask_probs"]


@pytest.fixture(scope="module")
def model():
    cfg = load_config(SHAPES, [*OPTS, "MODEL.DEVICE", "cpu"])
    return load_predictor(cfg).model.eval()


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_model(SHAPES, OPTS, folder, ExportOptions("onnx"))
    return folder


def samples(*sizes):
    generator = torch.Generator().manual_seed(1)
    noise = [torch.rand(3, *hw, generator=generator) * 255 for hw in sizes]
    blank = torch.full((3, 96, 128), 128.0)
    return [Sample(f"{tuple(x.shape)}", x) for x in (*noise, blank)]


def check_parity(model, run, images, size=None) -> Parity:
    parity = compare(model, run, images, TOLERANCES["fp32"], size)
    assert parity.unlike == []
    assert min(parity.counts) == 0
    assert max(parity.counts) > 1
    return parity


def test_the_onnx_model_equals_the_trained_one_at_any_size(model, onnx_folder):
    run = runner(onnx_folder / "model.onnx", "onnx", NAMES, None)
    check_parity(model, run, samples((96, 128), (33, 40), (70, 201), (200, 111)))


def test_the_onnx_model_has_no_custom_operators(onnx_folder):
    graph = onnx.load(onnx_folder / "model.onnx")
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(x.domain, x.version) for x in graph.opset_import] == [("", 17)]
    assert [x.name for x in graph.graph.output] == NAMES


def test_the_description_contains_what_the_runtime_needs(onnx_folder):
    found = read_model_folder(onnx_folder)
    assert found.outputs == NAMES
    assert found.class_names == ["ring", "star", "cross", "crescent", "arrow"]
    assert found.category_ids == [1, 2, 3, 4, 5]
    assert (found.score_threshold, found.nms_threshold, found.detections_per_image) == (
        0.02,
        0.5,
        100,
    )
    assert (found.input.format, found.input.min_size, found.input.max_size) == ("RGB", 0, 1333)
    assert (found.mask.threshold, found.mask.side, found.mask_scoring) == (0.5, 28, False)
    assert found.weights.sha256 == sha256_of(CHECKPOINT)


def test_the_runtime_finds_what_the_trained_model_finds(onnx_folder, tmp_path):
    """Covers everything from the pixels of a BGR image to class names and run lengths."""
    eager = load_predictor(load_config(SHAPES, [*OPTS, "MODEL.DEVICE", "cpu"]))
    shapes.write_split(tmp_path, "val", 4)
    images = [cv2.imread(str(path)) for path in sorted((tmp_path / "val").iterdir())]
    images += [cv2.resize(images[0], (301, 250)), images[1][:40, :33], np.zeros_like(images[0])]
    num_masks = num_different = 0
    for image, found in zip(images, Predictor(onnx_folder, threads=1)(images), strict=True):
        right = eager(image)["instances"]
        names = [eager.metadata.thing_classes[k] for k in right.pred_classes]
        assert found.class_names == names and found.image_size == image.shape[:2]
        np.testing.assert_allclose(found.boxes, right.pred_boxes.tensor, atol=1e-2)
        np.testing.assert_allclose(found.scores, right.scores, atol=1e-4)
        different = [np.sum(found.mask(k) != m.numpy()) for k, m in enumerate(right.pred_masks)]
        num_masks, num_different = num_masks + len(found), num_different + sum(different)
    assert num_masks > 20 and num_different <= 2  # pixels at the threshold


def test_a_model_of_fixed_size_accepts_smaller_images(model, tmp_path):
    exportable, size = ExportableMaskRCNN(model).eval(), (96, 160)
    images = samples((90, 150), (96, 40))
    path = converted(exportable, padded(images[0].image, size), "onnx", 16, tmp_path)
    check_parity(model, runner(path, "onnx", NAMES, size), images, size)


def test_the_torchscript_model_equals_the_trained_one_at_any_size(model, tmp_path):
    images = samples((96, 128), (33, 40), (70, 201))
    exportable = ExportableMaskRCNN(model).eval()
    path = converted(exportable, (images[0].image,), "torchscript", 17, tmp_path)
    check_parity(model, runner(path, "torchscript", NAMES, None), images)
    graph = torch.jit.load(str(path)).inlined_graph
    constants = [x.output() for x in graph.findAllNodes("prim::Constant")]
    devices = {x.toIValue() for x in constants if str(x.type()) == "Device"}
    assert devices == {torch.device("cpu")}  # as docs/deploy.md says


class Pyramid(nn.Module):
    """A backbone with three operators, so that torch.export takes only seconds."""

    size_divisibility, padding_constraints = 16, {}

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 16, 4, 4)

    def forward(self, image):
        maps = [self.layer(image)]
        for _ in range(2):
            maps.append(nn.functional.max_pool2d(maps[-1], 2))
        return dict(zip(("p2", "p3", "p4"), maps, strict=True))


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="needs PyTorch 2.7")
def test_the_exported_program_equals_the_trained_model_at_any_size(tmp_path):
    cfg = small_config(
        "shapes/mask_rcnn_shapes.yaml",
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", "0", "MODEL.PIXEL_STD", "[16.0, 16.0, 16.0]"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.17", "MODEL.RPN.IN_FEATURES", "['p3']"),
        *(
            "MODEL.ANCHOR_GENERATOR.SIZES",
            "[[24, 48]]",
            "MODEL.ROI_HEADS.IN_FEATURES",
            "['p3', 'p4']",
        ),
    )
    model = build_model(cfg).eval()
    model.backbone = Pyramid()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight *= 3
    images = samples((96, 128), (70, 201))
    exportable = ExportableMaskRCNN(model).eval()
    path = converted(exportable, (images[0].image,), "exported_program", 17, tmp_path)
    program = torch.export.load(path)
    assert {str(x.kwargs["device"]) for x in program.graph.nodes if "device" in x.kwargs} == {"cpu"}
    run = runner(path, "exported_program", NAMES, None)
    parity = compare(model, run, images, TOLERANCES["fp32"], None)
    assert parity.unlike == []
    assert max(parity.counts) > 1


def test_weights_too_large_for_an_onnx_file_are_stored_in_one_data_file(
    model, tmp_path, monkeypatch
):
    """PyTorch would write one file per weight."""
    write_model_folder(tmp_path / "made")

    def export_large(_model, _inputs, path, **_options):
        content = onnx.load(tmp_path / "made" / "model.onnx")
        onnx.save_model(
            content,
            path,
            save_as_external_data=True,
            all_tensors_to_one_file=False,
            size_threshold=0,
        )

    monkeypatch.setattr(torch.onnx, "export", export_large)
    folder = tmp_path / "large"
    folder.mkdir()
    image = torch.full((3, 60, 80), 255.0)
    path = converted(ExportableMaskRCNN(model), (image,), "onnx", 17, folder)
    assert sorted(x.name for x in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    np.testing.assert_allclose(runner(path, "onnx", NAMES, None)(image)["scores"], SCORES)


def test_half_precision_layers_keep_float32_outputs(model):
    exportable = ExportableMaskRCNN(model)
    state = {k: v.dtype for k, v in model.state_dict().items()}
    half = ExportableMaskRCNN(
        load_predictor(load_config(SHAPES, [*OPTS, "MODEL.DEVICE", "cpu"])).model
    )
    half.halve()
    image = samples((96, 128))[0].image
    with torch.no_grad():
        found, expected = half.eval()(image), exportable.eval()(image)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert {k: v.dtype for k, v in model.state_dict().items()} == state
    assert torch.float16 in {x.dtype for x in half.model.backbone.parameters()}


@pytest.mark.parametrize(
    ("output", "change", "message"),
    [
        ("boxes", 1.0, r"boxes differ by 1\b"),
        ("scores", 0.01, r"scores differ by 0.01\b"),
        ("mask_probs", float("nan"), "mask_probs differ by nan"),
        ("classes", 1, "the exported model lacks"),
    ],
)
def test_a_model_that_differs_is_not_written(output, change, message, tmp_path, monkeypatch):
    def wrong(*_args):
        def run(image):
            found = dict(truth(image))
            found[output] = found[output] + np.array(change, found[output].dtype)
            return found

        return run

    cfg = load_config(SHAPES, [*OPTS, "MODEL.DEVICE", "cpu"])
    trained = load_predictor(cfg).model.eval()
    truth = lambda image: export_outputs(trained, image)  # noqa: E731  # only for this test
    monkeypatch.setattr(export, "converted", lambda *_: b"")
    monkeypatch.setattr(export, "runner", wrong)
    with pytest.raises(ConfigError, match=message):
        export_model(SHAPES, OPTS, tmp_path / "new", ExportOptions("onnx"))
    assert not (tmp_path / "new").exists()


def export_outputs(trained, image):
    from mask_head_plugin.deploy.parity import eager_outputs

    return eager_outputs(trained, image)


@pytest.mark.parametrize(
    ("others", "unlike"),
    [
        ({"photo": 10}, []),
        ({"photo": 60}, ["photo: the exported model lacks 1 detection, with scores up to 0.9000"]),
        ({}, ["in every image, rounding decides what the trained model finds"]),
    ],
    ids=["same elsewhere", "other elsewhere", "nowhere else"],
)
def test_images_decided_by_rounding_are_excluded_from_the_comparison(others, unlike, monkeypatch):
    """On ``blank``, the trained model finds either of two tied boxes; the export finds a third."""

    def detection(left):
        boxes = np.array([[left, 10, left + 20, 30]], np.float32)
        return {"boxes": boxes, "scores": np.array([0.9], np.float32), "classes": np.zeros(1)}

    def trained(_model, image, _size):
        is_tied = (image - 128).abs().max() < 1
        return detection(40 if is_tied and image.std() > 0 else 10)

    predictor = SimpleNamespace(test_topk_per_image=100, test_score_thresh=0.05)
    monkeypatch.setattr(parity, "eager_outputs", trained)
    monkeypatch.setattr(parity, "last_predictor", lambda model: predictor)
    exported = {"blank": 90, **others}
    images = [torch.full((3, 8, 8), 128.0), *[torch.full((3, 8, 8), 30.0)] * len(others)]
    found = compare(
        None,
        lambda image: detection(exported["blank" if image[0, 0, 0] == 128 else "photo"]),
        [Sample(name, image) for name, image in zip(exported, images, strict=True)],
        TOLERANCES["fp32"],
        None,
    )
    assert found.undecided == ["blank"] and found.unlike[:1] == unlike
    assert "not compared, because rounding decides: blank" in str(found)


def test_nothing_is_overwritten_without_the_flag(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"already contains model.onnx.*--overwrite"):
        export_model(SHAPES, OPTS, tmp_path, ExportOptions("torchscript"))
    assert (tmp_path / "model.onnx").read_bytes() == b"mine"


@pytest.fixture
def made(onnx_folder, monkeypatch):
    """Replaces the export with a copy of a model that was exported before, which is faster."""
    description, parity = read_model_folder(onnx_folder), Parity(TOLERANCES["fp32"], counts=[0, 0])

    def copy(*args):
        shutil.copy(onnx_folder / "model.onnx", args[-1])
        return description, parity

    monkeypatch.setattr(export, "_made", copy)


def exported(folder):
    return export_model(SHAPES, OPTS, folder, ExportOptions("onnx"), overwrite=True)


def test_the_old_model_is_replaced_only_by_a_complete_new_one(made, tmp_path, monkeypatch):
    exported(tmp_path)
    old = read_model_folder(tmp_path)

    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("os.fsync", full)
        exported(tmp_path)
    assert read_model_folder(tmp_path) == old
    for name in ("model.pt2", "model.onnx.data"):
        (tmp_path / name).write_bytes(b"of another model")
    exported(tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model.json", "model.onnx"]


def test_an_unusable_output_folder_is_refused_before_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_made", None)
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(ConfigError, match=f"--output .*{name} is not a folder that can be"):
            exported(tmp_path / name)


def test_two_exports_to_one_folder_are_refused(tmp_path, monkeypatch):
    def export_again(*_args):
        with pytest.raises(ConfigError, match="another export is writing to --output"):
            exported(tmp_path / "new")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_made", export_again)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_without_any_detections_is_reported(made, tmp_path, caplog):
    exported(tmp_path)
    assert "the model found nothing in any image" in caplog.text


def test_a_size_that_does_not_fit_in_memory_is_reported(tmp_path):
    with pytest.raises(ConfigError, match="--format onnx: the export failed"):
        export_model(SHAPES, OPTS, tmp_path / "x", ExportOptions("onnx", (10**7, 10**7)))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("torchscript", opset=17), "--opset works only with ONNX"),
        (ExportOptions("onnx", opset=15), "--opset 15 is not between 16 and 20"),
        (ExportOptions("onnx", size=(0, 64)), "--size 0 64"),
        (ExportOptions("tflite"), "--format 'tflite' is not one of onnx, torchscript"),
        (
            ExportOptions("onnx", precision="int4"),
            "--precision 'int4' is not one of fp32, fp16, int8",
        ),
        (ExportOptions("torchscript", precision="int8"), "--precision int8 works only with ONNX"),
        (
            ExportOptions("onnx", calibration_images=["a.png"]),
            "--calibration-images needs --precision int8, but the precision is fp32",
        ),
    ],
)
def test_invalid_options_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_model(SHAPES, OPTS, tmp_path, options)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_OUTPUT", "bitmask"),
            "MODEL.META_ARCHITECTURE: RetinaNet cannot be exported",
        ),
        (("MODEL.KEYPOINT_ON", "True"), "MODEL.KEYPOINT_ON: keypoints cannot be exported"),
        (("INPUT.MAX_SIZE_TEST", "0"), "INPUT.MAX_SIZE_TEST is 0"),
    ],
)
def test_configs_that_cannot_be_exported_are_refused_before_weights_are_loaded(
    opts, message, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        export_model(SHAPES, [*OPTS, *opts], tmp_path / "x", ExportOptions("onnx"))
    assert not (tmp_path / "x").exists()


def test_an_image_too_small_for_torch_export_is_refused_before_conversion(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "converted", None)
    cv2.imwrite(str(tmp_path / "low.png"), np.zeros((64, 96, 3), np.uint8))
    options, images = ExportOptions("exported_program"), [str(tmp_path / "low.png")]
    with pytest.raises(
        ConfigError, match=r"sides above 64 pixels, but .*low.png has 96 x 64 after"
    ):
        export_model(SHAPES, OPTS, tmp_path / "x", options, images)
    export._check_sizes(samples((64, 96)), ExportOptions("exported_program", (96, 96)))
    export._check_sizes(samples((64, 96)), ExportOptions("onnx"))


def test_an_old_pytorch_is_refused_for_torch_export(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.compiler, "is_exporting", raising=False)
    with pytest.raises(ConfigError, match=r"exported_program needs PyTorch 2.7"):
        export_model(SHAPES, OPTS, tmp_path, ExportOptions("exported_program"))


def test_detections_are_matched_by_class_and_place():
    def outputs(boxes, classes, scores):
        return {
            "boxes": np.array(boxes, float),
            "classes": np.array(classes),
            "scores": np.array(scores),
        }

    first, second = [0, 0, 10, 10], [20, 20, 30, 30]
    expected = outputs([first, second, first], [0, 0, 1], [0.9, 0.9, 0.5])
    found = outputs([second, first, first], [0, 0, 2], [0.9, 0.9, 0.5])
    assert matched(expected, found).tolist() == [[0, 1], [1, 0]]
    parity = Parity(TOLERANCES["fp32"])
    parity.add("image", expected, found, cut=0.05)
    assert [line.split(", with")[0] for line in parity.unlike] == [
        "image: the exported model lacks 1 detection",
        "image: only the exported model has 1 detection",
    ]
    borderline = Parity(TOLERANCES["fp32"])
    borderline.add("image", expected, found, cut=0.5)
    assert borderline.unlike == []


def test_detections_tied_at_the_cut_may_differ_between_the_models():
    def outputs(left):
        boxes = np.array([[0, 0, 50, 50], [left, 0, left + 100, 100]], float)
        return {"boxes": boxes, "classes": np.zeros(2, int), "scores": np.array([0.9, 0.5])}

    for cut, is_like in ((0.5, True), (0.3, False)):
        parity = Parity(TOLERANCES["fp32"])
        parity.add("image", outputs(200), outputs(205), cut)
        assert (parity.unlike == []) == is_like


class Moody(nn.Module):
    """A module whose forward branches on the size of its input, in Python."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x):
        factor = 1.0 if int(x.shape[0] * x.shape[-1]) % 3 else 2.0
        output = self.layer(x)
        if isinstance(output, dict):
            return {name: factor * value for name, value in output.items()}
        return factor * output


@pytest.mark.parametrize(
    ("key", "part"), [("MODEL.BACKBONE.NAME", "backbone"), ("MODEL.ROI_BOX_HEAD.NAME", "box_head")]
)
def test_a_user_module_that_a_trace_cannot_capture_is_refused_with_its_key(key, part):
    model = build_model(small_config("shapes/mask_rcnn_shapes.yaml")).eval()
    owner = model if part == "backbone" else model.roi_heads
    moody = Moody(getattr(owner, part))
    if part == "backbone":  # the sizes 64 x 128 and 64 x 64 would take the same branch
        moody.forward = lambda x: {k: v * int(x.shape[-1]) for k, v in moody.layer(x).items()}
    setattr(owner, part, moody)
    with pytest.raises(ConfigError, match=f"{key}: Moody cannot be exported"):
        check_traces(ExportableMaskRCNN(model))


class OneByOne(MaskRCNNConvUpsampleHead):
    """Changes each RoI's logits in a Python loop, which a trace unrolls for its example only."""

    def layers(self, x):
        logits = super().layers(x)
        for k in range(len(x)):
            logits[k] = 2 * logits[k]
        return logits


def test_a_user_mask_head_that_depends_on_the_number_of_rois_is_refused():
    model = build_model(small_config("shapes/mask_rcnn_shapes.yaml")).eval()
    shape = ShapeSpec(channels=16, width=14, height=14)
    head = OneByOne(shape, num_classes=5, conv_dims=[16, 16]).requires_grad_(False)
    head.predictor.weight.normal_()
    model.roi_heads.mask_head = head.eval()
    with pytest.raises(ConfigError, match=r"NAME: OneByOne cannot be .* is wrong for inputs"):
        check_traces(ExportableMaskRCNN(model))


def test_a_user_mask_activation_is_refused_with_its_key():
    def activation(class_logits, classes):
        return class_logits[torch.arange(len(classes)), classes].sigmoid()

    @couples_classes(activation)
    def loss_of_mine(class_logits, classes, gt_masks, weights=None):
        return mean_over_rois(class_logits.flatten(1).mean(1), weights)

    MASK_LOSS_REGISTRY.register(loss_of_mine)
    try:
        opts = ("MODEL.ROI_MASK_HEAD.LOSSES", "[['loss_of_mine', 1.0]]")
        model = build_model(small_config("shapes/mask_rcnn_shapes.yaml", *opts))
        with pytest.raises(ConfigError, match=r"ROI_MASK_HEAD.LOSSES: 'loss_of_mine'"):
            check_exportable(model)
    finally:
        del MASK_LOSS_REGISTRY._obj_map["loss_of_mine"]
