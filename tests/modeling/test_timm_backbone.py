"""build_timm_fpn_backbone: maps equal those of timm, weights are checked, and stages freeze."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import CONFIGS
from detectron2.modeling import build_backbone
from safetensors.torch import save_file

from mask_head_plugin import ConfigError
from mask_head_plugin.config import read_config
from mask_head_plugin.modeling.timm_model import TimmModel, pretrained_pixels

SMALL = "mobilenetv3_small_050"


def config(name=SMALL, *opts):
    backbone = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", name]
    return read_config(str(CONFIGS / "Base-Small.yaml"), [*backbone, *map(str, opts)])


def randomised(name: str) -> torch.nn.Module:
    """Returns timm's model with non-trivial batch norm statistics."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("name", [SMALL, "convnext_atto", "resnet18d", "swin_s3_tiny_224"])
def test_maps_equal_those_of_timm_with_the_same_weights(name, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(randomised(name).state_dict(), file)
    backbone = build_backbone(config(name, "MODEL.TIMM.CHECKPOINT", file)).eval()
    fixed = {"strict_img_size": False} if name.startswith("swin") else {}
    overlay = {"file": str(file)}
    reference = timm.create_model(
        name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **fixed
    ).eval()
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        found, expected = backbone.bottom_up(image), reference(image)[-4:]
    shapes = backbone.bottom_up.output_shape()
    for (key, features), other in zip(found.items(), expected, strict=True):
        other = other.permute(0, 3, 1, 2) if name.startswith("swin") else other
        torch.testing.assert_close(features, other, rtol=0, atol=1e-6)
        assert features.shape[1] == shapes[key].channels
        assert features.shape[2:] == (64 // shapes[key].stride, 96 // shapes[key].stride)
    assert list(backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]


def test_the_backbone_file_is_not_read_if_detector_weights_are_given():
    opts = "MODEL.TIMM.CHECKPOINT", "nowhere.safetensors", "MODEL.WEIGHTS", "model_final.pth"
    build_backbone(config(SMALL, *opts))
    with pytest.raises(ConfigError, match=r"CHECKPOINT nowhere\.safetensors does not exist"):
        build_backbone(config(SMALL, *opts[:2]))


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_of_another_model_are_refused(change, tmp_path):
    weights = randomised(SMALL).state_dict()
    if change == "missing":
        del weights["blocks.0.0.conv_pw.weight"]
    else:
        weights["blocks.0.0.conv_pw.weight"] = torch.zeros(1, 2, 3)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(
        ConfigError, match=r"x\.safetensors does not belong to mobilenet.*blocks\.0\.0"
    ):
        build_backbone(config(SMALL, "MODEL.TIMM.CHECKPOINT", tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("freeze_at", "frozen", "learning"),
    [
        (0, [], ["conv_stem", "blocks.0", "blocks.4"]),
        (1, ["conv_stem"], ["blocks.0", "blocks.4"]),
        (2, ["conv_stem", "blocks.0"], ["blocks.1", "blocks.4"]),
        (3, ["conv_stem", "blocks.0", "blocks.1"], ["blocks.2", "blocks.4"]),
    ],
)
def test_stages_freeze_in_the_same_order_as_a_resnets(freeze_at, frozen, learning):
    backbone = build_backbone(config(SMALL, "MODEL.BACKBONE.FREEZE_AT", freeze_at))
    net = backbone.bottom_up.net
    for name in frozen:
        assert not any(x.requires_grad for x in net.get_submodule(name).parameters()), name
    for name in learning:
        assert all(x.requires_grad for x in net.get_submodule(name).parameters()), name
    before = {k: v.clone() for k, v in net.state_dict().items() if k.startswith(tuple(frozen))}
    net.train()(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


def test_frozen_norms_keep_their_statistics():
    net = build_backbone(config(SMALL, "MODEL.TIMM.NORM", "FrozenBN")).bottom_up.net
    norms = [k for k in net.state_dict() if k.endswith(("running_mean", "running_var"))]
    before = {name: net.state_dict()[name].clone() for name in norms}
    net.train()(torch.rand(2, 3, 64, 64))
    assert norms and all(torch.equal(net.state_dict()[name], before[name]) for name in norms)


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("resnet5", (), r"'resnet5' is not a model of timm; did you mean resnet\w+\?"),
        ("mixer_s32_224", (), "accepts only images of the size"),
        ("inception_v4", (), "cuts off the borders"),
        (SMALL, ("MODEL.TIMM.OUT_INDICES", "[7]"), r"OUT_INDICES: mobilenet.*not \[7\]"),
        (SMALL, ("MODEL.TIMM.NORM", "GN"), "NORM 'GN' is not one of"),
        (SMALL, ("MODEL.FPN.IN_FEATURES", "['res9']"), r"IN_FEATURES: .* has the .*not 'res9'"),
    ],
)
def test_models_and_options_that_give_no_pyramid_are_refused(name, opts, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(config(name, *opts))


def test_a_backbone_can_be_built_on_the_meta_device_without_weights():
    cfg = config(SMALL, "MODEL.TIMM.CHECKPOINT", "nowhere", "MODEL.BACKBONE.FREEZE_AT", 2)
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    assert all(x.is_meta for x in backbone.parameters())


def test_pixel_statistics_are_those_published_by_timm():
    mean, std = pretrained_pixels("tf_efficientnet_lite0")
    assert mean == std == [127.5] * 3
    assert TimmModel.probe("convnext_atto", 3).levels[0].stride == 4
