"""Weights in every format that timm writes are loaded. Errors about other files give advice."""

from __future__ import annotations

import argparse
import functools

import pytest
import timm
import torch
from safetensors.torch import save_file

from mask_head_plugin import ConfigError
from mask_head_plugin.modeling.timm_model import TimmModel
from mask_head_plugin.modeling.timm_weights import build_pretrained

NAME = "mobilenetv3_small_050"


@functools.cache
def weights():
    torch.manual_seed(0)
    return timm.create_model(NAME).state_dict()


def start_from(path):
    return build_pretrained(TimmModel.probe(NAME, 3), str(path)).state_dict()


@pytest.mark.parametrize("form", ["torch", "safetensors", "parallel", "ten classes", "tag"])
def test_files_written_by_timm_are_loaded(form, tmp_path):
    path, content = tmp_path / "x", dict(weights())
    if form == "parallel":
        content = {f"module.{name}": x for name, x in content.items()}
    elif form == "ten classes":
        content |= {"classifier.weight": torch.zeros(10, 1024), "classifier.bias": torch.zeros(10)}
    if form == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    model = TimmModel.probe(f"{NAME}.lamb_in1k" if form == "tag" else NAME, 3)
    found = build_pretrained(model, str(path)).state_dict()
    assert found and all(torch.equal(x, weights()[name]) for name, x in found.items())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("args", r"x.pth.tar was not loaded: it refers to argparse.Namespace.*clean_checkpoint.py"),
        ("parts", r"x.pth.tar was not loaded: .*save only its 'state_dict'"),
        ("truncated", r"x.pth.tar was not loaded: .*truncated or corrupt"),
        ("folder", r"x.pth.tar was not loaded: it is a folder: choose a file in it"),
    ],
)
def test_other_files_are_refused_with_advice(form, message, tmp_path):
    path = tmp_path / "x.pth.tar"
    training = {"epoch": 3, "state_dict": weights(), "state_dict_ema": weights()}
    if form == "folder":
        path.mkdir()
    elif form == "truncated":
        torch.save(weights(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        args = {"args": argparse.Namespace(model=NAME)} if form == "args" else {}
        torch.save(training | args, path)
    with pytest.raises(ConfigError, match=f"^MODEL.TIMM.CHECKPOINT: .*{message}"):
        start_from(path)


def test_an_unreachable_hub_is_asked_once_and_reported_with_an_alternative(monkeypatch):
    def fail(repository, *, timeout):
        asked.append((repository, timeout))
        raise RuntimeError("no route\nto host")

    asked = []
    monkeypatch.setattr("huggingface_hub.model_info", fail)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    with pytest.raises(ConfigError, match=r"PRETRAINED: .*no route to host.*set MODEL.TIMM.CHECKP"):
        start_from("hub")
    ((repository, timeout),) = asked
    assert repository.startswith(f"timm/{NAME}") and timeout <= 20
