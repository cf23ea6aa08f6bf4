"""Checkpoints are written completely or not at all, and verified before use."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from mask_head_plugin import ConfigError
from mask_head_plugin.checkpoint import MaskHeadCheckpointer
from mask_head_plugin.checkpoint.checkpointer import write_checkpoint
from mask_head_plugin.checkpoint.run_folder import (
    checkpoint_files,
    find_damage,
    newest_intact,
    remove_old_checkpoints,
)

NAMES = ("model_0000009", "model_0000019", "model_0000029")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Returns a folder with three checkpoints of different weights."""
    model = nn.Linear(20, 30)
    checkpointer = MaskHeadCheckpointer(model, str(tmp_path))
    for k, name in enumerate(NAMES):
        nn.init.constant_(model.weight, k)
        checkpointer.save(name, iteration=10 * k + 9)
    return tmp_path


def resumed_weight(folder: Path) -> float:
    model = nn.Linear(20, 30)
    MaskHeadCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    return model.weight[0, 0].item()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def swap(path: Path) -> None:
    other = path.with_name("model_0000009.pth")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, swap])
def test_a_damaged_checkpoint_is_reported_and_an_older_one_used(folder, caplog, damage):
    damage(folder / "model_0000029.pth")
    assert resumed_weight(folder) == 1
    (text,) = (x.getMessage() for x in caplog.records if x.levelname == "WARNING")
    assert "resuming from the older" in text and "model_0000019.pth" in text
    assert "model_0000029.pth " in text


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_damage_is_found_even_without_a_checksum_file(folder, damage):
    """Checksums within the file reveal a flipped bit."""
    path = folder / "model_0000029.pth"
    path.with_name("model_0000029.pth.sha256").unlink()
    assert find_damage(path) == ""
    damage(path)
    assert find_damage(path)


def test_without_an_intact_checkpoint_the_error_names_each_damage(folder):
    for name in NAMES:
        truncate(folder / f"{name}.pth")
    with pytest.raises(ConfigError) as error:
        resumed_weight(folder)
    for text in (*NAMES, "no checkpoint", "does not match its checksum in", "without --resume"):
        assert text in str(error.value)


def test_the_checksum_file_can_be_verified_by_sha256sum(folder):
    checked = subprocess.run(
        ["sha256sum", "--check", "model_0000019.pth.sha256"], cwd=folder, capture_output=True
    )
    assert checked.returncode == 0


def test_detectron2s_checkpoints_are_resumed(tmp_path):
    model = nn.Linear(20, 30)
    nn.init.constant_(model.weight, 5)
    DetectionCheckpointer(model, str(tmp_path)).save("model_0000004")
    assert resumed_weight(tmp_path) == 5


def test_a_checkpoint_chosen_in_last_checkpoint_is_used(folder):
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    assert resumed_weight(folder) == 0


def test_folders_and_broken_links_are_reported_and_skipped(folder, caplog):
    shutil.copy(folder / "model_0000029.pth.sha256", folder / "model_0000039.pth.sha256")
    (folder / "model_0000039.pth").mkdir()
    (folder / "model_0000049.pth").symlink_to("nowhere")
    with caplog.at_level("WARNING"):
        assert resumed_weight(folder) == 2
    assert "model_0000039.pth is a folder" in caplog.text
    assert "model_0000049.pth is a broken link" in caplog.text


def test_a_checkpoint_without_its_entry_in_last_checkpoint_is_found(folder):
    write_checkpoint(folder / "model_0000039.pth", {"model": {"weight": torch.ones(1)}})
    assert newest_intact(folder).name == "model_0000039.pth"


@pytest.mark.parametrize("mark", ["model_final.pth", "model_0000029.pth"])
def test_file_times_of_a_copied_folder_do_not_decide_the_checkpoint(folder, mark):
    shutil.copy(folder / "model_0000029.pth", folder / "model_final.pth")
    (folder / "last_checkpoint").write_text(mark)
    newer = (folder / "last_checkpoint").stat().st_mtime + 1
    for k, path in enumerate(sorted(folder.glob("*.pth"), reverse=True)):
        os.utime(path, (newer + k, newer + k))
    expected = [mark, "model_0000029.pth", "model_0000019.pth", "model_0000009.pth"]
    assert [path.name for path in checkpoint_files(folder)][:3] == list(dict.fromkeys(expected))[:3]


@pytest.mark.parametrize("mark", [b"", b"\xff\xfe", b"../../etc/passwd", b"model_9999999.pth"])
def test_a_damaged_last_checkpoint_file_is_ignored(folder, mark):
    (folder / "last_checkpoint").write_bytes(mark)
    assert resumed_weight(folder) == 2


def test_best_weights_and_unfinished_files_are_not_resumed(folder):
    for name in ("model_best.pth", ".model_0000039.pth.unfinished"):
        shutil.copy(folder / "model_0000009.pth", folder / name)
    assert [path.stem for path in checkpoint_files(folder)] == list(reversed(NAMES))


def test_a_full_disk_keeps_older_checkpoints_and_is_reported(folder):
    """Simulates a full disk with a limit on file sizes."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = nn.Linear(400, 400)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ConfigError) as error:
            MaskHeadCheckpointer(model, str(folder)).save("model_0000029")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for text in ("model_0000029.pth was not written: File too large", "MB are free", "--resume"):
        assert text in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert newest_intact(folder).name == "model_0000029.pth"


def test_the_error_names_a_read_only_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"model_final\.pth was not written: Permission denied"):
        write_checkpoint(tmp_path / "model_final.pth", {})


def test_overwriting_never_pairs_a_file_with_the_checksum_of_another(folder, monkeypatch):
    """No matter when the process is killed, the file of that name is intact."""
    path = folder / "model_final.pth"
    moments = 0
    for call in range(1, 20):
        write_checkpoint(path, {"model": torch.zeros(10)})
        calls = []

        def stop(*args, original, calls=calls, call=call, **kwargs):
            calls.append(None)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
                original = getattr(owner, name)
                patch.setattr(
                    owner, name, lambda *a, o=original, s=stop, **k: s(*a, original=o, **k)
                )
            try:
                write_checkpoint(path, {"model": torch.ones(10)})
            except KeyboardInterrupt:
                moments += 1
        assert find_damage(path) == ""
        assert torch.load(path, weights_only=True)["model"].unique().numel() == 1
    assert moments >= 6


def test_old_checkpoints_are_removed_by_iteration(folder):
    shutil.copy(folder / "model_0000009.pth", folder / "model_final.pth")
    remove_old_checkpoints(folder, 2)
    names = {path.name for path in folder.glob("*.pth*")}
    kept = {f"{name}.pth{end}" for name in NAMES[1:] for end in ("", ".sha256")}
    assert names == kept | {"model_final.pth"}


def test_a_copied_folder_is_resumed_from_the_same_checkpoint(folder):
    """Copying may change file times and their order."""
    shutil.copy(folder / "model_0000029.pth", folder / "model_final.pth")
    for mark in ("model_0000029.pth", "model_final.pth"):
        (folder / "last_checkpoint").write_text(mark)
        for k, name in enumerate(("last_checkpoint", mark, "model_0000009.pth")):
            os.utime(folder / name, (2e9 + k, 2e9 + k))
        assert newest_intact(folder).name == mark


def test_a_checkpoint_with_another_name_is_resumed_if_last_checkpoint_names_it(tmp_path):
    model = nn.Linear(20, 30)
    nn.init.constant_(model.weight, 6)
    MaskHeadCheckpointer(model, str(tmp_path)).save("mine_0000004")
    assert resumed_weight(tmp_path) == 6


def test_numpy_numbers_in_a_state_do_not_prevent_resuming(tmp_path):
    class Best:
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"best": [self.value], "of": {np.int64(3): self.value}}

        def load_state_dict(self, state):
            self.value = state

    model = nn.Linear(2, 2)
    MaskHeadCheckpointer(model, str(tmp_path), best=Best(np.float64(0.5))).save("model_0000004")
    found = Best(None)
    MaskHeadCheckpointer(model, str(tmp_path), best=found).resume_or_load("", resume=True)
    assert found.value == {"best": [0.5], "of": {3: 0.5}}
