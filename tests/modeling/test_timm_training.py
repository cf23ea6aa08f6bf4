"""Detectors with timm backbones train, detect, resume, and can be traced and scripted."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_instances, relative_error, small_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage

from mask_head_plugin import ConfigError
from mask_head_plugin.engine import Trainer
from mask_head_plugin.modeling import to_channels_last

SMALL, PLAIN = "mobilenetv3_small_050", "vit_tiny_patch16_224"
DC5 = (
    *("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res5']"),
    *("MODEL.RESNETS.RES5_DILATION", "2", "MODEL.RPN.IN_FEATURES", "['res5']"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['res5']"),
)
VITDET = ("MODEL.FPN.IN_FEATURES", "[]", "MODEL.FPN.NORM", "LN")

MODELS = {
    "ConvNeXt": ("convnext_atto",),
    "Swin": ("swin_s3_tiny_224",),
    "EfficientNet": ("tf_efficientnet_lite0",),
    "MobileNet": (SMALL,),
    "ResNet-D": ("resnet18d",),
    "RegNet": ("regnetx_002",),
    "ViT": (PLAIN, *VITDET),
    "DC5": ("resnet10t", *DC5),
}


def config(name=SMALL, *opts):
    backbone = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", name]
    return small_config("Base-Small.yaml", *backbone, *map(str, opts))


def record(height=64, width=96):
    rng = np.random.default_rng(0)
    image = torch.as_tensor(rng.integers(0, 256, (3, height, width)), dtype=torch.uint8)
    instances = random_instances(3, (height, width), 5, rng, "bitmask")
    return {"image": image, "height": height, "width": width, "instances": instances}


@pytest.mark.parametrize("family", MODELS)
def test_every_part_of_a_detector_gets_gradients_and_it_detects(family):
    model = build_model(config(*MODELS[family]))
    with EventStorage():
        losses = model([record(), record(70, 50)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    trunk = getattr(model.backbone, "bottom_up", getattr(model.backbone, "net", None))
    parameters = dict(trunk.named_parameters())
    # Distributed training would wait for the gradient of a parameter that has none.
    assert parameters and [name for name, x in parameters.items() if x.grad is None] == []
    model.eval()
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    with torch.no_grad():
        (found,) = model([record(70, 50)])
    assert len(found["instances"]) and found["instances"].image_size == (70, 50)


@pytest.mark.parametrize("family", ["ConvNeXt", "Swin"])
@torch.no_grad()
def test_maps_do_not_depend_on_the_memory_format(family):
    backbone = build_backbone(config(*MODELS[family])).eval()
    image = torch.rand(1, 3, 64, 96)
    expected = backbone(image)
    to_channels_last(backbone)
    for name, features in backbone(image).items():
        assert relative_error(features, expected[name]) <= 1e-4, name


def test_losses_in_low_precision_are_close_to_full_precision():
    model, losses = build_model(config(SMALL)), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model([record(), record()]))
    for name, loss in losses[0].items():
        assert losses[1][name].dtype == torch.float32
        torch.testing.assert_close(losses[1][name], loss, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("name", "capture"), [(SMALL, "trace"), (SMALL, "script"), ("convnext_atto", "script")]
)
@torch.no_grad()
def test_a_captured_backbone_works_for_other_images(name, capture):
    backbone = build_backbone(config(name)).eval().bottom_up
    image, other = torch.rand(1, 3, 64, 96), torch.rand(2, 3, 96, 128)
    if capture == "trace":
        captured = torch.jit.trace(backbone, image, strict=False)
    else:
        captured = torch.jit.script(backbone)
    buffer = io.BytesIO()
    torch.jit.save(captured, buffer)
    buffer.seek(0)
    found, expected = torch.jit.load(buffer)(other), backbone(other)
    assert list(found) == list(expected) == ["res2", "res3", "res4", "res5"]
    for key, features in expected.items():
        assert relative_error(found[key], features) <= 1e-5, key


def test_weights_have_timms_names_in_the_trunk_and_detectron2s_elsewhere():
    stock = set(
        build_model(
            config(SMALL, "MODEL.BACKBONE.NAME", "build_small_resnet_fpn_backbone")
        ).state_dict()
    )
    own = set(build_model(config(SMALL)).state_dict())
    trunk = "backbone.bottom_up."
    assert {x for x in stock if not x.startswith(trunk)} == {
        x for x in own if not x.startswith(trunk)
    }
    assert f"{trunk}net.blocks.0.0.conv_pw.weight" in own


def test_a_dilated_res5_has_the_stride_of_res4_and_the_same_weights():
    plain = ("MODEL.RESNETS.OUT_FEATURES", "['res5']", "MODEL.BACKBONE.NAME", "build_timm_backbone")
    dilated = build_backbone(config("resnet10t", *DC5, "MODEL.BACKBONE.FREEZE_AT", "4")).eval()
    usual = build_backbone(config("resnet10t", *plain)).eval()
    assert dilated.output_shape()["res5"].stride == dilated.size_divisibility == 16
    usual.load_state_dict(dilated.state_dict())
    # res5 is not frozen, although it has res4's stride.
    assert dilated.net.layer4[0].conv1.weight.requires_grad
    assert not dilated.net.layer3[0].conv1.weight.requires_grad
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert dilated(image)["res5"].shape[2:] == (4, 6)
        assert usual(image)["res5"].shape[2:] == (2, 3)


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        (
            "vit_small_patch8_224",
            VITDET,
            "only maps of stride 8, .* use another model, such as vit",
        ),
        ("vit_small_patch14_dinov2", VITDET, r"be divisible by patch size \(14\)"),
        (PLAIN, (), r"FPN.IN_FEATURES: vit_tiny.* maps \['res4'\], not 'res2'"),
        ("swin_s3_tiny_224", DC5, "RES5_DILATION 2: timm cannot dilate swin_s3_tiny_224"),
        ("resnet10t", (*DC5, "MODEL.RESNETS.RES5_DILATION", "4"), "DILATION 4 is neither 1 nor 2"),
        ("vgg11", ("MODEL.TIMM.DROP_PATH_RATE", "0.1"), "vgg11 has no stochastic depth .* to 0"),
        (SMALL, ("MODEL.TIMM.DROP_PATH_RATE", "1.0"), r"DROP_PATH_RATE 1.0 is not in \[0, 1\)"),
    ],
)
def test_an_unsupported_option_is_refused_with_advice(name, opts, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(config(name, *opts))


def test_a_plain_transformer_freezes_its_embedding_or_everything():
    def learning(freeze_at):
        backbone = build_backbone(config(PLAIN, *VITDET, "MODEL.BACKBONE.FREEZE_AT", freeze_at))
        names = [name for name, x in backbone.net.named_parameters() if x.requires_grad]
        return {".".join(name.removeprefix("net.model.").split(".")[:2]) for name in names}

    blocks = {f"blocks.{k}" for k in range(12)}
    assert learning(0) == blocks | {"cls_token", "pos_embed", "patch_embed.proj"}
    assert learning(1) == blocks
    assert learning(4) == set()


@pytest.fixture
def few_shapes():
    records = DatasetCatalog.get("shapes_train")[:4]
    DatasetCatalog.register("test_timm_train", lambda: records)
    classes = MetadataCatalog.get("shapes_train").thing_classes
    MetadataCatalog.get("test_timm_train").set(thing_classes=classes, evaluator_type="coco")
    yield "('test_timm_train',)"
    DatasetCatalog.remove("test_timm_train")
    MetadataCatalog.remove("test_timm_train")


def test_a_resumed_run_with_stochastic_depth_gives_identical_weights(few_shapes, tmp_path):
    opts = [
        *("DATASETS.TRAIN", few_shapes, "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path),
        *("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SEED", 3),
        *("MODEL.TIMM.DROP_PATH_RATE", 0.5, "INPUT.MIN_SIZE_TRAIN", "(64,)"),
    ]

    def final_weights(*, resume: bool) -> dict[str, torch.Tensor]:
        trainer = Trainer(config(SMALL, *opts))
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return torch.load(tmp_path / "model_final.pth")["model"]

    expected = final_weights(resume=False)
    Path(tmp_path / "model_final.pth").unlink()
    Path(tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    found = final_weights(resume=True)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
