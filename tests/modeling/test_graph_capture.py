"""Traces, scripts, ONNX files and exports are correct for images other than their example."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import warnings

import pytest
import torch
from conftest import relative_error, small_config
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.testing import convert_scripted_instances
from torch import nn

from mask_head_plugin.modeling import FCNMaskHead, MLPMaskHead, MultiLevelRoIPooler
from mask_head_plugin.modeling.channels_last import to_channels_last
from mask_head_plugin.modeling.mask_scoring import MaskIoUHead

FPN = "Base-MaskRCNN-FPN.yaml"
HEAD = "MODEL.ROI_MASK_HEAD."
SOFTMAX = '[["softmax_cross_entropy", 1.0]]'
WARP = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIWarp", HEAD + "POOLER_TYPE", "ROIWarp")

MODELS = {
    "FPN": (FPN,),
    "C4": ("Base-MaskRCNN-C4.yaml",),
    "agnostic": (FPN, HEAD + "CLS_AGNOSTIC_MASK", "True"),
    "scoring": (FPN, HEAD + "SCORING.ENABLED", "True"),
    "softmax": (FPN, HEAD + "LOSSES", SOFTMAX),
    "MLP": (FPN, HEAD + "NAME", "MLPMaskHead", HEAD + "FC_DIM", "16"),
    "ROIWarp": (FPN, *WARP),
}

IMAGE_HWS = [(96, 128), (64, 64), (45, 160), (130, 100)]
FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": torch.Tensor,
    "pred_boxes": Boxes,
    "scores": torch.Tensor,
    "pred_classes": torch.Tensor,
    "pred_masks": torch.Tensor,
}


def make_image(height, width):
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 255, (3, height, width), generator=generator).float()


@functools.cache
def make_model(name):
    """Returns a model that finds no objects in some images and different numbers in others."""
    limits = "MODEL.RPN.POST_NMS_TOPK_TEST", "60", "TEST.DETECTIONS_PER_IMAGE", "20"
    model = build_model(small_config(*MODELS[name], *limits)).eval()
    generator = torch.Generator().manual_seed(0)
    model.pixel_std *= 100  # keeps activations of untrained layers small
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "predictor" in key:
                parameter.normal_(std=0.1, generator=generator)
        predictor = model.roi_heads.box_predictor
        predictor.test_score_thresh = 0.0
        scores = [detect(model, make_image(*hw)).scores for hw in IMAGE_HWS]
    predictor.test_score_thresh = float(min(x.max() for x in scores) + 1e-3)
    counts = {int((x > predictor.test_score_thresh).sum()) for x in scores}
    assert min(counts) == 0 and len(counts) >= 3, counts
    return model


def detect(model, *images):
    found = model.inference([{"image": image} for image in images], do_postprocess=False)
    return found if len(images) > 1 else found[0]


def detect_and_paste(model, image):
    """Returns detections whose masks have the size of the image."""
    size = {"height": image.shape[1], "width": image.shape[2]}
    return model.inference([{"image": image, **size}])[0]["instances"]


def check_same(actual, expected):
    assert actual.get_fields().keys() == expected.get_fields().keys()
    for name, values in expected.get_fields().items():
        values, others = (getattr(x, "tensor", x) for x in (values, actual.get(name)))
        values = values.dense() if hasattr(values, "dense") else values
        assert others.shape == values.shape, name
        if values.dtype == torch.bool:
            assert (others != values).float().mean() < 1e-4 or not values.numel()
        elif values.is_floating_point():
            assert relative_error(others, values) <= 1e-4, name
        else:
            assert torch.equal(others, values), name


def trace(model, images, infer):
    adapter = TracingAdapter(model, images, infer).eval()
    traced = torch.jit.trace(adapter, images, check_trace=False)

    def run(*others):
        with torch.jit.optimized_execution(False):  # optimizing takes longer than running
            return adapter.outputs_schema(traced(*others))

    return run


@pytest.mark.parametrize(
    ("name", "infer"), [("FPN", detect_and_paste), *((name, detect) for name in MODELS)]
)
@torch.no_grad()
def test_a_trace_works_for_other_images(name, infer):
    model = make_model(name)
    traced = trace(model, (make_image(80, 100),), infer)
    for hw in IMAGE_HWS:
        check_same(traced(make_image(*hw)), infer(model, make_image(*hw)))


@torch.no_grad()
def test_a_trace_of_two_images_returns_masks_for_each():
    model = make_model("FPN")
    traced = trace(model, (make_image(80, 100), make_image(60, 90)), detect)
    for first, second in itertools.pairwise(IMAGE_HWS):
        images = make_image(*first), make_image(*second)
        for actual, expected in zip(traced(*images), detect(model, *images), strict=True):
            check_same(actual, expected)


@pytest.mark.parametrize("name", ["scoring", "MLP", "ROIWarp"])
@torch.no_grad()
def test_onnx_works_for_other_images(name):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, image, file = make_model(name), make_image(80, 100), io.BytesIO()
    adapter = TracingAdapter(model, (image,), detect).eval()
    options = {"input_names": ["image"], "dynamic_axes": {"image": {1: "height", 2: "width"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(adapter, (image,), file, opset_version=17, dynamo=False, **options)
    quiet = runtime.SessionOptions()
    quiet.log_severity_level = 4
    session = runtime.InferenceSession(file.getvalue(), quiet)
    for hw in IMAGE_HWS:
        outputs = session.run(None, {"image": make_image(*hw).numpy()})
        actual = adapter.outputs_schema(tuple(torch.from_numpy(x) for x in outputs))
        check_same(actual, detect(model, make_image(*hw)))


@pytest.mark.parametrize("meta_architecture", ["MaskRCNN", "GeneralizedRCNN"])
@torch.no_grad()
def test_a_script_works_for_other_images(meta_architecture):
    model = copy.deepcopy(make_model("FPN"))
    if meta_architecture == "GeneralizedRCNN":
        model.__class__ = GeneralizedRCNN
    images = [{"image": make_image(96, 128)}, {"image": make_image(130, 100)}]
    expected = model.inference(images, do_postprocess=False)
    script = scripting_with_instances(model, FIELDS)
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    buffer.seek(0)
    with torch.jit.optimized_execution(False):
        found = torch.jit.load(buffer).inference(images, do_postprocess=False)
    for actual, instances in zip(found, expected, strict=True):
        check_same(convert_scripted_instances(actual), instances)


def test_scripting_does_not_change_the_model():
    model = copy.deepcopy(make_model("C4"))
    to_channels_last(model)
    types = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    for _ in range(2):
        scripting_with_instances(model, FIELDS)
        assert [type(module) for module in model.modules()] == types
        assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("scoring", r"MODEL.ROI_MASK_HEAD.SCORING.ENABLED True cannot be scripted"),
        ("softmax", r"LOSSES: 'softmax_cross_entropy' cannot be scripted"),
        ("MLP", r"MODEL.ROI_MASK_HEAD.NAME MLPMaskHead cannot be scripted"),
        ("ROIWarp", r"POOLER_TYPE ROIWarp with POOLER_REDUCTION mean cannot be scripted"),
    ],
)
def test_options_that_detectron2_cannot_compute_are_refused_by_scripting(module, message):
    model = build_model(small_config(*MODELS[module])).eval()
    with pytest.raises(ValueError, match=message):
        scripting_with_instances(model, FIELDS)


class PoolerOnTensors(nn.Module):
    def __init__(self, pooler):
        super().__init__()
        self.pooler = pooler

    def forward(self, fine, coarse, first, second):
        return self.pooler([fine, coarse], [Boxes(first), Boxes(second)])


class HeadOnTensors(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features, classes):
        instances = Instances((64, 64))
        instances.pred_classes, instances.scores = classes, classes.float()
        (found,) = self.head(features, [instances])
        return found.pred_masks, found.get("mask_scores") if found.has("mask_scores") else None


DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.mark.parametrize("pooler_type", ["ROIAlignV2", "ROIWarp", "ROIPool"])
def test_torch_export_pools_any_number_of_boxes(pooler_type):
    """In contrast, an exported stock pooler accepts only the number of boxes in its example."""
    module = PoolerOnTensors(MultiLevelRoIPooler(7, (1 / 4, 1 / 8), 0, pooler_type, 32, 3))

    def make_inputs(height, width, *counts):
        corners = [torch.rand(n, 2, 2) * height for n in counts]
        boxes = [torch.cat([x.amin(1), x.amax(1)], dim=1) for x in corners]
        maps = [torch.randn(2, 3, height // s, width // s) for s in (4, 8)]
        return *maps, *boxes

    sides, number = {2: DYNAMIC, 3: DYNAMIC}, {0: DYNAMIC}
    shapes = sides, sides, number, number
    program = torch.export.export(module, make_inputs(96, 64, 5, 3), dynamic_shapes=shapes)
    operators = {str(x.target) for x in program.graph.nodes if x.op == "call_function"}
    assert not any("mask_head_plugin" in name for name in operators)
    for counts in ((9, 2), (0, 4), (1, 0), (0, 0)):
        inputs = make_inputs(64, 160, *counts)
        assert relative_error(program.module()(*inputs), module(*inputs)) <= 1e-5


@pytest.mark.parametrize("name", ["FCN", "MLP"])
@torch.no_grad()
def test_torch_export_predicts_any_number_of_masks(name):
    shape = ShapeSpec(channels=4, height=14, width=14)
    iou_head = MaskIoUHead(shape, 5, 8, 8)
    if name == "FCN":
        head = FCNMaskHead(shape, num_classes=5, conv_dims=[4, 4], iou_head=iou_head)
    else:
        head = MLPMaskHead(shape, num_classes=5, fc_dims=[8], iou_head=iou_head)
    module = HeadOnTensors(head).eval()

    def make_inputs(count):
        return torch.randn(count, 4, 14, 14), torch.randint(0, 5, (count,))

    shapes = {0: DYNAMIC}, {0: DYNAMIC}
    program = torch.export.export(module, make_inputs(5), dynamic_shapes=shapes, strict=True)
    for count in (9, 1, 0):
        inputs = make_inputs(count)
        for actual, expected in zip(program.module()(*inputs), module(*inputs), strict=True):
            assert relative_error(actual, expected) <= 1e-5
