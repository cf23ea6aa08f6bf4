"""tools/flags.py: what all tools share."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT, load_script

TOOLS = sorted(
    path.name
    for path in (ROOT / "tools").glob("*.py")
    if "from mask_head_plugin" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_runs_the_package_of_its_checkout(monkeypatch, name):
    """Otherwise, a tool of a second clone would run the clone that is installed."""
    assert len(TOOLS) > 12
    others = [x for x in sys.path if x not in (str(ROOT), "")]
    monkeypatch.setattr(sys, "path", others)
    for module in ("flags", "train_net"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    load_script(f"tools/{name}")
    assert sys.path[0] == str(ROOT)
