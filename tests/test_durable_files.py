"""Files are written completely or not at all, and a lock ends with its process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import ROOT

from mask_head_plugin.durable_files import sole_writer, write_durably


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_texts_and_bytes_are_written_without_leftovers(tmp_path):
    write_durably(tmp_path / "new" / "a.txt", "é\n")
    write_durably(tmp_path / "new" / "b.bin", lambda file: file.write(b"\xff"))
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é\n".encode()
    assert (tmp_path / "new" / "b.bin").read_bytes() == b"\xff"
    assert names_in(tmp_path / "new") == ["a.txt", "b.bin"]


@pytest.mark.parametrize("owner, name", [(os, "fsync"), (Path, "replace")])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_partial_one(
    owner, name, tmp_path, monkeypatch
):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left.*a\.txt"):
        patch.setattr(owner, name, fail)
        write_durably(path, "new")
    assert path.read_text() == "old" and names_in(tmp_path) == ["a.txt"]


def test_processes_with_the_same_id_on_two_machines_do_not_interfere(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / ("a" * 240 + ".json")  # nearly the longest name that is allowed

    def write_meanwhile(file):
        file.write(b"outer")
        write_durably(path, "inner")
        assert path.read_text() == "inner"

    write_durably(path, write_meanwhile)
    assert path.read_text() == "outer" and names_in(tmp_path) == [path.name]


def test_a_sole_writer_removes_the_unfinished_files_of_a_killed_one(tmp_path):
    (tmp_path / ".model_0000009.pth.4711.unfinished").write_bytes(b"half")
    (tmp_path / "model_0000009.pth").write_bytes(b"whole")
    with sole_writer(tmp_path):
        assert names_in(tmp_path) == ["model_0000009.pth", "writer.lock"]


def test_only_durable_files_replaces_and_locks_files():
    places = [
        path.relative_to(ROOT).as_posix()
        for path in [*(ROOT / "mask_head_plugin").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
        if any(
            word in path.read_text()
            for word in (".replace(path)", "os.replace(", "fcntl.flock(", '.partial"')
        )
    ]
    assert places == ["mask_head_plugin/durable_files.py"]
