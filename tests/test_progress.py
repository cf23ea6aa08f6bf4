"""Progress bars do not clutter files that output is redirected to."""

from __future__ import annotations

import sys

import pytest

from mask_head_plugin.progress import progress


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quick_work_shows_a_bar_in_a_terminal_and_nothing_in_a_file(
    capsys, monkeypatch, is_terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    assert list(progress(iter([1, 2]), "working", "image", total=2)) == [1, 2]
    told = capsys.readouterr().err
    assert ("working" in told and "image" in told) is is_terminal
    assert is_terminal or not told


def test_long_work_also_shows_the_time_left_in_a_file(capsys, monkeypatch):
    monkeypatch.setattr("mask_head_plugin.progress.SECONDS_IN_FILES", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    list(progress([1, 2], "working"))
    assert "50%" in capsys.readouterr().err
