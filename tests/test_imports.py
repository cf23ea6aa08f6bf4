"""Imports point one way: ops <- modeling <- engine <- experiments <- train_net.py, tools.

data and evaluation use ops, image_files and detectron2 only; nothing imports tools, tests or
benchmarks.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "mask_head_plugin"
TOOLS = [ROOT / "train_net.py", *sorted((ROOT / "tools").glob("*.py"))]
# What the modules of a part may import of the package, besides their own part.
ALLOWED = {
    "ops": set(),
    "messages": set(),
    "config": {"messages"},
    "durable_files": {"config"},
    "class_names": {"config", "messages"},
    "structures": {"ops"},
    "machine": set(),
    "shared_names": set(),
    "user_code": {"config"},
    "image_files": {"config", "messages"},
    "modeling": {"ops", "config", "structures", "shared_names"},
    "data": {"ops", "config", "messages", "durable_files", "shared_names", "image_files"},
    "evaluation": {"ops", "config", "class_names", "structures", "image_files"},
    "engine": {
        *("ops", "config", "messages", "class_names", "structures", "image_files", "modeling"),
        *("durable_files", "data", "evaluation", "shared_names", "user_code"),
    },
    "experiments": {
        *("user_code", "ops", "config", "messages", "durable_files", "machine", "image_files"),
        *("modeling", "data", "evaluation", "engine"),
    },
    "__init__": {"ops", "config", "modeling", "data"},
}
NEVER_IMPORTED = {"tools", "tests", "benchmarks", "train_net", "conftest"}
OPS_MAY_NOT_IMPORT = {
    *("detectron2.engine", "detectron2.data", "detectron2.evaluation", "detectron2.config"),
    *("detectron2.modeling", "detectron2.utils.registry"),
}


def imported_names(source: str, module: str) -> set[str]:
    """Returns the absolute dotted names that a module's source imports."""
    names: set[str] = set()
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{target}.{alias.name}" for alias in node.names)
    return names


def violations(source: str, module: str) -> list[str]:
    """Returns the forbidden imports of a module, e.g. of ``mask_head_plugin.ops.mask_rle``."""
    parts = module.split(".")
    part = parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None
    found = []
    for name in sorted(imported_names(source, module)):
        top, *rest = name.split(".")
        forbidden = top in NEVER_IMPORTED
        if part is not None and top == PACKAGE and rest:
            forbidden |= rest[0] != part and rest[0] in ALLOWED and rest[0] not in ALLOWED[part]
        if part == "ops":
            forbidden |= any(name.startswith(prefix) for prefix in OPS_MAY_NOT_IMPORT)
        if forbidden:
            found.append(f"{module} imports {name}")
    return found


def modules() -> dict[str, Path]:
    """Returns the modules of the package and the scripts above it, by dotted name."""
    found = {}
    for path in [*sorted((ROOT / PACKAGE).rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        # The package's own __init__ is a part; those of its folders belong to the folder.
        found[".".join(parts)] = path
    found["train_net"] = ROOT / "train_net.py"
    return found


def test_imports_point_one_way():
    found = modules()
    assert len(found) > 10
    problems = [p for module, path in found.items() for p in violations(path.read_text(), module)]
    assert problems == []


def test_a_wrong_import_is_found():
    cases = {
        "mask_head_plugin.ops.mask_target": "from ..modeling import FCNMaskHead",
        "mask_head_plugin.modeling.pooler": "from ..engine.trainer import Trainer",
        "mask_head_plugin.data.shapes": "from mask_head_plugin.modeling.pooler import build_pooler",
        "mask_head_plugin.evaluation.boundary": "import mask_head_plugin.engine",
        "mask_head_plugin.ops.axis_weights": "from detectron2.data import MetadataCatalog",
        "mask_head_plugin.ops.mask_rle": "from detectron2.config import configurable",
        "mask_head_plugin.engine.launch": "from ..experiments import ablation",
        "mask_head_plugin.experiments.zoo": "import tools.compare_zoo",
        "tools.ablate": "from tests.conftest import ROOT",
    }
    for module, source in cases.items():
        assert violations(source, module), source


def test_every_part_of_the_package_has_a_rule():
    assert {module.split(".")[1] for module in modules() if module.startswith(PACKAGE)} <= set(
        ALLOWED
    )


def test_importing_the_package_loads_neither_trainer_nor_tools_and_warns_of_nothing():
    code = """
import sys, mask_head_plugin
print(*(m for m in sys.modules if "mask_head_plugin" in m))
import mask_head_plugin.engine.run, mask_head_plugin.experiments.compare_zoo, torch
print("imported", file=sys.stderr)
torch.jit.script(lambda x: x)
"""
    command = [sys.executable, "-W", "always", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "mask_head_plugin.modeling.mask_head" in result.stdout
    assert "mask_head_plugin.engine" not in result.stdout
    before, _, after = result.stderr.partition("imported\n")
    for kind in ("FutureWarning", "pkg_resources"):
        assert kind not in before
    assert "FutureWarning: `torch.jit.script` is deprecated" in after, "the user's own call"


def test_a_warning_that_the_plugin_causes_fails_a_test():
    with pytest.raises(RuntimeWarning):
        warnings.warn_explicit("x", RuntimeWarning, "x.py", 1, module="mask_head_plugin.ops.x")


def test_help_and_wrong_flags_need_no_heavy_package():
    """Each tool in one process, where importing PyTorch and the like is an error."""
    code = """
import runpy, sys
class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "detectron2", "numpy", "cv2", "mask_head_plugin"):
            raise SystemExit(f"imports {name}")
sys.meta_path.insert(0, Refused)
for tool in sys.argv[1:]:
    for flag in ("--help", "--no-such-flag"):
        sys.argv = [tool, flag]
        try:
            runpy.run_path(tool, run_name="__main__")
        except SystemExit as end:
            print(tool, flag, end.code, file=sys.stderr)
"""
    tools = [str(path) for path in TOOLS]
    command = [sys.executable, "-c", code, *tools]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for tool in tools:
        assert f"{tool} --help 0\n" in result.stderr
        assert f"{tool} --no-such-flag 2\n" in result.stderr
    assert len(tools) >= 9 and result.returncode == 0
