"""tools/install_detectron2.py repacks a wheel and explains common problems (no network)."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from types import ModuleType

import pytest
from conftest import ROOT

SCRIPT = ROOT / "tools" / "install_detectron2.py"


@pytest.fixture
def installer(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as Python does for a script
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source_wheel(tmp_path):
    path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("LabGym/__init__.py", "not ours")
        wheel.writestr(
            "LabGym/detectron2/__init__.py", "from LabGym.detectron2 import x  # LabGymX.y\n"
        )
        wheel.writestr("LabGym/detectron2/model_zoo/configs/a.yaml", "LabGym.detectron2: kept\n")
        wheel.writestr("labgym-3.1.2.dist-info/licenses/LICENSE.txt", "GPL")
    return path


def test_repacking_keeps_only_detectron2_and_removes_the_prefix(installer, source_wheel, tmp_path):
    with zipfile.ZipFile(installer.repack(source_wheel, tmp_path)) as wheel:
        content = {name: wheel.read(name).decode() for name in wheel.namelist()}
    info = f"detectron2-{installer.VERSION}.dist-info"
    assert content["detectron2/__init__.py"] == "from detectron2 import x  # LabGymX.y\n"
    assert content["detectron2/model_zoo/configs/a.yaml"] == "LabGym.detectron2: kept\n"
    assert not any(name.startswith("LabGym") or "GPL" in text for name, text in content.items())
    assert "Apache License" in content[f"{info}/licenses/LICENSE"]
    assert installer.UPSTREAM_COMMIT in content[f"{info}/licenses/NOTICE"]
    assert "Requires-Dist: setuptools<81" in content[f"{info}/METADATA"]
    assert len(content[f"{info}/RECORD"].splitlines()) == len(content)


def test_repacking_twice_gives_the_same_bytes(installer, source_wheel, tmp_path):
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        wheel = installer.repack(source_wheel, tmp_path / name)
        hashes.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


def test_pip_accepts_the_repacked_wheel(installer, source_wheel, tmp_path):
    wheel = installer.repack(source_wheel, tmp_path)
    target = ["--target", str(tmp_path / "site"), "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *target], check=True)
    assert (tmp_path / "site" / "detectron2" / "__init__.py").is_file()


def test_an_installed_detectron2_is_not_touched(installer, monkeypatch, capsys):
    monkeypatch.setattr(installer, "install", lambda wheel: pytest.fail("must not install"))
    assert installer.main([]) == 0
    assert "nothing to do: detectron2" in capsys.readouterr().out


def test_check_prints_version_place_and_compiled_module(installer, capsys):
    assert installer.main(["--check"]) == 0
    output = capsys.readouterr().out
    assert "detectron2 0." in output and "compiled module detectron2._C" in output


def test_check_without_detectron2_exits_with_1(installer, monkeypatch, capsys):
    monkeypatch.setattr(installer, "describe_installed", lambda: None)
    assert installer.main(["--check"]) == 1
    assert "not installed" in capsys.readouterr().out


def test_a_wrong_hash_is_refused(installer, source_wheel, monkeypatch, capsys):
    monkeypatch.setattr(installer, "describe_installed", lambda: None)
    assert installer.main(["--wheel", str(source_wheel)]) == 1
    error = capsys.readouterr().err
    assert (
        "SHA-256" in error and installer.SOURCE.sha256 in error and "nothing was installed" in error
    )


def test_a_missing_wheel_is_named(installer, monkeypatch, capsys):
    monkeypatch.setattr(installer, "describe_installed", lambda: None)
    assert installer.main(["--wheel", "nowhere.whl"]) == 1
    assert "nowhere.whl is not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("/usr/bin/python3: No module named pip", "ensurepip"),
        ("ERROR: No matching distribution found for labgym==3.1.2", "--wheel"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "another index"),
        ("ERROR: something else", "pip failed"),
    ],
)
def test_failures_of_pip_are_explained(installer, monkeypatch, tmp_path, output, message):
    result = subprocess.CompletedProcess([], 1, stdout="", stderr=output)
    monkeypatch.setattr(installer.subprocess, "run", lambda *args, **kwargs: result)
    with pytest.raises(installer.FetchError, match=message) as info:
        installer.SOURCE.download(tmp_path)
    assert output in str(info.value)


def test_a_missing_requirement_is_named(installer, monkeypatch):
    stderr = "ModuleNotFoundError: No module named 'torch'"
    result = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(installer.subprocess, "run", lambda *args, **kwargs: result)
    with pytest.raises(installer.FetchError, match=r"needs 'torch'.*requirements.txt"):
        installer.describe_installed()


def test_a_broken_installation_is_not_overwritten(installer, monkeypatch):
    result = subprocess.CompletedProcess([], 1, stdout="", stderr="ImportError: libx")
    monkeypatch.setattr(installer.subprocess, "run", lambda *args, **kwargs: result)
    with pytest.raises(installer.FetchError, match="installed but cannot be imported"):
        installer.describe_installed()
