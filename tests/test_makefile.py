"""make installs into .venv only if something that determines what is installed has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = ("requirements.txt", "setup.cfg", "tools/install_detectron2.py", "tools/pinned_wheel.py")
PYTHON = """#!/bin/sh
echo "$@" >> calls
case "$*" in "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;; esac
test ! -e broken
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """Returns a folder with the Makefile and a Python that only notes its arguments."""
    for name in ("Makefile", *SOURCES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(clone: Path) -> tuple[str, list[str]]:
    """Runs ``make train``; returns its output and the calls of Python."""
    calls = clone / "calls"
    calls.unlink(missing_ok=True)
    command = ["make", "train", "BOOTSTRAP_PYTHON=./python"]
    environment = {"PATH": os.environ["PATH"]}  # not the variables of an outer make
    result = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    return result.stdout, calls.read_text().splitlines() if calls.exists() else []


TRAINING = "train_net.py --config-file configs/shapes/mask_rcnn_shapes.yaml"


def test_only_changed_requirements_are_installed_again(clone):
    told, calls = make(clone)
    assert "Installing requirements.txt and detectron2 into .venv" in told
    assert calls[0] == "-m venv .venv" and calls[-1] == TRAINING and len(calls) == 5
    for name in SOURCES:  # as after a checkout
        os.utime(clone / name)
    told, calls = make(clone)
    assert "The environment .venv is up to date" in told and calls == [TRAINING]
    for name in SOURCES:
        with (clone / name).open("a") as file:
            file.write("# changed\n")
        assert len(make(clone)[1]) == 5, name


def test_an_interrupted_installation_is_run_again(clone):
    (clone / "broken").touch()
    assert make(clone)[1] == ["-m venv .venv"], "nothing may run after a failed step"
    (clone / "broken").unlink()
    assert len(make(clone)[1]) == 5
