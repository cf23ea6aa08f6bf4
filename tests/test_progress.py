"""Progress is a bar in a terminal. If output is piped to a file, progress is a few lines."""

from __future__ import annotations

import re
import sys
import time

import pytest
from conftest import ROOT

from mask_head_plugin.progress import progress, progress_bar


def in_terminal(monkeypatch, is_terminal: bool) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quick_work_shows_a_bar_in_a_terminal_and_nothing_in_a_file(
    capsys, monkeypatch, is_terminal
):
    in_terminal(monkeypatch, is_terminal)
    assert list(progress(iter([1, 2]), "working", "image", total=2)) == [1, 2]
    told = capsys.readouterr().err
    assert ("working" in told and "image" in told) is is_terminal
    assert is_terminal or not told


def test_long_work_writes_few_lines_into_a_file_with_the_time_left(capsys, monkeypatch):
    """Simulates an hour of two nested loops. Lines become rarer and are at least 10 s apart."""
    in_terminal(monkeypatch, is_terminal=False)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in progress(range(60), "outer", "hour"):
        for _ in progress(range(60), "inner", "image"):
            now += 1
    told = capsys.readouterr().err
    assert "\r" not in told and told.endswith("\n")
    outer = re.findall(r"outer: *(\d+)% (\d+)/60 \[(\d\d):00<(\d\d):00, ", told)
    assert outer and all(int(done) == int(minutes) for _, done, minutes, _ in outer)
    assert all(int(minutes) + int(left) == 60 for *_, minutes, left in outer)
    assert 15 < len(outer) < 60
    assert told.count("inner") == 60 * 6


def test_work_done_before_does_not_affect_the_estimated_time_left(capsys, monkeypatch):
    in_terminal(monkeypatch, is_terminal=False)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress_bar("6 trials", "it", total=1000, done=800) as advance:
        now = 20.0
        advance(20)
    assert "82% 820/1000 [00:20<03:00, " in capsys.readouterr().err


def test_only_progress_draws_bars():
    """Other uses of tqdm would fill log files with carriage returns."""
    files = [
        x
        for folder in ("mask_head_plugin", "tools", "benchmarks")
        for x in (ROOT / folder).rglob("*.py")
    ]
    users = [
        x.name for x in files if re.search(r"^\s*(from|import) (tqdm|rich)\b", x.read_text(), re.M)
    ]
    assert users == ["progress.py"]
