"""Copies of the user's code that ablations compare."""

from __future__ import annotations

from mask_head_plugin.ablation.trial_code import _code_files


def test_files_of_the_same_name_in_two_folders_are_both_compared():
    files = _code_files(["one/loss.py", "two/loss.py"])
    assert sorted(map(str, files.values())) == ["one/loss.py", "two/loss.py"]
