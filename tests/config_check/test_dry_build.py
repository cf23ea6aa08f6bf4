"""Building modules for the config check has no side effects.

Only errors of detectron2 itself make a config invalid.
"""

from __future__ import annotations

import functools
import os
import random
import threading

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.backbone import FPN, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, build_resnet_fpn_backbone
from detectron2.modeling.poolers import ROIPooler
from torch import nn

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.config_check import child_process
from mask_head_plugin.config_check.unread_keys import unread_keys
from mask_head_plugin.engine import check_config

OWN = ["MODEL.BACKBONE.NAME", "own"]
OWN_MODEL = ["MODEL.META_ARCHITECTURE", "own", "MODEL.MASK_OUTPUT", "bitmask"]


def config(tmp_path, *opts):
    data = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    opts = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), *data, *opts]
    return load_config(str(CONFIGS / "Base-MaskRCNN-FPN.yaml"), opts)


def register(monkeypatch, registry, build):
    monkeypatch.setitem(registry._obj_map, "own", build)


def build_swin(cfg, input_shape):
    """Builds a backbone whose stochastic depth reads the values of a tensor."""
    small = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    bottom_up = SwinTransformer(embed_dim=24, out_indices=(0, 1, 2, 3), **small)
    return FPN(bottom_up, ["p0", "p1", "p2", "p3"], 64, top_block=LastLevelMaxPool())


def test_a_backbone_that_needs_values_passes_with_a_warning(tmp_path, monkeypatch, caplog):
    register(monkeypatch, BACKBONE_REGISTRY, build_swin)
    check_config(config(tmp_path, *OWN), train=True)
    (told,) = [x for x in caplog.messages if "cannot be built" in x]
    assert told.startswith("MODEL.BACKBONE.NAME own cannot be built on the meta device")
    assert "IN_FEATURES are not checked" in told and "meta" in told and "\n" not in told
    with pytest.raises(ConfigError, match=r"RPN.IN_FEATURES is empty"):
        check_config(config(tmp_path, *OWN, "MODEL.RPN.IN_FEATURES", "[]"), train=True)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("my file is broken"), TypeError("x"), KeyError("x"), SystemExit(3)],
    ids=repr,
)
def test_an_error_within_a_users_backbone_is_not_blamed_on_the_config(
    error, tmp_path, monkeypatch, caplog
):
    def build(cfg, input_shape):
        raise error

    register(monkeypatch, BACKBONE_REGISTRY, build)
    check_config(config(tmp_path, *OWN), train=True)
    (told,) = [x for x in caplog.messages if "cannot be built" in x]
    assert type(error).__name__ in told


def build_own_depth(cfg, input_shape):
    depth = cfg.MODEL.RESNETS.DEPTH
    if depth == 26:
        [rate.item() for rate in torch.linspace(0, 0.1, 4)]
    small = cfg.clone()
    small.MODEL.RESNETS.DEPTH = {26: 50, 50: 50}[depth]
    return build_resnet_fpn_backbone(small, input_shape)


def build_with_norm(cfg):
    if cfg.MODEL.RESNETS.NORM == "own_norm":
        torch.ones(1).item()
    return nn.Linear(1, 1)


def build_refused_elsewhere(cfg):
    """Fails in detectron2 for any norm; only an address in the message depends on the norm."""
    objects = [object() for _ in range(9 if cfg.MODEL.RESNETS.NORM == "own_norm" else 999)]
    ROIPooler(7, [0.25], 0, objects[-1])


NORM = ["MODEL.RESNETS.NORM", "own_norm"]


@pytest.mark.parametrize(
    ("registry", "build", "opts"),
    [
        (BACKBONE_REGISTRY, build_own_depth, [*OWN, "MODEL.RESNETS.DEPTH", "26"]),
        (META_ARCH_REGISTRY, build_with_norm, [*OWN_MODEL, *NORM]),
        (META_ARCH_REGISTRY, build_refused_elsewhere, [*OWN_MODEL, *NORM]),
    ],
)
def test_a_value_is_refused_only_if_detectron2_itself_refuses_it(
    registry, build, opts, tmp_path, monkeypatch, caplog
):
    register(monkeypatch, registry, build)
    check_config(config(tmp_path, *opts), train=True)
    (told,) = [x for x in caplog.messages if x.startswith(opts[-2])]
    assert " is not one of " in told


@functools.lru_cache
def grid(size):
    return torch.arange(size)


BUILT = []


def build_with_traces(cfg, input_shape):
    BUILT.append(cfg)
    torch.rand(1), np.random.rand(), random.random()
    backbone = build_resnet_fpn_backbone(cfg, input_shape)
    backbone.register_buffer("grid", grid(4))
    return backbone


def states():
    numbers = np.random.get_state()
    return random.getstate(), numbers[1].tolist(), numbers[2], torch.get_rng_state().tolist()


def test_checks_do_not_change_user_modules_or_random_state(tmp_path, monkeypatch):
    register(monkeypatch, BACKBONE_REGISTRY, build_with_traces)
    grid.cache_clear(), BUILT.clear()
    cfg, before = config(tmp_path, *OWN, "MODEL.FPN.OUT_CHANNELS", "64"), states()
    check_config(cfg, train=True)
    assert unread_keys(cfg, train=True) == {}
    with pytest.raises(ConfigError, match=r"^MODEL.FPN.NORM 'GM' is not one of .*'GN'"):
        check_config(config(tmp_path, *OWN, "MODEL.FPN.NORM", "GM"), train=True)
    assert BUILT == [] and grid.cache_info().currsize == 0
    assert states() == before


def test_without_fork_the_checks_run_in_this_process_and_keep_the_random_state(
    tmp_path, monkeypatch
):
    def refused():
        raise BlockingIOError("no process left")

    register(monkeypatch, BACKBONE_REGISTRY, build_with_traces)
    monkeypatch.setattr(os, "fork", refused)
    before, made = states(), len(BUILT)
    check_config(config(tmp_path, *OWN), train=True)
    assert len(BUILT) > made and states() == before
    grid.cache_clear()


def test_a_child_process_that_hangs_is_killed(tmp_path, monkeypatch, caplog):
    lock, children = threading.Lock(), []
    fork = os.fork

    def noted_fork():
        children.append(fork())
        return children[-1]

    def build(cfg, input_shape):
        with lock:  # held by a thread that a fork does not copy
            return build_resnet_fpn_backbone(cfg, input_shape)

    register(monkeypatch, BACKBONE_REGISTRY, build)
    monkeypatch.setattr(child_process, "MOST_SECONDS", 0.3)
    monkeypatch.setattr(os, "fork", noted_fork)
    with lock:
        check_config(config(tmp_path, *OWN), train=True)
    assert "cannot be built" in caplog.text and "not built within 0.3 s" in caplog.text
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_a_child_of_a_process_with_busy_threads_finishes(tmp_path, monkeypatch, caplog):
    def build(cfg, input_shape):
        with torch.device("cpu"):
            torch.mm(torch.ones(512, 512), torch.ones(512, 512))
            torch.ones(1 << 20).add(1)
        return build_resnet_fpn_backbone(cfg, input_shape)

    register(monkeypatch, BACKBONE_REGISTRY, build)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.mm(torch.ones(512, 512), torch.ones(512, 512))
        torch.ones(1 << 20).add(1)
        check_config(config(tmp_path, *OWN), train=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert "cannot be built" not in caplog.text


READS = {
    "**": lambda node: (lambda **values: values)(**node),
    "{**}": lambda node: {**node},
    "dict": dict,
    "values": lambda node: list(node.values()),
    "items": lambda node: list(node.items()),
    "copy": lambda node: node.copy(),
    "|": lambda node: (node | {}, {} | node),
    "update": lambda node: {}.update(node),
    "pop": lambda node: [node.pop(key) for key in list(node)],
    "get": lambda node: [node.get(key) for key in node],
    "dump": lambda node: node.dump(),
}


@pytest.mark.parametrize("how", READS)
def test_every_way_to_read_a_section_is_recorded(how, tmp_path, monkeypatch):
    def build(cfg):
        READS[how](cfg.MODEL.RETINANET)
        other = cfg.clone()
        other.defrost(), other.freeze()  # reads nothing
        return nn.Linear(1, 1)

    register(monkeypatch, META_ARCH_REGISTRY, build)
    opts = ["MODEL.RETINANET.NUM_CONVS", "7", "MODEL.RPN.CONV_DIMS", "[64]"]
    found = unread_keys(config(tmp_path, *OWN_MODEL, *opts), train=False)
    assert "MODEL.RETINANET.NUM_CONVS" not in found and "MODEL.RPN.CONV_DIMS" in found
