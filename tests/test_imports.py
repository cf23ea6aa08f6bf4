"""Imports point one way: each part of the package uses only the layers below its own.

The package and its tools import no tools, tests or benchmarks. Only the tools import train_net.py,
for its flags.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import ROOT
from quick_processes import run_script

PACKAGE = "mask_head_plugin"
TOOLS = [
    path
    for path in (ROOT / "train_net.py", *sorted((ROOT / "tools").glob("*.py")))
    if "def main(" in path.read_text()
]
# Layers from the bottom up. A module may import from its own part and from the layers below.
LAYERS = (
    {"messages", "model_input", "progress", "run_lengths"},
    {"config_imports", "detectron2_import", "machine", "ops", "shared_names"},
    {"config", "structures"},
    {"class_names", "durable_files", "image_files", "user_code"},
    {"image_file_mapper", "weight_files"},
    {"modeling", "evaluation"},
    {"dataset_check", "lazy_config", "pages"},
    {"data"},
    {"__init__", "config_check"},
    {"checkpoint"},
    {"engine"},
    {"ablation", "analysis", "comparison", "demo", "new_config"},
    {"deploy"},
)
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}
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
        forbidden = top in NEVER_IMPORTED and (top, parts[0]) != ("train_net", "tools")
        if part is not None and top == PACKAGE and rest:
            upward = LAYER_OF.get(rest[0], -1) >= LAYER_OF[part]
            forbidden |= rest[0] != part and upward
        if part == "ops":
            forbidden |= any(name.startswith(prefix) for prefix in OPS_MAY_NOT_IMPORT)
        if forbidden:
            found.append(f"{module} imports {name}")
    return found


def circle(sources: dict[str, str]) -> list[str]:
    """Returns the modules that import each other in a circle, or an empty list."""
    graph: dict[str, set[str | None]] = {}
    for module, source in sources.items():
        graph[module] = {_module_of(name, sources) for name in imported_names(source, module)}
        graph[module] -= {module, None}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def _module_of(name: str, sources: Iterable[str]) -> str | None:
    parent = name.rpartition(".")[0]
    choices = (name, f"{name}.__init__", parent, f"{parent}.__init__")
    return next((choice for choice in choices if choice in sources), None)


def modules() -> dict[str, Path]:
    """Returns the paths of the package's modules, the tools and train_net.py by dotted name."""
    found = {}
    for path in [*sorted((ROOT / PACKAGE).rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        # The __init__ of the package is a separate part; that of a folder belongs to the folder.
        found[".".join(parts)] = path
    found["train_net"] = ROOT / "train_net.py"
    return found


def test_imports_point_one_way():
    found = modules()
    assert len(found) > 10
    problems = [p for module, path in found.items() for p in violations(path.read_text(), module)]
    assert problems == []


def test_there_are_no_circular_imports():
    assert circle({module: path.read_text() for module, path in modules().items()}) == []
    made = {"p.a": "from .b import c", "p.b": "from . import d", "p.d": "import p.a"}
    assert set(circle(made)) == {"p.a", "p.b", "p.d"}


def test_a_wrong_import_is_found():
    cases = {
        "mask_head_plugin.ops.mask_target": "from ..modeling import FCNMaskHead",
        "mask_head_plugin.modeling.pooler": "from ..engine.trainer import Trainer",
        "mask_head_plugin.modeling.rcnn": "from mask_head_plugin.evaluation.drawing import draw",
        "mask_head_plugin.evaluation.boundary": "import mask_head_plugin.engine",
        "mask_head_plugin.ops.axis_weights": "from detectron2.data import MetadataCatalog",
        "mask_head_plugin.ops.mask_rle": "from detectron2.config import configurable",
        "mask_head_plugin.engine.launch": "from ..ablation import runner",
        "mask_head_plugin.comparison.zoo": "import tools.compare_zoo",
        "mask_head_plugin.dataset_check.masks": "from ..checkpoint import class_names",
        "mask_head_plugin.engine.run": "from train_net import add_run",
        "tools.ablate": "from tests.conftest import ROOT",
    }
    for module, source in cases.items():
        assert violations(source, module), source


def test_every_part_of_the_package_is_assigned_to_a_layer():
    assert {module.split(".")[1] for module in modules() if module.startswith(PACKAGE)} <= set(
        LAYER_OF
    )


def test_importing_the_package_loads_no_trainer_or_tools_and_gives_no_warning():
    code = """
import sys, mask_head_plugin
print(*(m for m in sys.modules if "mask_head_plugin" in m))
import mask_head_plugin.engine.run, mask_head_plugin.comparison.compare, warnings
print("imported", file=sys.stderr)
warnings.warn("`torch.jit.script` is deprecated", FutureWarning)
"""
    command = [sys.executable, "-W", "always", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "mask_head_plugin.modeling.mask_head" in result.stdout
    assert "mask_head_plugin.engine" not in result.stdout
    before, _, after = result.stderr.partition("imported\n")
    for kind in ("FutureWarning", "pkg_resources"):
        assert kind not in before
    assert "FutureWarning: `torch.jit.script` is deprecated" in after, (
        "a call in the user's code must still warn"
    )


def test_only_detectron2s_call_of_meshgrid_gives_no_warning(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import warnings, torch, mask_head_plugin\n"
        "torch.meshgrid(torch.ones(2), torch.ones(2))\n"
        "warnings.warn('torch.meshgrid: in an upcoming release')\n"
    )
    told = run_script(str(script)).stderr
    assert "functional.py" not in told and "script.py:3: UserWarning: torch.meshgrid" in told


def test_a_warning_caused_by_the_plugin_fails_a_test():
    with pytest.raises(RuntimeWarning):
        warnings.warn_explicit("x", RuntimeWarning, "x.py", 1, module="mask_head_plugin.ops.x")


def test_train_net_can_be_copied_into_another_project():
    names = imported_names((ROOT / "train_net.py").read_text(), "train_net")
    assert {name.split(".")[0] for name in names} <= {PACKAGE, *sys.stdlib_module_names}


def test_help_and_unknown_flags_need_no_heavy_package():
    """Runs all tools in one process in which importing a heavy package is an error."""
    code = """
import pathlib, runpy, sys
class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "detectron2", "numpy", "cv2", "mask_head_plugin"):
            raise SystemExit(f"imports {name}")
sys.meta_path.insert(0, Refused)
for tool in sys.argv[1:]:
    sys.path.insert(0, str(pathlib.Path(tool).parent))  # as Python does for a script
    for flag in ("--help", "--no-such-flag"):
        sys.argv, sys.path[0] = [tool, flag], tool.rpartition("/")[0]
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
