"""The exportable module gives the same outputs as the trained model, whatever its parts."""

from __future__ import annotations

import pytest
import torch
from conftest import small_config
from detectron2.modeling import build_model

from mask_head_plugin.config import ConfigError
from mask_head_plugin.deploy.exportable import ExportableMaskRCNN
from mask_head_plugin.deploy.formats import padded
from mask_head_plugin.deploy.parity import eager_outputs, matched
from mask_head_plugin.deploy.refusals import check_exportable

FPN = "shapes/mask_rcnn_shapes.yaml"
C4 = "coco/mask_rcnn_R_50_C4_1x.yaml"
DC5 = "coco/mask_rcnn_R_50_DC5_3x.yaml"
BOX, MASK = "MODEL.ROI_BOX_HEAD.", "MODEL.ROI_MASK_HEAD."
SCORING = (
    *(MASK + "SCORING.ENABLED", "True", MASK + "SCORING.CONV_DIM", "8"),
    *(MASK + "SCORING.FC_DIM", "16"),
)
MODELS = {
    "FPN": (FPN,),
    "DC5": (DC5,),
    "Cascade": (
        FPN,
        "MODEL.ROI_HEADS.NAME",
        "CascadeROIHeads",
        BOX + "CLS_AGNOSTIC_BBOX_REG",
        "True",
    ),
    "stock": (
        *(FPN, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        *(MASK + "NAME", "MaskRCNNConvUpsampleHead", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
    ),
    "mask scoring": (FPN, *SCORING),
    "C4": (C4, *SCORING),
    "softmax": (FPN, MASK + "LOSSES", "[['softmax_cross_entropy', 1.0]]"),
    "class-agnostic": (FPN, MASK + "CLS_AGNOSTIC_MASK", "True", *SCORING),
    "MLP": (FPN, MASK + "NAME", "MLPMaskHead", MASK + "FC_DIM", "32"),
    "boxes only": (FPN, "MODEL.MASK_ON", "False"),
    "sigmoid scores": (FPN, BOX + "USE_SIGMOID_CE", "True"),
    "one class, softmax": (
        *(FPN, MASK + "LOSSES", "[['softmax_cross_entropy', 1.0]]"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", "1"),
    ),
    "grey images": (
        *(FPN, "INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[110.0]", "MODEL.PIXEL_STD", "[60.0]"),
    ),
    "timm": (
        *(FPN, "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.FPN.IN_FEATURES", "[]"),
        *("MODEL.TIMM.NAME", "test_efficientnet"),
    ),
    "ROIWarp": (FPN, BOX + "POOLER_TYPE", "ROIWarp", MASK + "POOLER_TYPE", "ROIWarp"),
    "ROIPool": (FPN, BOX + "POOLER_TYPE", "ROIPool", MASK + "POOLER_TYPE", "ROIPool"),
    "ROIAlign": (FPN, BOX + "POOLER_TYPE", "ROIAlign", MASK + "POOLER_TYPE", "ROIAlign"),
}


def detecting_model(name: str, *opts: str) -> torch.nn.Module:
    """Returns a model with random weights that detects something."""
    cfg = small_config(
        name, *opts, "MODEL.RPN.PRE_NMS_TOPK_TEST", "60", "TEST.DETECTIONS_PER_IMAGE", "20"
    )
    model = build_model(cfg).eval()
    image = noise(72, 100)[: len(model.pixel_mean)]
    rpn = model.proposal_generator.rpn_head
    predictors = model.roi_heads.box_predictor
    predictors = predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]
    for layer, deviation in [(rpn.objectness_logits, 2.0), (rpn.anchor_deltas, 0.5)]:
        spread(model, image, layer, deviation)
    for predictor in predictors:
        spread(model, image, predictor.cls_score, 2.0)
        spread(model, image, predictor.bbox_pred, 2.0)
    if model.roi_heads.mask_on:
        spread(model, image, model.roi_heads.mask_head.predictor, 2.0)
    return model


@torch.no_grad()
def spread(model, image, layer, deviation) -> None:
    """Scales a layer's weights until its outputs have the given standard deviation."""
    outputs = []
    hook = layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    eager_outputs(model, image)
    hook.remove()
    if outputs:  # mask heads that select classes do not call the layer
        layer.weight *= deviation / torch.cat([x.flatten() for x in outputs]).std()
    else:
        layer.weight *= 100


def noise(height: int, width: int) -> torch.Tensor:
    coarse = torch.randn(1, 3, height // 8, width // 8)
    return 110 + 60 * torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]


def check_same(expected, found, names) -> None:
    assert list(expected) == names
    pairs = matched(expected, dict(zip(names, [x.numpy() for x in found], strict=True)))
    assert len(pairs) == len(expected["scores"]) == len(found[1])
    for name, values in zip(names, found, strict=True):
        torch.testing.assert_close(
            values[pairs[:, 1]], torch.from_numpy(expected[name][pairs[:, 0]]), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_works_for_an_image_of_another_size(name):
    model = detecting_model(*MODELS[name])
    check_exportable(model)
    exportable = ExportableMaskRCNN(model).eval()
    image, example = (noise(*hw)[: len(model.pixel_mean)] for hw in ((104, 88), (72, 100)))
    # Optimizing the trace would take most of the time.
    with torch.no_grad(), torch.jit.optimized_execution(False):
        trace = torch.jit.trace(exportable, example, check_trace=False)
        found = trace(image)
    expected = eager_outputs(model, image)
    assert 0 < len(expected["scores"])
    check_same(expected, found, exportable.output_names)


@torch.no_grad()
def test_anchors_without_a_finite_score_give_no_proposals():
    model, image = detecting_model(FPN), noise(72, 100)

    def overflow(_head, _inputs, outputs):
        outputs[0][0][0, 0, 2, :4] = torch.tensor([torch.inf, torch.nan, -torch.inf, torch.inf])
        return outputs

    model.proposal_generator.rpn_head.register_forward_hook(overflow)
    proposals = []
    model.roi_heads.register_forward_pre_hook(lambda _heads, inputs: proposals.append(inputs[2]))
    expected = eager_outputs(model, image)
    exportable = ExportableMaskRCNN(model).eval()
    pixels, image_edge = exportable._prepare(image, None)
    found = exportable._propose(model.backbone(pixels), image_edge)
    assert len(found) == len(proposals[0][0]) > 0
    check_same(expected, exportable(image), exportable.output_names)


def test_padding_of_a_fixed_size_has_no_effect():
    model = detecting_model(FPN)
    exportable = ExportableMaskRCNN(model).eval()
    image = noise(72, 100)
    filled, image_hw = padded(image, (96, 128))
    filled[:, 72:] = 999
    filled[:, :, 100:] = -999
    with torch.no_grad():
        found = exportable(filled, image_hw)
    check_same(eager_outputs(model, image, (96, 128)), found, exportable.output_names)


@pytest.mark.parametrize("format_of", ["eager", "trace"])
def test_an_image_without_detections_gives_empty_tensors(format_of):
    model = detecting_model(FPN, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0", *SCORING)
    exportable = ExportableMaskRCNN(model).eval()
    with torch.no_grad(), torch.jit.optimized_execution(False):
        image = noise(72, 100)
        run = (
            exportable
            if format_of == "eager"
            else torch.jit.trace(exportable, image, check_trace=False)
        )
        shapes = [tuple(x.shape) for x in run(image)]
    assert shapes == [(0, 4), (0,), (0,), (0, 28, 28), (0,)]


@pytest.mark.parametrize(
    ("key", "opts"),
    [
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", (BOX + "POOLER_TYPE", "PrROIPool")),
        ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", (MASK + "POOLER_TYPE", "PrROIPool")),
        ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", (MASK + "POOLER_TYPE", "ROIAlignRotated")),
        ("MODEL.ROI_MASK_HEAD.POOLER_REDUCTION", (MASK + "POOLER_REDUCTION", "max")),
        ("MODEL.KEYPOINT_ON", ("MODEL.KEYPOINT_ON", "True")),
        ("MODEL.META_ARCHITECTURE", ("MODEL.META_ARCHITECTURE", "ProposalNetwork")),
        ("MODEL.PROPOSAL_GENERATOR.NAME", ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN")),
    ],
)
def test_parts_that_cannot_be_exported_are_refused_with_their_key(key, opts):
    model = build_model(small_config(FPN, *opts))
    with pytest.raises(ConfigError, match=key):
        check_exportable(model)
