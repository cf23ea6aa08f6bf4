"""Invalid settings of the optimizer, learning rates, averaging and accumulation are refused."""

from __future__ import annotations

import pytest
from conftest import CONFIGS

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.config_check.recipe import check_rates, check_recipe
from mask_head_plugin.config_check.unread_keys import unread_keys
from mask_head_plugin.engine import Trainer

SMALL, FPN = "Base-Small.yaml", "Base-MaskRCNN-FPN.yaml"
PARTS, FACTORS = "SOLVER.ACCUMULATE_STEPS", "SOLVER.LR_FACTORS"


def config(name: str, *opts: str):
    return load_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu", *opts])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.OPTIMIZER", "adam"], r"'adam' is not one of .*; did you mean AdamW"),
        (["SOLVER.BETAS", "[0.9, 1.0]"], r"SOLVER\.BETAS .* at least 0 and below 1"),
        (["SOLVER.BETAS", "[0.9]"], r"SOLVER\.BETAS .* two numbers"),
        (["SOLVER.BETAS", "['a', 0.9]"], r"SOLVER\.BETAS .* two numbers"),
        (["SOLVER.LAYER_DECAY", "0.0"], r"LAYER_DECAY is 0\.0; it must be above 0"),
        (["SOLVER.LAYER_DECAY", "1.1"], r"LAYER_DECAY is 1\.1; .* at most 1"),
        (["SOLVER.EMA_DECAY", "1.0"], r"EMA_DECAY is 1\.0; it must be below 1"),
        (["SOLVER.EMA_DECAY", "-0.1"], r"EMA_DECAY is -0\.1"),
        (
            [FACTORS, "['backbone', 0.1]"],
            r"'backbone' must be a module's name .*such as \[\"backbone\", 0\.1\]",
        ),
        ([FACTORS, "[['backbone', '0.1']]"], r"the factor of 'backbone' is '0\.1'; it must be"),
        ([FACTORS, "[['backbone', 0.0]]"], r"is 0\.0; it must be above 0 .*FREEZE_AT"),
        ([FACTORS, "[['a', 2.0], ['a', 3.0]]"], r"lists 'a' twice"),
        ([PARTS, "0"], r"ACCUMULATE_STEPS 0: .* set it to 1"),
        ([PARTS, "3"], r"gets 16 images .*cannot be divided .* set it to (2|4)"),
        ([PARTS, "4", "SOLVER.REFERENCE_WORLD_SIZE", "8"], r"gets 2 images .* set it to 2"),
    ],
)
def test_invalid_values_are_refused_with_suggestions(opts, message):
    with pytest.raises(ConfigError, match=message):
        check_recipe(config(FPN, *opts), 1)


def test_accumulation_divides_the_images_of_one_process():
    check_recipe(config(FPN, PARTS, "16"), 1)
    with pytest.raises(ConfigError, match="gets 2 images per iteration"):
        check_recipe(config(FPN, PARTS, "16"), 8)


def test_adamw_with_a_learning_rate_for_sgd_gives_a_warning(caplog):
    check_recipe(config(FPN, "SOLVER.OPTIMIZER", "AdamW"), 1)
    assert "SOLVER.BASE_LR 0.02 suits SGD" in caplog.text
    caplog.clear()
    check_recipe(config(FPN, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.0005"), 1)
    check_recipe(config(FPN), 1)
    assert not caplog.messages


def test_factors_are_checked_against_the_model_before_it_is_built():
    with pytest.raises(ConfigError, match=r"'backbonn' matches no .* did you mean 'backbone'\?$"):
        check_rates(config(SMALL, FACTORS, "[['backbonn', 0.1]]"), Trainer)
    check_rates(config(SMALL, FACTORS, "[['backbone', 0.1]]", "SOLVER.LAYER_DECAY", "0.9"), Trainer)


def test_keys_of_the_other_optimizer_are_reported():
    other = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.MOMENTUM", "0.8", "SOLVER.NESTEROV", "True"]
    parts = [PARTS, "2", "SOLVER.EMA_DECAY", "0.9", FACTORS, "[['backbone', 0.1]]"]
    found = unread_keys(config(SMALL, *other, *parts, "SOLVER.LAYER_DECAY", "0.9"), train=True)
    assert found == dict.fromkeys(
        ("SOLVER.MOMENTUM", "SOLVER.NESTEROV"), "it needs SOLVER.OPTIMIZER SGD"
    )
    found = unread_keys(config(SMALL, "SOLVER.BETAS", "[0.8, 0.9]"), train=True)
    assert found == {"SOLVER.BETAS": "it needs SOLVER.OPTIMIZER AdamW"}
