"""Imports point one way: ops <- modeling <- engine <- experiments <- train_net.py, tools.

data and evaluation use ops and detectron2 only; nothing imports tools, tests or benchmarks.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from conftest import ROOT

PACKAGE = "mask_head_plugin"
# What the modules of a part may import of the package, besides their own part.
ALLOWED = {
    "ops": set(),
    "config": set(),
    "structures": {"ops"},
    "modeling": {"ops", "config", "structures"},
    "data": {"ops", "config"},
    "evaluation": {"ops", "config", "structures"},
    "engine": {"ops", "config", "structures", "modeling", "data", "evaluation"},
    "experiments": {"ops", "config", "modeling", "data", "evaluation", "engine"},
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


def test_importing_the_package_loads_neither_trainer_nor_tools():
    import subprocess

    code = (
        "import sys, mask_head_plugin; print([m for m in sys.modules if 'mask_head_plugin' in m])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "mask_head_plugin.modeling.mask_head" in output.stdout
    assert "mask_head_plugin.engine" not in output.stdout
