"""Text of errors: a single line, the first names of a list, and the first line of a longer text."""

from __future__ import annotations

from mask_head_plugin.messages import first_line, listed, one_line


def test_a_long_list_shows_its_first_names_and_a_count():
    assert listed([]) == "none"
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_any_error_becomes_one_line():
    assert one_line(ValueError("no\n  such \t thing")) == "no such thing"
    assert one_line(KeyError("a key")) == "a key"  # str() of a KeyError adds quotes
    assert one_line(KeyError()) == ""
    assert one_line(ValueError("no such thing"), 7) == "no such"


def test_the_first_line_of_an_error_is_found():
    assert first_line(RuntimeError("\nout of memory\nat frame 1")) == "out of memory"
    assert first_line(MemoryError()) == "MemoryError"
