"""Errors are told in one line, with the first names of a list and the nearest to a wrong one."""

from __future__ import annotations

from mask_head_plugin.messages import first_line, listed, one_line


def test_the_first_names_are_listed_and_the_others_counted():
    assert listed([]) == "none"
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_an_error_is_one_line_however_it_is_written():
    assert one_line(ValueError("no\n  such \t thing")) == "no such thing"
    assert one_line(KeyError("a key")) == "a key"  # Python's own text has quotes around it
    assert one_line(KeyError()) == ""
    assert one_line(ValueError("no such thing"), 7) == "no such"


def test_the_first_line_of_an_error_is_what_went_wrong():
    assert first_line(RuntimeError("\nout of memory\nat frame 1")) == "out of memory"
    assert first_line(MemoryError()) == "MemoryError"
