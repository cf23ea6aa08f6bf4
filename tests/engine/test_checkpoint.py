"""MaskHeadCheckpointer: what it reads, and that no file runs code."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mask_head_plugin import ConfigError
from mask_head_plugin.engine import MaskHeadCheckpointer, export_safetensors


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


def model_with(value: float) -> nn.Linear:
    model = nn.Linear(2, 3)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return model


def load(path) -> nn.Linear:
    model = model_with(0.0)
    MaskHeadCheckpointer(model).load(str(path))
    return model


def test_safetensors_torch_and_zoo_pickles_give_the_same_weights(tmp_path):
    weights = model_with(7.0).state_dict()
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"model": weights, "iteration": 3}, tmp_path / "b.pth")
    arrays = OrderedDict((name, weight.numpy()) for name, weight in weights.items())
    for protocol in (2, 4):
        with (tmp_path / f"c{protocol}.pkl").open("wb") as file:
            pickle.dump({"model": arrays, "__author__": "zoo"}, file, protocol=protocol)
    for name in ("a.safetensors", "b.pth", "c2.pkl", "c4.pkl"):
        assert (load(tmp_path / name).weight == 7).all(), name


def test_pickles_of_old_numpy_are_read(tmp_path):
    """NumPy 1 named its core numpy.core; the zoo's files do."""
    array = pickle.dumps(np.full((3, 2), 7.0, np.float32), protocol=2)
    array = array.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    content = b"\x80\x02}q\x00X\x06\x00\x00\x00weight" + array[2:-1] + b"s."
    (tmp_path / "old.pkl").write_bytes(content)
    model = model_with(0.0)
    assert (pickle.loads(content)["weight"] == 7).all()
    MaskHeadCheckpointer(model)._load_file(str(tmp_path / "old.pkl"))


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "evil.pyth"])
def test_files_with_code_are_refused_by_name_and_not_run(tmp_path, name):
    content = {"model": {"weight": Evil(tmp_path / "executed")}, "model_state": {}}
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} was not loaded.*mkdir"):
        load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "x.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04 nonsense", b"plain text"], ids=["empty", "nonsense", "text"]
)
def test_corrupt_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} was not loaded"):
        load(tmp_path / name)


def test_export_refuses_what_is_not_a_checkpoint_and_what_float16_cannot_hold(tmp_path):
    (tmp_path / "text.pth").write_text("no")
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "bare.pth")
    torch.save({"model": {"weight": torch.full((2, 2), 1e6)}}, tmp_path / "large.pth")
    for name in ("text.pth", "bare.pth"):
        with pytest.raises(ConfigError, match=f"{name} is not a checkpoint"):
            export_safetensors(tmp_path / name, tmp_path / "out.safetensors")
    export_safetensors(tmp_path / "large.pth", tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match=r"large\.pth: weight does not fit float16"):
        export_safetensors(tmp_path / "large.pth", tmp_path / "half.safetensors", half=True)
    assert not (tmp_path / "half.safetensors").exists()
