"""Learning rates by module and by layer of the backbone, for each optimizer."""

from __future__ import annotations

import pytest
import torch
from conftest import small_config
from detectron2.config import LazyCall, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import build_optimizer, get_default_optimizer_params

from mask_head_plugin import ConfigError
from mask_head_plugin.engine import Trainer
from mask_head_plugin.engine.optimizer import group_names, parameter_groups

FPN, C4, SMALL = "Base-MaskRCNN-FPN.yaml", "Base-MaskRCNN-C4.yaml", "Base-Small.yaml"
RATE = ["SOLVER.BASE_LR", "1.0"]


def on_meta(cfg) -> torch.nn.Module:
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def rates(config: str, *opts: str) -> dict[str, float]:
    """Returns the learning rate of each trained parameter, at a base rate of 1."""
    cfg = small_config(config, *RATE, *opts)
    return rates_of(*optimizer_and_model(cfg))


def optimizer_and_model(cfg):
    model = on_meta(cfg)
    return Trainer.build_optimizer(cfg, model), model


def rates_of(optimizer, model) -> dict[str, float]:
    named = zip(group_names(optimizer, model), optimizer.param_groups, strict=True)
    return {name: group["lr"] for names, group in named for name in names}


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["SOLVER.BIAS_LR_FACTOR", "2.0", "SOLVER.WEIGHT_DECAY_BIAS", "0.0"],
        ["MODEL.BACKBONE.FREEZE_AT", "2", "SOLVER.WEIGHT_DECAY_NORM", "0.0"],
        ["SOLVER.NESTEROV", "True", "SOLVER.WEIGHT_DECAY_NORM", "0.001"],
    ],
)
def test_by_default_the_optimizer_equals_detectron2s(opts):
    cfg = small_config(SMALL, *opts)
    model = on_meta(cfg)
    ours, stock = Trainer.build_optimizer(cfg, model), build_optimizer(cfg, model)
    assert type(ours) is type(stock) and ours.defaults == stock.defaults
    assert ours.state_dict() == stock.state_dict()
    assert group_names(ours, model) == group_names(stock, model)


def test_the_longest_matching_name_decides_and_the_bias_factor_multiplies():
    factors = '[["backbone", 0.1], ["backbone.bottom_up.res4", 0.5], ["roi_heads.mask_head", 2.0]]'
    found = rates(SMALL, "SOLVER.LR_FACTORS", factors, "SOLVER.BIAS_LR_FACTOR", "3.0")
    assert {name.split(".")[0] for name in found} == {"backbone", "proposal_generator", "roi_heads"}
    for name, rate in found.items():
        expected = 1.0
        if name.startswith("backbone."):
            expected = 0.5 if "res4" in name else 0.1
        if name.startswith("roi_heads.mask_head."):
            expected = 2.0
        assert rate == pytest.approx(expected * (3.0 if name.endswith(".bias") else 1.0)), name


def test_factors_match_complete_names_only():
    name = "roi_heads.mask_head.predictor.weight"
    found = rates(SMALL, "SOLVER.LR_FACTORS", f'[["{name}", 5.0]]')
    assert [x for x, rate in found.items() if rate != 1] == [name]
    with pytest.raises(ConfigError, match=r"'roi_heads\.mask' matches no .*'roi_heads\.mask_head'"):
        rates(SMALL, "SOLVER.LR_FACTORS", '[["roi_heads.mask", 5.0]]')


def test_a_factor_for_a_frozen_module_is_refused():
    opts = [
        "MODEL.BACKBONE.FREEZE_AT",
        "2",
        "SOLVER.LR_FACTORS",
        '[["backbone.bottom_up.res2", 2]]',
    ]
    with pytest.raises(
        ConfigError, match=r"'backbone\.bottom_up\.res2' are frozen, e\.g\. by MODEL\."
    ):
        rates(SMALL, *opts)


def test_the_schedule_keeps_the_factors():
    factors = ["SOLVER.LR_FACTORS", '[["backbone", 0.1]]', "SOLVER.WARMUP_ITERS", "0"]
    cfg = small_config(SMALL, *RATE, *factors, "SOLVER.MAX_ITER", "10")
    optimizer, model = optimizer_and_model(cfg)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    found = rates_of(optimizer, model)
    assert found["backbone.bottom_up.res2.0.conv1.weight"] == pytest.approx(0.05)
    assert found["roi_heads.mask_head.predictor.weight"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("config", "res5"), [(FPN, "backbone.bottom_up.res5."), (C4, "roi_heads.res5.")]
)
def test_layers_of_a_resnet_are_its_stages(config, res5):
    found = rates(config, "SOLVER.LAYER_DECAY", "0.5")
    power = {"stem": 5, "res2": 4, "res3": 3, "res4": 2}
    for name, rate in found.items():
        stages = [k for k in power if f".{k}." in name]
        expected = 0.5 ** power[stages[0]] if stages else 0.5 if name.startswith(res5) else 1.0
        assert rate == expected, name
    assert {0.5**k for k in range(6)} == set(found.values())


class OnTop(torch.nn.Module):
    """A detector with a timm backbone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        self.backbone = torch.nn.Module()
        self.backbone.bottom_up = timm.create_model(name, features_only=True, out_indices=(0, 1, 2))
        self.head = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_vit2"])
def test_layers_of_timm_models_follow_timm(name):
    """timm's groups for a complete model have the same ratios of rates between layers."""
    optim = pytest.importorskip("timm.optim")
    with torch.device("meta"):
        model = OnTop(name)
        import timm

        whole = timm.create_model(name)
    names = {id(each): key for key, each in whole.named_parameters()}
    expected = {}
    for group in optim.param_groups_layer_decay(whole, layer_decay=0.5):
        expected |= {names[id(each)]: group["lr_scale"] for each in group["params"]}
    groups = parameter_groups(model, 1.0, layer_decay=0.5)
    rate_of = {id(each): group["lr"] for group in groups for each in group["params"]}
    found = {key: rate_of[id(each)] for key, each in model.named_parameters()}
    assert found.pop("head.weight") == found.pop("head.bias") == 1
    assert max(found.values()) == 0.5
    own = {key.removeprefix("backbone.bottom_up."): rate for key, rate in found.items()}
    ratios = {
        own[alias] / scale
        for key, scale in expected.items()
        for alias in (key, key.replace(".", "_", 1), f"model.{key}")
        if alias in own
    }
    assert len(own) > 10 and len(ratios) == 1


def test_parameters_that_timm_excludes_from_decay_are_not_decayed():
    with torch.device("meta"):
        model = OnTop("test_vit2")
    groups = parameter_groups(model, 1.0)
    free = [each for group in groups if group.get("weight_decay") == 0 for each in group["params"]]
    names = {id(each): name for name, each in model.named_parameters()}
    leaves = {names[id(x)].removeprefix("backbone.bottom_up.model.") for x in free}
    assert "pos_embed" in leaves and leaves <= {"pos_embed", "reg_token"}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_layers_of_an_unknown_backbone_are_refused():
    with pytest.raises(ConfigError, match=r"but not the backbone Linear; set LAYER_DECAY to 1\.0"):
        model = torch.nn.Module()
        model.backbone = torch.nn.Linear(1, 1)
        parameter_groups(model, 1.0, layer_decay=0.5)


def test_adamw_uses_its_betas_and_no_decay_for_norms():
    opts = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BETAS", "[0.8, 0.95]"]
    cfg = small_config(SMALL, *opts, "SOLVER.BASE_LR", "0.001", "SOLVER.WEIGHT_DECAY", "0.05")
    optimizer, model = optimizer_and_model(cfg)
    assert type(optimizer) is torch.optim.AdamW
    decays = {}
    for names, group in zip(group_names(optimizer, model), optimizer.param_groups, strict=True):
        assert (group["betas"], group["lr"]) == ((0.8, 0.95), 0.001)
        decays |= dict.fromkeys(names, group["weight_decay"])
    assert {x for name, x in decays.items() if ".norm." in name} == {0.0}
    assert {x for name, x in decays.items() if ".norm." not in name} == {0.05}


def test_a_lazy_config_can_use_the_same_groups():
    cfg = small_config(SMALL)
    model = on_meta(cfg)
    lazy = LazyCall(torch.optim.AdamW)(
        params=LazyCall(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
        lr=0.001,
    )
    lazy.params._target_ = parameter_groups
    lazy.params.lr_factors = [["backbone", 0.1]]
    lazy.params.model = model
    found = rates_of(instantiate(lazy), model)
    assert sorted(set(found.values())) == pytest.approx([0.0001, 0.001])
