"""Every message quoted in docs/troubleshooting.md exists in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"


def texts_in_code() -> Iterator[str]:
    """Yields the strings of the code; ``{}`` stands for the inserted values of an f-string."""
    for folder in ("mask_head_plugin", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(
                        x.value if isinstance(x, ast.Constant) else "{}" for x in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def quoted_messages(page: str) -> list[str]:
    """Returns the messages quoted in the first column of the page's tables."""
    cells = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]


def test_every_message_on_the_page_is_in_the_code():
    known = "\n".join(texts_in_code())
    messages = quoted_messages(PAGE.read_text(encoding="utf-8"))
    assert len(messages) > 30
    assert [text for text in messages if text not in known] == []
