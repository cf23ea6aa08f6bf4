"""Exporting weights.

test_weight_files.py tests reading weights; test_weight_fit.py tests loading them into a model.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mask_head_plugin import ConfigError
from mask_head_plugin.checkpoint import export_safetensors


def test_export_accepts_every_file_that_loading_accepts(tmp_path):
    weights = {"a.weight": torch.rand(2, 3), "a.bias": torch.rand(2)}
    arrays = {f"module.{name}": x.numpy() for name, x in weights.items()}
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"model": weights, "iteration": 3}, tmp_path / "trained.pth")
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    for name in ("bare.pth", "trained.pth", "zoo.pkl"):
        export_safetensors(tmp_path / name, tmp_path / "new" / "out.safetensors")
        exported = load_file(tmp_path / "new" / "out.safetensors")
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], x) for name, x in weights.items())


def test_export_refuses_other_files_and_values_too_large_for_float16(tmp_path):
    (tmp_path / "text.pth").write_text("no")
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"conv1_w": np.ones(2)}))
    torch.save({"model": {"weight": torch.full((2, 2), 1e6)}}, tmp_path / "large.pth")
    for name, told in (("text.pth", "was not loaded"), ("R-50.pkl", "another project's")):
        with pytest.raises(ConfigError, match=rf"{name}.* {told}"):
            export_safetensors(tmp_path / name, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    export_safetensors(tmp_path / "large.pth", tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match=r"large\.pth: weight does not fit into float16"):
        export_safetensors(tmp_path / "large.pth", tmp_path / "half.safetensors", half=True)
    assert not (tmp_path / "half.safetensors").exists()
