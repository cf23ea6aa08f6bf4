"""Values of detectron2's keys pass if detectron2 or a user's registered module accepts them."""

from __future__ import annotations

import pytest
import torch
from conftest import CONFIGS
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.engine import DefaultTrainer
from detectron2.engine import defaults as detectron2_defaults
from detectron2.layers import batch_norm
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import fpn, resnet
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, box_head, mask_head
from torch import nn

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.config_check import check_config
from mask_head_plugin.config_check.unread_keys import unread_keys
from mask_head_plugin.engine import Trainer
from mask_head_plugin.modeling import FCNMaskHead, PerClassMaskROIHeads, pooler

FPN, C4, SMALL = "Base-MaskRCNN-FPN.yaml", "Base-MaskRCNN-C4.yaml", "Base-Small.yaml"
BOX, MASK = "MODEL.ROI_BOX_HEAD.", "MODEL.ROI_MASK_HEAD."
CROP = ["INPUT.CROP.ENABLED", "True"]


def checked(tmp_path, *opts, config=FPN, train=True, trainer=Trainer) -> CfgNode:
    data = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    cfg = load_config(str(CONFIGS / config), ["OUTPUT_DIR", str(tmp_path), *data, *opts])
    check_config(cfg, train=train, trainer=trainer)
    return cfg


@pytest.mark.parametrize(
    ("opts", "nearest"),
    [
        (["MODEL.RESNETS.NORM", "GM"], "'GN'"),
        (["MODEL.RESNETS.NORM", "frozenBN"], "'FrozenBN'"),
        (["MODEL.FPN.NORM", "SyncBM"], "'SyncBN'"),
        ([MASK + "NORM", "LM"], "'LN'"),
        ([BOX + "NUM_CONV", "1", BOX + "NORM", "GM"], "'GN'"),
        (["MODEL.RESNETS.DEPTH", "51"], "50"),
        (["MODEL.FPN.FUSE_TYPE", "summ"], "'sum'"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosinLR"], "'WarmupCosineLR'"),
        (["SOLVER.WARMUP_METHOD", "liner"], "'linear'"),
        (["DATALOADER.SAMPLER_TRAIN", "TrainSampler"], "'TrainingSampler'"),
        (["INPUT.RANDOM_FLIP", "horizontl"], "'horizontal'"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "rang"], "'range'"),
        (["INPUT.MASK_FORMAT", "bitmasks"], "'bitmask'"),
        ([*CROP, "INPUT.CROP.TYPE", "relativ"], "'relative'"),
        (["MODEL.RPN.BBOX_REG_LOSS_TYPE", "gIoU"], "'giou'"),
        ([BOX + "BBOX_REG_LOSS_TYPE", "smooth_L1"], "'smooth_l1'"),
        ([BOX + "POOLER_TYPE", "ROIAlignV3"], "'ROIAlignV2'"),
        ([MASK + "POOLER_TYPE", "ROIAlignv2"], "'ROIAlignV2'"),
        (["INPUT.FORMAT", "BGRR"], "'BGR'"),
        (["MODEL.META_ARCHITECTURE", "MaskRCN"], "'MaskRCNN'"),
        (["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbon"], "'build_resnet_fpn_backbone'"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RPNN"], "'RPN'"),
        (["MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchors"], "'DefaultAnchorGenerator'"),
        (["MODEL.RPN.HEAD_NAME", "StandardRPN"], "'StandardRPNHead'"),
        (["MODEL.ROI_HEADS.NAME", "PerClassROIHeads"], "'PerClassMaskROIHeads'"),
        ([BOX + "NAME", "FastRCNNConvFC"], "'FastRCNNConvFCHead'"),
        ([MASK + "NAME", "FCNMaskHed"], "'FCNMaskHead'"),
    ],
)
def test_a_misspelt_value_refused_by_detectron2_is_one_line_with_the_nearest_name(
    opts, nearest, tmp_path
):
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, *opts)
    told = str(caught.value)
    assert told.startswith(f"{opts[-2]} ") and f"did you mean {nearest}?" in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("opts", "nearest"),
    [
        # nothing that this config builds reads the key
        (["INPUT.CROP.TYPE", "relativ"], "'relative'"),
        (["MODEL.SEM_SEG_HEAD.NORM", "GM"], "'GN'"),
        ([MASK + "NAME", "FCNMaskHed", "MODEL.MASK_ON", "False"], "'FCNMaskHead'"),
        (["MODEL.ROI_KEYPOINT_HEAD.NAME", "KRCNNHead"], "'KRCNNConvDeconvUpsampleHead'"),
    ],
)
def test_a_misspelt_value_that_detectron2_does_not_read_is_only_a_warning(
    opts, nearest, tmp_path, caplog
):
    checked(tmp_path, *opts)
    (told,) = [x for x in caplog.messages if opts[0] in x]
    assert told.startswith(f"{opts[0]} {opts[1]!r} is n") and f"did you mean {nearest}?" in told


def test_training_values_are_not_checked_in_evaluation(tmp_path, caplog):
    checked(tmp_path, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosinLR", train=False)
    assert "SOLVER" not in caplog.text
    with pytest.raises(ConfigError, match=r"RESNETS.NORM 'BM' is not one of .*'BN'\?"):
        checked(tmp_path, "MODEL.RESNETS.NORM", "BM", train=False)


def test_several_wrong_values_are_reported_one_by_one_without_valid_ones(tmp_path, monkeypatch):
    knowing_norm(monkeypatch)
    wrong = ["MODEL.RESNETS.NORM", "own_norm", "MODEL.FPN.FUSE_TYPE", "summ"]
    wrong += ["SOLVER.WARMUP_METHOD", "liner"]
    with pytest.raises(ConfigError, match=r"^(MODEL.FPN.FUSE_TYPE 'summ'|SOLVER.WARMUP_METHOD)"):
        checked(tmp_path, *wrong)
    with pytest.raises(ConfigError, match=r"^MODEL.FPN.FUSE_TYPE 'summ'"):
        checked(tmp_path, *wrong[:-2])
    with pytest.raises(ConfigError, match=r"cannot be built from .*res9"):
        checked(tmp_path, *wrong[:2], "MODEL.FPN.IN_FEATURES", "['res9']")


def knowing_norm(monkeypatch):
    """Imitates a newer detectron2, or a user's change, with an additional norm."""
    get_norm = batch_norm.get_norm

    def newer(norm, out_channels):
        known = norm == "own_norm"
        return nn.InstanceNorm2d(out_channels) if known else get_norm(norm, out_channels)

    for module in (batch_norm, resnet, fpn, box_head, mask_head):
        monkeypatch.setattr(module, "get_norm", newer)


@pytest.mark.parametrize("key", ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM", MASK + "NORM"])
def test_a_norm_that_get_norm_accepts_passes(key, tmp_path, monkeypatch, caplog):
    knowing_norm(monkeypatch)
    checked(tmp_path, key, "own_norm")
    assert "own_norm" not in caplog.text


def test_a_schedule_of_a_newer_detectron2_passes(tmp_path, monkeypatch, caplog):
    known = detectron2_defaults.build_lr_scheduler

    def newer(cfg, optimizer):
        if cfg.SOLVER.LR_SCHEDULER_NAME == "Polynomial":
            return torch.optim.lr_scheduler.PolynomialLR(optimizer)
        return known(cfg, optimizer)

    monkeypatch.setattr(detectron2_defaults, "build_lr_scheduler", newer)
    checked(tmp_path, "SOLVER.LR_SCHEDULER_NAME", "Polynomial")
    assert "Polynomial" not in caplog.text


class OwnTrainer(DefaultTrainer):
    """A trainer of a user's project."""

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        assert cfg.SOLVER.LR_SCHEDULER_NAME == "Own"
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        raise AssertionError("the check must not read the data")


def test_values_that_the_users_trainer_accepts_pass(tmp_path, caplog):
    checked(tmp_path, "SOLVER.LR_SCHEDULER_NAME", "Own", trainer=OwnTrainer)
    assert "Own" not in caplog.text
    with pytest.raises(ConfigError, match=r"LR_SCHEDULER_NAME 'Own' is not one of"):
        checked(tmp_path, "SOLVER.LR_SCHEDULER_NAME", "Own")
    opts = ["SOLVER.LR_SCHEDULER_NAME", "Own", "DATALOADER.SAMPLER_TRAIN", "TrainingSamplr"]
    checked(tmp_path, *opts, trainer=OwnTrainer)
    assert "DATALOADER.SAMPLER_TRAIN 'TrainingSamplr' is not one of" in caplog.text


def test_formats_that_detectron2_can_read_pass(tmp_path, monkeypatch, caplog):
    checked(tmp_path, "INPUT.FORMAT", "HSV")
    with pytest.raises(ConfigError, match=r"PIXEL_MEAN .* INPUT.FORMAT CMYK \(channels: 4\)"):
        checked(tmp_path, "INPUT.FORMAT", "CMYK")
    # In mode F, the array of an image has no axis of channels.
    with pytest.raises(ConfigError, match=r"INPUT.FORMAT 'F' is not one of"):
        checked(tmp_path, "INPUT.FORMAT", "F")
    known = detection_utils.annotations_to_instances

    def newer(objects, image_hw, mask_format="polygon"):
        return known(objects, image_hw, "polygon" if mask_format == "contour" else mask_format)

    monkeypatch.setattr(detection_utils, "annotations_to_instances", newer)
    checked(tmp_path, "INPUT.MASK_FORMAT", "contour")
    assert "contour" not in caplog.text


def test_a_box_loss_of_a_subclass_passes(tmp_path, monkeypatch, caplog):
    class OwnRPN(RPN):
        def losses(self, *_):
            return {}

    monkeypatch.setitem(PROPOSAL_GENERATOR_REGISTRY._obj_map, "OwnRPN", OwnRPN)
    own = ["MODEL.RPN.BBOX_REG_LOSS_TYPE", "wing"]
    with pytest.raises(ConfigError, match=r"RPN.BBOX_REG_LOSS_TYPE 'wing' is not one of"):
        checked(tmp_path, *own)
    checked(tmp_path, *own, "MODEL.PROPOSAL_GENERATOR.NAME", "OwnRPN")
    assert "wing" not in caplog.text


def test_a_newer_detectron2s_pooler_type_passes_and_ours_are_still_checked(
    tmp_path, monkeypatch, caplog
):
    class NewerPooler(pooler.ROIPooler):
        def __init__(self, *args, pooler_type, **kwargs):
            known = "ROIAlignV2" if pooler_type == "ROIAlignV3" else pooler_type
            super().__init__(*args, pooler_type=known, **kwargs)

    monkeypatch.setattr(pooler, "ROIPooler", NewerPooler)
    monkeypatch.setattr("detectron2.modeling.roi_heads.roi_heads.ROIPooler", NewerPooler)
    checked(tmp_path, BOX + "POOLER_TYPE", "ROIAlignV3", MASK + "POOLER_TYPE", "ROIAlignV3")
    assert "ROIAlignV3" not in caplog.text
    with pytest.raises(ConfigError, match=r"ROIWarp with mean needs .*PerClassMaskROIHeads"):
        checked(
            tmp_path, BOX + "POOLER_TYPE", "ROIWarp", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"
        )


@pytest.mark.parametrize("base", [StandardROIHeads, PerClassMaskROIHeads])
def test_our_pooler_types_are_refused_by_user_heads_that_do_not_support_them(
    base, tmp_path, monkeypatch
):
    own = type("OwnHeads", (base,), {})
    monkeypatch.setitem(ROI_HEADS_REGISTRY._obj_map, "own", own)
    opts = ["MODEL.ROI_HEADS.NAME", "own", BOX + "POOLER_TYPE", "ROIWarp"]
    if base is PerClassMaskROIHeads:
        checked(tmp_path, *opts)
    else:
        with pytest.raises(
            ConfigError, match=r"^MODEL.ROI_BOX_HEAD.POOLER_TYPE 'ROIWarp' is not one"
        ):
            checked(tmp_path, *opts)


class OwnHeads(ROIHeads):
    """Heads that accept other values than detectron2's heads."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg), "pooler": cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE}

    @configurable
    def __init__(self, *, pooler, **kwargs):
        super().__init__(**kwargs)
        assert pooler == "Deformable"

    def forward(self, images, features, proposals, targets=None):
        return proposals, {}


class OwnAnchors(DefaultAnchorGenerator.__base__):
    """Point anchors, which accept any value of SIZES."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.num_anchors, self.box_dim = [1] * len(input_shape), 4
        self.sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES


class OwnGenerator(nn.Module):
    """A proposal generator without anchors, thresholds or an RPN."""

    def __init__(self, cfg, input_shape):
        super().__init__()


def build_own_backbone(cfg, input_shape):
    assert cfg.MODEL.RESNETS.DEPTH == 77 and cfg.MODEL.RESNETS.NORM == "own_norm"
    small = cfg.clone()
    small.MODEL.RESNETS.NORM, small.MODEL.RESNETS.DEPTH = "GN", 50
    return BACKBONE_REGISTRY.get("build_resnet_fpn_backbone")(small, input_shape)


OWN_BACKBONE = ["MODEL.RESNETS.DEPTH", "77", "MODEL.RESNETS.NORM", "own_norm"]
NO_MASKS = ["MODEL.MASK_ON", "False"]


@pytest.mark.parametrize(
    ("key", "registry", "own", "opts"),
    [
        ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY, build_own_backbone, OWN_BACKBONE),
        ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY, OwnHeads, [BOX + "POOLER_TYPE", "Deformable"]),
        (
            "MODEL.ANCHOR_GENERATOR.NAME",
            ANCHOR_GENERATOR_REGISTRY,
            OwnAnchors,
            ["MODEL.ANCHOR_GENERATOR.SIZES", "['point']"],
        ),
        (
            "MODEL.PROPOSAL_GENERATOR.NAME",
            PROPOSAL_GENERATOR_REGISTRY,
            OwnGenerator,
            [*("MODEL.RPN.IN_FEATURES", "['p9']"), *("MODEL.RPN.IOU_THRESHOLDS", "[]")],
        ),
        ("MODEL.RPN.HEAD_NAME", RPN_HEAD_REGISTRY, type("OwnHead", (StandardRPNHead,), {}), []),
        (BOX + "NAME", ROI_BOX_HEAD_REGISTRY, type("OwnBox", (FastRCNNConvFCHead,), {}), []),
        (MASK + "NAME", ROI_MASK_HEAD_REGISTRY, type("OwnMask", (FCNMaskHead,), {}), []),
        ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY, type("Own", (GeneralizedRCNN,), {}), []),
    ],
)
def test_registered_user_modules_pass_with_values_of_their_own(
    key, registry, own, opts, tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(registry._obj_map, "own", own)
    checked(tmp_path, key, "own", *opts, "MODEL.MASK_OUTPUT", "bitmask")
    assert "is not one of" not in caplog.text and "registered" not in caplog.text


def test_a_model_that_reads_none_of_the_keys_only_gets_warnings(tmp_path, monkeypatch, caplog):
    def build_own_model(cfg):
        return nn.Linear(1, 1)

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "own", build_own_model)
    opts = ["MODEL.META_ARCHITECTURE", "own", "MODEL.MASK_OUTPUT", "bitmask"]
    checked(tmp_path, *opts, "MODEL.BACKBONE.NAME", "build_resnet_bakbone")
    assert "did you mean 'build_resnet_backbone'" in caplog.text


def test_a_module_that_cannot_be_built_on_meta_is_not_checked(tmp_path, monkeypatch, caplog):
    def build_asking_model(cfg):
        assert torch.zeros(1).item() == 0, "fails on the meta device"
        return nn.Linear(1, 1)

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "own", build_asking_model)
    opts = ["MODEL.META_ARCHITECTURE", "own", "MODEL.MASK_OUTPUT", "bitmask"]
    cfg = checked(tmp_path, *opts, "MODEL.RESNETS.NORM", "own_norm")
    assert "MODEL.RESNETS.NORM 'own_norm' is not one of" in caplog.text
    assert unread_keys(cfg, train=True) == {}
    with pytest.raises(ConfigError, match=r"WARMUP_METHOD 'liner' is not one of .*'linear'"):
        checked(tmp_path, *opts, "SOLVER.WARMUP_METHOD", "liner")
