"""Keys that have no effect are reported with the reason."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from conftest import CONFIGS, small_config
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from detectron2.modeling.backbone.resnet import BasicStem

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.config_check.unread_keys import own_keys, report_unread_keys, unread_keys
from mask_head_plugin.engine import run
from mask_head_plugin.modeling import build_small_resnet_fpn_backbone

FPN, C4, SMALL = "Base-MaskRCNN-FPN.yaml", "Base-MaskRCNN-C4.yaml", "Base-Small.yaml"
NOTHING = "no part of this run reads it"
COSINE = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]
HEAD = "MODEL.ROI_MASK_HEAD."


@pytest.mark.parametrize(
    ("config", "opts", "cause"),
    [
        (SMALL, ["MODEL.RESNETS.DEPTH", "101"], NOTHING),
        (SMALL, ["MODEL.RESNETS.NUM_GROUPS", "32"], NOTHING),
        (SMALL, ["MODEL.RESNETS.RES5_DILATION", "2"], NOTHING),
        (C4, ["MODEL.FPN.OUT_CHANNELS", "64"], NOTHING),
        (C4, [HEAD + "POOLER_RESOLUTION", "28"], NOTHING),
        (C4, ["MODEL.ROI_BOX_HEAD.FC_DIM", "64"], "it needs MODEL.ROI_BOX_HEAD.NUM_FC above 0"),
        (FPN, ["MODEL.RETINANET.NUM_CLASSES", "3"], NOTHING),
        (FPN, ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.4, 0.5, 0.6)"], NOTHING),
        (FPN, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"], NOTHING),
        (FPN, ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"], NOTHING),
        (FPN, [HEAD + "FC_DIM", "64"], NOTHING),
        (
            FPN,
            ["SOLVER.EARLY_STOPPING.PATIENCE", "3"],
            "it needs SOLVER.EARLY_STOPPING.METRIC",
        ),
        (
            FPN,
            ["DATASETS.TEST", "()", "TEST.EVAL_LOSS", "True"],
            "it needs a data set in DATASETS.TEST",
        ),
        (FPN, [HEAD + "SCORING.FC_DIM", "64"], f"it needs {HEAD}SCORING.ENABLED True"),
        (FPN, [HEAD + "LOSS_PARAMS.FOCAL.GAMMA", "3.0"], f"it needs 'focal' in {HEAD}LOSSES"),
        (FPN, ["MODEL.ROI_BOX_HEAD.NORM", "GN"], "it needs MODEL.ROI_BOX_HEAD.NUM_CONV above 0"),
        (FPN, ["DATALOADER.REPEAT_THRESHOLD", "0.1"], NOTHING),
        (FPN, ["INPUT.CROP.TYPE", "relative"], NOTHING),
        (FPN, ["INPUT.LSJ.MIN_SCALE", "0.5"], "it needs INPUT.LSJ.ENABLED True"),
        (FPN, ["SOLVER.NUM_DECAYS", "5"], NOTHING),
        (FPN, ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "5.0"], "SOLVER.CLIP_GRADIENTS.ENABLED True"),
        (FPN, ["TEST.AUG.MAX_SIZE", "3000"], "it needs TEST.AUG.ENABLED True"),
        (FPN, ["TEST.PRECISE_BN.NUM_ITER", "30"], "it needs TEST.PRECISE_BN.ENABLED True"),
        (FPN, ["DATASETS.PROPOSAL_FILES_TRAIN", "('x.pkl',)"], "it needs MODEL.LOAD_PROPOSALS"),
        (FPN, ["INPUT.MIN_SIZE_TEST", "0", "INPUT.MAX_SIZE_TEST", "500"], "MIN_SIZE_TEST above 0"),
        (FPN, ["GLOBAL.HACK", "2.0"], NOTHING),
    ],
)
def test_a_key_without_effect_is_reported_with_the_reason(config, opts, cause, caplog):
    cfg = load_config(str(CONFIGS / config), ["MODEL.DEVICE", "cpu", *opts])
    report_unread_keys(cfg, train=True)
    (message,) = caplog.messages
    assert message.startswith(f"{opts[-2]} ") and "has no effect: " in message
    assert message.endswith(cause) or cause in message


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        (SMALL, ["MODEL.BACKBONE.FREEZE_AT", "5", "MODEL.FPN.FUSE_TYPE", "avg"]),
        (FPN, ["MODEL.RESNETS.DEPTH", "101", HEAD + "LOSSES", "[['focal', 1.0]]"]),
        (FPN, [HEAD + "NAME", "MLPMaskHead", HEAD + "FC_DIM", "64", HEAD + "NUM_CONV", "0"]),
        (FPN, [HEAD + "SCORING.ENABLED", "True", HEAD + "SCORING.FC_DIM", "64"]),
        (FPN, ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "2.0"]),
        (SMALL, ["SOLVER.BASE_LR_END", "0.001", "DATALOADER.NUM_WORKERS", "1"]),
        (C4, ["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7", "TEST.EVAL_PERIOD", "9", "SEED", "1"]),
    ],
)
def test_keys_with_an_effect_are_not_reported(config, opts):
    assert unread_keys(load_config(str(CONFIGS / config), opts), train=True) == {}


def test_large_scale_jitter_replaces_other_sizes_and_crops():
    replaced = ["INPUT.MIN_SIZE_TRAIN", "(300,)", "INPUT.MAX_SIZE_TRAIN", "500"]
    replaced += ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.CROP.ENABLED", "True"]
    jitter = ["INPUT.LSJ.ENABLED", "True", "INPUT.LSJ.IMAGE_SIZE", "96"]
    used = ["INPUT.COPY_PASTE.PROBABILITY", "0.5", "INPUT.MIN_SIZE_TEST", "96"]
    cfg = load_config(str(CONFIGS / SMALL), [*jitter, *replaced, *used])
    expected = dict.fromkeys(replaced[::2], "it needs INPUT.LSJ.ENABLED False")
    assert unread_keys(cfg, train=True) == expected


def test_training_keys_are_not_checked_in_evaluation():
    cfg = load_config(str(CONFIGS / FPN), [*COSINE, "MODEL.RESNETS.DEPTH", "101"])
    assert list(unread_keys(cfg, train=True)) == ["SOLVER.STEPS"]
    assert unread_keys(cfg, train=False) == {}


def test_keys_set_by_a_base_are_not_blamed_on_the_derived_config(tmp_path, caplog):
    file, base = tmp_path / "x.yaml", str(CONFIGS / FPN)
    file.write_text(
        f"_BASE_: {base}\nMODEL: {{FPN: {{OUT_CHANNELS: 64}}, RETINANET: {{NORM: GN}}}}"
    )
    opts = [*COSINE, "INPUT.CROP.TYPE", "relative"]

    def told(opts):
        args = Namespace(config_file=str(file), opts=["MODEL.DEVICE", "cpu", *opts])
        args.__dict__ |= {"imports": [], "num_gpus": 1, "num_machines": 1, "eval_only": False}
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("check_registered_datasets", "check_and_leave_out", "setup_logger"):
                patch.setattr(run, name, lambda *args, **kwargs: None)
            run.set_up(args)
        return sorted(x.split()[0] for x in caplog.messages if "has no effect" in x)

    data = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    data += ["OUTPUT_DIR", str(tmp_path)]
    assert told([*data, *opts]) == ["INPUT.CROP.TYPE", "MODEL.RETINANET.NORM"]
    steps = ["SOLVER.STEPS", "(5,)"]
    assert told([*data, *COSINE, *steps]) == ["MODEL.RETINANET.NORM", "SOLVER.STEPS"]
    assert own_keys("", steps[::2]) == {"SOLVER.STEPS"}


TIMM = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "resnet10t"]


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        (
            SMALL,
            ["MODEL.RESNETS.DEPTH", "101"],
            "DEPTH 101 has no effect: MODEL.BACKBONE.NAME build_small_resnet_fpn_backbone does not "
            "read it; remove it, or set MODEL.BACKBONE.NAME to build_resnet_fpn_backbone",
        ),
        (SMALL, ["MODEL.RESNETS.DEPTH", "50"], "DEPTH 50 has no effect"),  # detectron2's default
        (
            SMALL,
            [*TIMM, "MODEL.RESNETS.DEPTH", "101"],
            "build_timm_fpn_backbone does not read it; remove it, and choose .*MODEL.TIMM.NAME",
        ),
        (SMALL, [*TIMM, "MODEL.RESNETS.STRIDE_IN_1X1", "False"], "does not read it; remove it$"),
        (SMALL, TIMM[2:], "TIMM.NAME resnet10t has no effect: .*NAME to build_timm_fpn_backbone"),
    ],
)
def test_a_user_key_that_the_backbone_does_not_read_is_refused(config, opts, message):
    cfg = load_config(str(CONFIGS / config), opts)
    with pytest.raises(ConfigError, match=message):
        report_unread_keys(cfg, train=True, own=own_keys("", opts[::2]))


def test_freeze_at_is_refused_if_the_users_backbone_does_not_read_it(monkeypatch):
    def build_bare(cfg, input_shape):
        return build_small_resnet_fpn_backbone(load_config(str(CONFIGS / SMALL)), input_shape)

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_bare", build_bare)
    opts = ["MODEL.BACKBONE.NAME", "build_bare", "MODEL.BACKBONE.FREEZE_AT", "2"]
    cfg = load_config(str(CONFIGS / SMALL), opts)
    with pytest.raises(ConfigError, match=r"FREEZE_AT 2 has no effect: .*build_bare does not read"):
        report_unread_keys(cfg, train=True, own=own_keys("", opts[::2]))


def test_keys_from_a_base_or_from_a_runs_record_do_not_stop_the_run(tmp_path, caplog):
    cfg = load_config(str(CONFIGS / SMALL), TIMM)
    # MODEL.RESNETS is set by Base-Small, not by the user.
    report_unread_keys(cfg, train=True, own=own_keys("", TIMM[::2]))
    # The keys of the ResNet do not count as the user's, because the options choose a timm backbone.
    for key in own_keys(str(CONFIGS / SMALL), TIMM[::2]) - set(TIMM):
        assert not key.startswith("MODEL.RESNETS.")
    assert "MODEL.RESNETS.NORM" in own_keys(str(CONFIGS / SMALL))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert own_keys(str(tmp_path / "config.yaml"), TIMM[::2]) == set(TIMM[::2])
    assert "has no effect" not in caplog.text


def test_a_module_that_cannot_be_built_without_values_is_not_checked(monkeypatch):
    def build_asking_resnet(cfg, input_shape):
        assert torch.zeros(1).item() == 0, "fails on the meta device"

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_asking_resnet", build_asking_resnet)
    opts = ["MODEL.BACKBONE.NAME", "build_asking_resnet", "MODEL.RESNETS.DEPTH", "101"]
    assert unread_keys(load_config(str(CONFIGS / FPN), opts), train=True) == {}


def test_the_check_changes_neither_the_config_nor_the_random_state():
    cfg = load_config(str(CONFIGS / SMALL))
    cfg.freeze()
    before, state = cfg.dump(), torch.get_rng_state()
    unread_keys(cfg, train=True)
    assert cfg.dump() == before and torch.equal(torch.get_rng_state(), state)


def test_the_small_backbone_follows_its_freeze_and_fuse_keys():
    def trained(*opts):
        backbone = build_backbone(small_config(SMALL, *opts)).bottom_up
        return {
            name: any(p.requires_grad for p in getattr(backbone, name).parameters())
            for name in ("stem", "res2", "res3", "res5")
        }

    assert all(trained().values())
    assert trained("MODEL.BACKBONE.FREEZE_AT", "2") == {
        "stem": False,
        "res2": False,
        "res3": True,
        "res5": True,
    }
    assert not any(trained("MODEL.BACKBONE.FREEZE_AT", "5").values())
    backbone = build_backbone(small_config(SMALL, "MODEL.FPN.FUSE_TYPE", "avg"))
    assert backbone._fuse_type == "avg" and isinstance(backbone.bottom_up.stem, BasicStem)
