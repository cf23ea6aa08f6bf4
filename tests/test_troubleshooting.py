"""Every message quoted in docs/troubleshooting.md exists in the code."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
OTHER_PACKAGES = ("detectron2.utils.collect_env", "torch.utils.cpp_extension")
"""Modules of other packages whose messages the page quotes."""
OF_PYTHON = "No module named 'mask_head_plugin'"


def files_with_messages() -> Iterator[Path]:
    for folder in ("mask_head_plugin", "tools"):
        yield from (ROOT / folder).rglob("*.py")
    for name in OTHER_PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        yield Path(spec.origin)


def texts_in_code() -> Iterator[str]:
    """Yields the strings of the code; ``{}`` stands for the inserted values of an f-string."""
    for path in files_with_messages():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(x.value if isinstance(x, ast.Constant) else "{}" for x in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quoted_messages(page: str) -> list[str]:
    """Returns the messages quoted in the first column of the page's tables."""
    cells = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]


def test_every_message_on_the_page_is_in_the_code():
    known = "\n".join([OF_PYTHON, *texts_in_code()])
    messages = quoted_messages(PAGE.read_text(encoding="utf-8"))
    assert len(messages) > 30
    assert [text for text in messages if text not in known] == []
